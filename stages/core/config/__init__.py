"""The settings: the schema of `params.yaml`, reading it with actionable errors, editing it, and profiles.
Imports `records` and `common`.
"""
