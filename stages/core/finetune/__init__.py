"""The training run: optimizer, callback, checkpoints and result.
Imports `adapters`, `generate`, `load`, `model`, `tokenize`, `sharding`, `processes`, `presets`, `config`, `records`,
`common` and `files`.
"""
