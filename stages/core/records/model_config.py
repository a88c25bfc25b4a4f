"""What `models/<variant>/model.json` holds: `load` and `finetune` write it, and what opens the variant reads it."""

from __future__ import annotations

from stages.core.common.paths import MANIFEST
from stages.core.records.layout import LoraConfig, MeshShape, NamedLayout
from stages.core.records.record import FileRecord, OrAbsent, Record


class TunedWeights(Record):
    """The weights that finetune wrote next to `model.json`: the file, and what was trained (see `LoraConfig`)."""

    file: str
    rank: int
    alpha: float | None
    targets: tuple[str, ...]

    @property
    def lora(self) -> LoraConfig:
        """What was trained."""
        return LoraConfig(self.rank, self.alpha, self.targets)


class ModelConfig(FileRecord):
    """How a variant is put on devices.

    Attributes:
        variant: `baseline` or `tuned`.
        manifest: path of the preset's manifest, relative to the repository.
        preset: its name.
        base: its fingerprint; other weights than these are refused.
        dtype: `load.dtype`.
        mesh: with the kind of devices as the settings have it.
        layout: the rules that every weight is placed by.
        codes: fingerprint of the codes that `quantize` chose for it; absent if it chose none.
        tuned: None for the baseline.
    """

    variant: str
    manifest: str = MANIFEST
    preset: str
    base: str
    dtype: str
    mesh: MeshShape
    layout: NamedLayout
    codes: OrAbsent[str] = None
    tuned: TunedWeights | None = None
