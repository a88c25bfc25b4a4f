"""A Gemma's shape without its weights: the backbone's class and arguments, and what follows from its family.

Purpose: everything about a preset that layouts, loading and planning need before a byte of weights is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.core.common.errors import StageError, shown
from stages.core.presets.layer_kinds import LayerKind, first_sharing, layer_kinds, names_of
from stages.core.presets.untrusted import Count, Heads, HeadSize, InputSize, Layers, Positive, Size, Typed, parse

# Keras' own bookkeeping, none of the backbone's arguments; dtype is ours to choose.
BOOKKEEPING = ("name", "trainable", "dtype")
EPSILON = 1e-6
"""keras-hub builds every block's norms with it, whatever the backbone's argument says."""


class _Common(Typed):
    """The arguments that all of keras-hub's backbones take, as far as `model/decoder.py` computes what they say."""

    vocabulary_size: Size
    num_layers: Layers
    num_query_heads: Heads
    num_key_value_heads: Heads
    hidden_dim: Size
    intermediate_dim: Size
    head_dim: HeadSize
    query_head_dim_normalize: bool = True
    attention_logit_soft_cap: Positive | None = None
    final_logit_soft_cap: Positive | None = None
    use_sliding_window_attention: bool = False
    sliding_window_size: Size = 4096
    layer_norm_epsilon: Positive = EPSILON
    dropout: float = 0


class _Gemma(_Common):
    """The arguments of GemmaBackbone."""

    use_post_ffw_norm: bool = False
    use_post_attention_norm: bool = False


class _Later(_Common):
    """The arguments that the backbones since Gemma 3 share."""

    image_size: Size | None = None
    local_rope_scaling_factor: Positive = 1.0
    global_rope_scaling_factor: Positive = 1.0
    vision_encoder: None = None
    use_bidirectional_attention: bool = False
    is_embedding_model: bool = False
    pooling_intermediate_dim: int | None = None
    embedding_dim: int | None = None


class _Gemma3(_Later, _Gemma):
    """The arguments of Gemma3Backbone."""

    use_query_key_norm: bool = True


class _Gemma4(_Later):
    """The arguments of Gemma4Backbone."""

    use_sliding_window_attention: bool = True
    sliding_window_size: Size = 512
    sliding_window_pattern: Layers = 6
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    global_head_dim: HeadSize | None = None
    num_global_key_value_heads: Heads | None = None
    local_rope_wavelength: Positive | None = None
    global_rope_wavelength: Positive | None = None
    global_rope_partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    audio_encoder: None = None
    num_audio_tokens_per_clip: int | None = None
    # Of pixels only.
    use_vision_bidirectional_attention: bool = False
    num_kv_shared_layers: Count = 0
    hidden_size_per_layer_input: InputSize = 0
    vocab_size_per_layer_input: int | None = None
    use_double_wide_mlp: bool = False
    enable_moe_block: bool = False
    num_experts: Heads | None = None
    expert_intermediate_dim: Size | None = None
    num_experts_per_token: Heads = 8


@dataclass(frozen=True)
class Family:
    """What sets the Gemmas of one of keras-hub's backbones apart; Gemma and Gemma 2 differ by its arguments only.

    Attributes:
        arguments: what the backbone takes.
        gates: how many of a block's two gate matrices `intermediate_dim` counts together.
        query_key_norm: whether queries and keys are normalised where no argument says otherwise.
        block: the name of a block in Keras' weight files.
        full_every: the last of each group of this many blocks has no sliding window.
        scale_from_one: whether norms multiply by one more than the scale that is stored, but in GGUF files.
        towers: whether presets hold a vision or audio tower beside the text model, which is left out.
    """

    arguments: type[_Common]
    gates: int
    query_key_norm: bool
    block: str
    full_every: int
    scale_from_one: bool = True
    towers: bool = False

    @property
    def windowed(self) -> bool:
        """Whether attention is windowed where no argument says otherwise."""
        return self.arguments.model_fields["use_sliding_window_attention"].default

    @property
    def window(self) -> int:
        """The window, in tokens, where no argument states it."""
        return self.arguments.model_fields["sliding_window_size"].default


FAMILIES = {
    "GemmaBackbone": Family(_Gemma, 2, False, "gemma_decoder_block", 2),
    "Gemma3Backbone": Family(_Gemma3, 1, True, "gemma3_decoder_block", 6),
    "Gemma4Backbone": Family(_Gemma4, 1, True, "gemma4_text_decoder_block", 6, False, True),
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
        if isinstance(config, _Gemma4):
            self._check_gemma4(config, need)
        if isinstance(config, _Later):
            need(not config.is_embedding_model, "is_embedding_model", "false: an embedding model predicts no tokens")
            for key in ("pooling_intermediate_dim", "embedding_dim"):
                need(getattr(config, key) is None, key, "null: an embedding model predicts no tokens")
            need(not config.use_bidirectional_attention, "use_bidirectional_attention", "false: it looks back only")
        else:
            need(config.intermediate_dim % 2 == 0, "intermediate_dim", "even: it counts both gates")

    def _check_gemma4(self, config: _Gemma4, need: Callable[[bool, str, str], None]) -> None:
        """Refuse what sets other sizes of Gemma 4 apart, which the forward pass does not compute."""
        count = config.num_layers
        need(
            config.num_kv_shared_layers < count,
            "num_kv_shared_layers",
            f"below its {count} blocks: an assistant, which drafts for another model, has no keys of its own",
        )
        if config.enable_moe_block:
            experts = config.num_experts or 0
            need(experts > 0, "num_experts", "a number, with enable_moe_block")
            need(config.expert_intermediate_dim is not None, "expert_intermediate_dim", "a number, for the same reason")
            need(config.num_experts_per_token <= experts, "num_experts_per_token", f"at most num_experts ({experts})")
        need(len(config.layer_types or ()) in (0, count), "layer_types", f"a name for each of its {count} blocks")
        names, first = names_of(self), first_sharing(self)
        need(
            {*names[first:]} <= {*names[:first]},
            "num_kv_shared_layers",
            "such that the blocks with keys of their own are of all the others' kinds",
        )
        need(
            not config.hidden_size_per_layer_input
            or config.vocab_size_per_layer_input in (None, config.vocabulary_size),
            "vocab_size_per_layer_input",
            f"the vocabulary's size ({config.vocabulary_size}): every token has numbers for each block",
        )
        alike = config.num_global_key_value_heads
        need(
            alike is None or config.num_query_heads % alike == 0,
            "num_global_key_value_heads",
            f"a divisor of num_query_heads ({config.num_query_heads})",
        )
        need(
            config.num_global_key_value_heads is None or config.use_sliding_window_attention,
            "use_sliding_window_attention",
            "true",
        )

    @functools.cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each block."""
        return layer_kinds(self)

    @property
    def family(self) -> Family:
        """What the backbone's class says."""
        return FAMILIES[self.class_name]

    @property
    def empty_thought(self) -> bool:
        """Whether the model's chat template opens an answer without thinking with an empty thought.

        Of Gemma 4 that of the 12B, 26B and 31B does, in whose full attention values are keys, and no smaller one's.
        """
        return any(kind.keys_are_values for kind in self.kinds)

    @property
    def ffw_dim(self) -> int:
        """Columns of one gate matrix."""
        return self.config["intermediate_dim"] // self.family.gates


def of_backbone(backbone: Any) -> Architecture:
    """Return the architecture of one of keras-hub's backbones, loaded or declared."""
    config = {key: value for key, value in backbone.get_config().items() if key not in BOOKKEEPING}
    return Architecture(type(backbone).__name__, config)
