"""Prompts, and sampling from a model. Imports `model`, `tokenize` and `presets`."""
