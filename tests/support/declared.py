"""The declared weights of the public Gemma text checkpoints, for tests of layouts."""

from __future__ import annotations

import functools

from stages.core.fetch.catalog import GEMMAS, architecture
from stages.core.load import lora_kernels
from stages.core.load.backbone import build_backbone
from stages.core.load.weight_loading import weights_of
from stages.core.records.layout import LoraConfig
from stages.core.sharding.layout import Weight

__all__ = ["GEMMAS", "architecture", "declared_weights"]


@functools.cache
def declared_weights(preset: str, rank: int = 0) -> list[Weight]:
    """A checkpoint's weights without values, with LoRA kernels on query and value if there is a rank."""
    backbone = build_backbone(architecture(preset), "float32")
    lora_kernels.declare(backbone, LoraConfig(rank, None, ("query", "value")))
    return weights_of(backbone)
