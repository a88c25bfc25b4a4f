"""The training run: optimizer, callback, checkpoints and result.
Imports `generate` (samples), `load`, `model`, `tokenize`, `sharding` and what they import.
"""
