"""Measuring a model on whole held-out texts, and comparing two models text by text.
Imports `tokenize`, `sharding`, `files` and `common`.
"""
