"""What crosses a stage boundary as a file: one typed model that writes it and reads it.
Imports `common` and `files`.
"""
