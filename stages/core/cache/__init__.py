"""What killed or old runs left in the cache folder, found and removed. Imports `finetune` (checkpoints)."""
