"""What a person is told before a run: the sharding that it would have, and whether the plan says that it fits.
Imports `plan`, `sharding`, `fetch`, `presets`, `config`, `cli`, `records` and `common`.
"""
