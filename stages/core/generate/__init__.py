"""Prompts, and sampling from a model.
Imports `load`, `model`, `tokenize`, `presets`, `config` and `common`.
"""
