"""Finds and removes what killed or old runs left in the cache folder. Imports `finetune`."""
