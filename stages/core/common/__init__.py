"""What every package needs and no result depends on: errors, paths, progress, redaction of secrets, and the list of the
code that results do depend on.
Imports `files`.
"""
