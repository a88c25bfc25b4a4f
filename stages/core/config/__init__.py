"""The settings: the schema of `params.yaml`, reading it with errors a person can act on, changing it, and profiles.
Imports `common`.
"""
