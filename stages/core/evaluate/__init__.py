"""Measuring a model on whole held-out texts, and comparing two models text by text.
Imports `tokenize`, `sharding`, `presets`, `records`, `common` and `files`.
"""
