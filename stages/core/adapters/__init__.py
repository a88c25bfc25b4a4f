"""Adapters that come back: in PEFT's form or this project's, put on the base to measure, or to continue training.
Imports `load`, `presets`, `records`, `common` and `files`.
"""
