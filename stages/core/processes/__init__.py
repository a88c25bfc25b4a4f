"""Several processes of one run: who asks for them, how they meet, are compared, and end together.
Imports `common` and `files`.
"""
