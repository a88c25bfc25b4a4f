"""Reads reviews, or pairs of prompt and response, from IMDb or the user's files; cleans, splits and counts them.
Imports `fetch`, `presets`, `config`, `records`, `common` and `files`.
"""
