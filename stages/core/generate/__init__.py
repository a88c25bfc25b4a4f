"""Prompts, sampling from a model, and what is written at the terminal.
Imports `adapters`, `load`, `model`, `tokenize`, `presets`, `config`, `records` and `common`.
"""
