"""Measuring a model on whole held-out texts, and comparing two models text by text; tasks beside the loss.
Imports `generate`, `model`, `tokenize`, `sharding`, `presets`, `records`, `common` and `files`.
"""
