"""A few steps of a run on tiny weights over real processes of this machine, compared with one process.
Imports `preview`, `finetune`, `load`, `cli`, `sharding`, `processes`, `presets`, `config`, `records`, `common` and
`files`.
"""
