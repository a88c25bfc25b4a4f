"""Measuring a model on whole held-out texts, and comparing two models text by text.
Imports `tokenize`, `sharding`, `records`, `common` and `files`.
"""
