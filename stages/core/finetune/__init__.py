"""The training run: optimizer, callback, checkpoints and what is told of it.
Imports `generate` (samples), `load`, `model`, `tokenize`, `sharding` and what lies below them.
"""
