"""From texts to batches: token ids, the chat template, packed sequences with their loss mask, and reading them back.
Imports `presets`, `sharding` (the batch axis), `config`, `files` and `common`.
"""
