"""What `models/quantized/index.json` and `data/metrics/quantize.json` hold: `quantize` writes them."""

from __future__ import annotations

from stages.core.records.record import FileRecord, OrAbsent


class QuantizedBase(FileRecord):
    """Which codes were chosen.

    Attributes:
        base: fingerprint of the preset.
        dtype: `load.dtype`.
        files: SHA-256 of each file next to this one, by its name; none if no codes were chosen.
        kernels: paths of the kernels whose codes are in them.
    """

    base: OrAbsent[str] = None
    dtype: OrAbsent[str] = None
    files: dict[str, str]
    kernels: tuple[str, ...]


class QuantizeMetrics(FileRecord):
    """Choosing the 4-bit codes.

    `sequences` and `tokens` are of the training data that was used. The errors are those of the matrices' outputs on
    it: squared errors as a fraction of the squared outputs, averaged over the matrices, with the nearest codes and with
    the chosen ones.
    """

    seconds: float
    sequences: int = 0
    tokens: int = 0
    matrices: int = 0
    output_error_nearest_fraction: OrAbsent[float] = None
    output_error_chosen_fraction: OrAbsent[float] = None
