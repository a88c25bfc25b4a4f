"""Prompts, and sampling from a model. Imports `model`, `tokenize`, `presets` and `common`."""
