"""A model in memory: declared without values, its weights read into their shards, with the adapter of a tuned variant.
Imports `sharding`, `processes`, `presets`, `records`, `common` and `files`.
"""
