"""The tuned model in the forms that others read, and the proof that what was written computes the same.
Imports `evaluate`, `fetch`, `load`, `model`, `tokenize`, `sharding`, `presets`, `config`, `records`, `common` and
`files`.
"""
