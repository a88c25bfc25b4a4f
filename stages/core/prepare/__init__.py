"""Bringing reviews, or pairs of prompt and response, from IMDb or a person's files: cleaned, split and counted.
Imports `fetch` (downloads), `presets`, `config`, `files` and `common`.
"""
