"""What `data/metrics/load.json` holds: `load` writes it, `report` reads it."""

from __future__ import annotations

from stages.core.records.record import FileRecord


class LoadMetrics(FileRecord):
    """Loading the model into its shards; `replicated_fraction` is of the weights' bytes."""

    seconds: float
    peak_host_bytes: int
    parameters: int
    devices: int
    bytes_per_device_max: int
    replicated_fraction: float
