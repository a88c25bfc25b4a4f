"""What is reported before a run: its sharding, and whether the plan says that it fits.
Imports `plan`, `sharding`, `fetch`, `presets`, `config`, `cli`, `records` and `common`.
"""
