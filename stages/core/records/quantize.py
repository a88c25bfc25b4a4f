"""What `models/quantized/index.json` and `data/metrics/quantize.json` hold: `quantize` writes them."""

from __future__ import annotations

from stages.core.records.record import FileRecord, OrAbsent


class QuantizedBase(FileRecord):
    """Which codes were chosen.

    Attributes:
        base: fingerprint of the preset.
        dtype: `load.dtype`.
        files: SHA-256 of each file next to this one, by its name; none where no codes are chosen on training windows.
        kernels: paths of the kernels whose codes are in them.
    """

    base: OrAbsent[str] = None
    dtype: OrAbsent[str] = None
    files: dict[str, str]
    kernels: tuple[str, ...]


class QuantizeMetrics(FileRecord):
    """Choosing the codes of 4 bits; the errors are the squared errors of the matrices' outputs on the training windows,
    as a fraction of the outputs' squares, averaged over the matrices: with codes rounded to nearest, and as chosen.
    """

    seconds: float
    windows: int = 0
    tokens: int = 0
    matrices: int = 0
    output_error_nearest_fraction: OrAbsent[float] = None
    output_error_chosen_fraction: OrAbsent[float] = None
