"""The tuned model in the forms that others read, and the proof that what was written computes the same.
Imports `quantize`, `evaluate`, `fetch`, `load`, `tokenize`, `presets`, `config`, `records`, `common` and
`files`.
"""
