"""The pipeline: one click script a stage, run as `python -m stages.<name>`; the work is in `stages.core`."""
