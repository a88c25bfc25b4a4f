"""Prompts, sampling from a model, and what is written at the terminal.
Imports `adapters`, `load`, `model`, `tokenize`, `sharding`, `presets`, `config`, `records` and `common`.
"""
