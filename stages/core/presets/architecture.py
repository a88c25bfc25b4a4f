"""A Gemma's shape without its weights: the backbone's class and arguments, and what follows from its family.

Purpose: everything about a preset that layouts, loading and planning need before a byte of weights is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stages.core.common.errors import StageError, shown
from stages.core.presets.untrusted import Heads, HeadSize, Layers, Positive, Size, Typed, parse

EPSILON = 1e-6
"""keras-hub builds every block's norms with it, whatever the backbone's argument says."""


class _Gemma(Typed):
    """The arguments of keras-hub's GemmaBackbone, as far as `model/decoder.py` computes what they say."""

    vocabulary_size: Size
    num_layers: Layers
    num_query_heads: Heads
    num_key_value_heads: Heads
    hidden_dim: Size
    intermediate_dim: Size
    head_dim: HeadSize
    query_head_dim_normalize: bool = True
    use_post_ffw_norm: bool = False
    use_post_attention_norm: bool = False
    attention_logit_soft_cap: Positive | None = None
    final_logit_soft_cap: Positive | None = None
    use_sliding_window_attention: bool = False
    sliding_window_size: Size = 4096
    layer_norm_epsilon: Positive = EPSILON
    dropout: float = 0


class _Gemma3(_Gemma):
    """The arguments of Gemma3Backbone."""

    image_size: Size | None = None
    use_query_key_norm: bool = True
    local_rope_scaling_factor: Positive = 1.0
    global_rope_scaling_factor: Positive = 1.0
    vision_encoder: None = None
    use_bidirectional_attention: bool = False
    is_embedding_model: bool = False
    pooling_intermediate_dim: int | None = None
    embedding_dim: int | None = None


@dataclass(frozen=True)
class Family:
    """What sets the Gemmas of one of keras-hub's backbones apart; Gemma and Gemma 2 differ by its arguments only.

    Attributes:
        arguments: what the backbone takes.
        gates: how many of a block's two gate matrices `intermediate_dim` counts together.
        query_key_norm: whether queries and keys are normalised where no argument says otherwise.
        interleaved: whether rotary embeddings alternate between the halves of a head, as in the original checkpoints.
        block: the name of a block in Keras' weight files.
    """

    arguments: type[_Gemma]
    gates: int
    query_key_norm: bool
    interleaved: bool
    block: str


FAMILIES = {
    "GemmaBackbone": Family(_Gemma, 2, False, True, "gemma_decoder_block"),
    "Gemma3Backbone": Family(_Gemma3, 1, True, False, "gemma3_decoder_block"),
}
"""By the name of the backbone's class."""


@dataclass(frozen=True)
class Architecture:
    """A keras-hub backbone class by name, and its arguments (without dtype)."""

    class_name: str
    config: dict[str, Any]

    def __post_init__(self) -> None:
        if self.class_name not in FAMILIES:
            raise StageError(
                f"The preset must be a text Gemma ({' or '.join(FAMILIES)}). "
                f"Received: backbone={shown(self.class_name)}."
            )
        if self.config.get("vision_encoder") is not None:
            raise StageError(
                "The preset must be a text model. Received: a Gemma with a vision encoder. Use its _text preset."
            )
        config = parse(self.family.arguments, self.config, "The architecture of a Gemma")

        def need(holds: bool, key: str, allowed: str) -> None:
            if not holds:
                raise StageError(
                    f"The architecture of a Gemma that this project runs has {key} {allowed}. "
                    f"Received: {key}={getattr(config, key)}."
                )

        need(
            config.num_query_heads % config.num_key_value_heads == 0,
            "num_query_heads",
            f"a multiple of num_key_value_heads ({config.num_key_value_heads})",
        )
        by_head = config.query_head_dim_normalize or config.hidden_dim % config.num_query_heads == 0
        need(by_head, "hidden_dim", "that its heads divide")
        need(math.isclose(config.layer_norm_epsilon, EPSILON, rel_tol=1e-5), "layer_norm_epsilon", f"{EPSILON:g}")
        need(config.dropout == 0, "dropout", "0 (LoRA has its own: finetune.lora_dropout)")
        if isinstance(config, _Gemma3):
            need(not config.is_embedding_model, "is_embedding_model", "false: an embedding model predicts no tokens")
            for key in ("pooling_intermediate_dim", "embedding_dim"):
                need(getattr(config, key) is None, key, "null: an embedding model predicts no tokens")
            need(not config.use_bidirectional_attention, "use_bidirectional_attention", "false: it looks back only")
        else:
            need(config.intermediate_dim % 2 == 0, "intermediate_dim", "even: it counts both gates")

    @property
    def family(self) -> Family:
        """What the backbone's class says."""
        return FAMILIES[self.class_name]

    @property
    def ffw_dim(self) -> int:
        """Columns of one gate matrix."""
        return self.config["intermediate_dim"] // self.family.gates

    @property
    def has_query_key_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.config.get("use_query_key_norm", self.family.query_key_norm)
