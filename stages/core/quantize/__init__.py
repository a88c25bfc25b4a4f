"""Chooses the codes of an int4 base by its layers' inputs, and runs a model with one block in memory at a time.
Imports `load`, `model`, `sharding`, `presets`, `records` and `common`.
"""
