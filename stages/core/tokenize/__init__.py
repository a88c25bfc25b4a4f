"""From texts to batches: token ids, the chat template, packed sequences with their loss mask, and reading them back.
Imports `sharding`, `presets`, `config`, `common` and `files`.
"""
