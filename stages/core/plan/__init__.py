"""Memory and time of a step on devices that are not there, by the real compiler.
Imports `finetune`, `load`, `model`, `tokenize`, `sharding`, `fetch`, `presets`, `config`, `records`, `common` and
`files`.
"""
