"""The forward pass and the loss: pure JAX over keras-hub's layers, each device on its own part.
Imports `sharding`, `presets` and `common`.
"""
