"""The codes of a base of 4 bits, chosen by what its layers are given, and a model run a block's weights at a time.
Imports `load`, `model`, `sharding`, `presets`, `records` and `common`.
"""
