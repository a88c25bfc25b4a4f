"""Memory and time of a step on devices that are not there, by the real compiler.
Imports `finetune` (the same step), `fetch` (the catalog) and what they import.
"""
