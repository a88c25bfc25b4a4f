"""What each block of a Gemma is: the one table that the forward pass, rotary embeddings, layouts, caches and the counts
of flops read.

Purpose: Gemma 3 differs between its blocks by windows and wavelengths, Gemma 4 by the number and size of heads too, and
its small sizes by whose keys a block attends to, so no number of the backbone's arguments holds for all blocks.
tests/presets/test_layer_kinds.py compares the table with the attributes of keras-hub's layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

LOCAL_WAVELENGTH, GLOBAL_WAVELENGTH = 1.0e4, 1.0e6
"""Of rotary embeddings in keras-hub: of Gemma and Gemma 2, and of the later Gemmas' windowed blocks; and of their other
blocks."""

Name = Literal["sliding_attention", "full_attention"]


class _Architecture(Protocol):
    """What is read of an `Architecture`, whose module imports this one."""

    @property
    def class_name(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def family(self) -> Any: ...


@dataclass(frozen=True)
class Experts:
    """A block's experts, beside its dense feed-forward.

    Attributes:
        count: how many there are.
        chosen: how many of them a token is sent to.
        width: units of one.
    """

    count: int
    chosen: int
    width: int


@dataclass(frozen=True)
class LayerKind:
    """A block's attention and what surrounds it.

    Attributes:
        name: transformers' name of the kind.
        query_heads, key_heads, head: numbers of heads, and the size of one.
        window: tokens that a query sees back, itself included; None: all.
        wavelength, rope_scaling: of the rotary embeddings; positions are divided by the scaling.
        turned: pairs of a head that are turned, at most half of its size; the others stay as they are.
        keys_are_values: values are the keys before their norm and rotation, and have no kernel.
        query_scale: what queries are multiplied with.
        query_key_norm, value_norm: whether these are normalised, values without a scale of their own.
        post_attention_norm, post_ffw_norm: whether what a block adds is normalised.
        scaled: whether the block's output is multiplied with a number of its own.
        experts: beside the dense feed-forward; None: none.
        keys_of: the number of the earlier block whose keys and values it attends to, and has none of its own; None: its
            own.
        ffw: columns of one gate matrix.
        layer_input: numbers of each token's embedding that the block alone adds to it; 0: none.
    """

    name: Name
    query_heads: int
    key_heads: int
    head: int
    window: int | None
    wavelength: float
    rope_scaling: float
    turned: int
    keys_are_values: bool
    query_scale: float
    query_key_norm: bool
    value_norm: bool
    post_attention_norm: bool
    post_ffw_norm: bool
    scaled: bool
    keys_of: int | None
    ffw: int
    layer_input: int
    experts: Experts | None = None

    @property
    def rope(self) -> tuple[float, float, int, int]:
        """Return what the angles follow from."""
        return self.wavelength, self.rope_scaling, self.head, self.turned

    @property
    def shapes(self) -> tuple[int, int, int, bool, bool, int]:
        """Return what the shapes of a block's weights follow from, beside what all blocks share."""
        shares = self.keys_of is not None
        return self.query_heads, self.key_heads, self.head, self.keys_are_values, shares, self.ffw


def layer_kinds(architecture: _Architecture) -> tuple[LayerKind, ...]:
    """Return the kind of each block, in their order."""
    names = names_of(architecture)
    of_kind = _gemma4 if architecture.class_name == "Gemma4Backbone" else _gemma
    found = {name: of_kind(architecture, name) for name in set(names)}
    kinds = [found[name] for name in names]
    first = first_sharing(architecture)
    wider = 2 if architecture.config.get("use_double_wide_mlp") else 1
    for number, name in enumerate(names[first:], first):
        earlier = next(each for each in range(first - 1, -1, -1) if names[each] == name)
        kinds[number] = replace(found[name], keys_of=earlier, ffw=wider * found[name].ffw)
    return tuple(kinds)


def first_sharing(architecture: _Architecture) -> int:
    """Return the number of the first block that attends to another's keys and values; of all blocks where none does."""
    return architecture.config["num_layers"] - architecture.config.get("num_kv_shared_layers", 0)


def period(architecture: _Architecture, length: int) -> int:
    """Return after how many blocks what a block computes repeats: 1 where all blocks are alike.

    Blocks are alike if their weights have the same shapes and they see as much of sequences of `length` tokens.

    Example:
        >>> gemma = catalog.architecture("gemma3_4b_text")     # each sixth block sees more than 1,024 tokens
        >>> period(gemma, 512), period(gemma, 8192)
        (1, 6)
    """

    def seen(kind: LayerKind) -> int:
        return length if kind.window is None else min(kind.window, length)

    # Of the blocks with keys of their own: those that share them repeat with the same period.
    found = [(kind.shapes, seen(kind)) for kind in layer_kinds(architecture)[: first_sharing(architecture)]]
    return next(size for size in range(1, len(found) + 1) if found[size:] == found[:-size])


def of_blocks(architecture: _Architecture, blocks: int) -> dict[str, Any]:
    """Return the arguments of a model with only the first `blocks` blocks."""
    return _of_numbers(architecture, range(blocks))


def of_both_parts(architecture: _Architecture, own: int, sharing: int) -> dict[str, Any]:
    """Return the arguments of a model with only the first blocks of both parts.

    Args:
        architecture: of a model in which blocks share keys and values.
        own: blocks with keys and values of their own, whole periods.
        sharing: blocks that share these, whole periods.
    """
    first = first_sharing(architecture)
    return _of_numbers(architecture, [*range(own), *range(first, first + sharing)])


def _of_numbers(architecture: _Architecture, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a model with only some of the blocks."""
    config = {**architecture.config, "num_layers": len(numbers)}
    if config.get("layer_types") or config.get("num_kv_shared_layers"):
        names, first = names_of(architecture), first_sharing(architecture)
        config["layer_types"] = [names[number] for number in numbers]
        config["num_kv_shared_layers"] = sum(number >= first for number in numbers)
    return config


def names_of(architecture: _Architecture) -> list[Name]:
    """Return transformers' name of each block's kind; without windowed attention those say where wavelengths differ."""
    config, count = architecture.config, architecture.config["num_layers"]
    if config.get("layer_types"):
        return list(config["layer_types"])
    windowed = config.get("use_sliding_window_attention", architecture.family.windowed)
    if architecture.class_name == "Gemma4Backbone":
        every = config.get("sliding_window_pattern", 6)
    elif not windowed:
        return ["full_attention"] * count
    else:
        every = architecture.family.full_every
    return ["sliding_attention" if number % every else "full_attention" for number in range(1, count + 1)]


def _gemma(architecture: _Architecture, name: Name) -> LayerKind:
    """Return a kind of Gemma 1, 2 or 3."""
    config, gemma3 = architecture.config, architecture.class_name == "Gemma3Backbone"
    heads, head = config["num_query_heads"], config["head_dim"]
    # keras-hub 0.32 builds every block with query_head_dim_normalize=True, whatever the backbone's argument says: the
    # 27B models would be scaled by 1/sqrt(128) instead of 1/sqrt(144) (Gemma 2) and 1/sqrt(168) (Gemma 3).
    per_head = head if config.get("query_head_dim_normalize", True) else config["hidden_dim"] // heads
    full = name == "full_attention"
    return LayerKind(
        name=name,
        query_heads=heads,
        key_heads=config["num_key_value_heads"],
        head=head,
        window=None if full else config.get("sliding_window_size", architecture.family.window),
        wavelength=GLOBAL_WAVELENGTH if gemma3 and full else LOCAL_WAVELENGTH,
        rope_scaling=float(config.get(f"{'global' if full else 'local'}_rope_scaling_factor", 1.0)) if gemma3 else 1.0,
        turned=head // 2,
        keys_are_values=False,
        query_scale=per_head**-0.5,
        query_key_norm=config.get("use_query_key_norm", gemma3),
        value_norm=False,
        post_attention_norm=config.get("use_post_attention_norm", False),
        post_ffw_norm=config.get("use_post_ffw_norm", False),
        scaled=False,
        keys_of=None,
        ffw=config["intermediate_dim"] // architecture.family.gates,
        layer_input=0,
    )


def _gemma4(architecture: _Architecture, name: Name) -> LayerKind:
    """Return a kind of Gemma 4: attention scale 1, all norms, and full attention with heads of its own.

    Source: transformers 5.23 `modeling_gemma4.py`, keras-hub 0.32 `gemma4_backbone.py`.
    """
    config, full = architecture.config, name == "full_attention"
    head, keys = config["head_dim"], config["num_key_value_heads"]
    alike = config.get("num_global_key_value_heads") if full else None
    if full:
        head = config.get("global_head_dim") or head
    share = config.get("global_rope_partial_rotary_factor", 1.0) if full else 1.0
    wavelength = config.get(f"{'global' if full else 'local'}_rope_wavelength")
    windowed = not full and config.get("use_sliding_window_attention", True)
    return LayerKind(
        name=name,
        query_heads=config["num_query_heads"],
        key_heads=keys if alike is None else alike,
        head=head,
        window=config.get("sliding_window_size", architecture.family.window) if windowed else None,
        wavelength=float(wavelength or (GLOBAL_WAVELENGTH if full else LOCAL_WAVELENGTH)),
        rope_scaling=float(config.get(f"{'global' if full else 'local'}_rope_scaling_factor", 1.0)),
        turned=max(1, math.floor(share * head) // 2),
        keys_are_values=alike is not None,
        query_scale=1.0,
        query_key_norm=True,
        value_norm=True,
        post_attention_norm=True,
        post_ffw_norm=True,
        scaled=True,
        keys_of=None,
        ffw=config["intermediate_dim"],
        layer_input=config.get("hidden_size_per_layer_input", 0),
        experts=_experts(config),
    )


def _experts(config: dict[str, Any]) -> Experts | None:
    """Return the experts that every block of a Gemma 4 has, if it has any."""
    if not config.get("enable_moe_block"):
        return None
    return Experts(config["num_experts"], config.get("num_experts_per_token", 8), config["expert_intermediate_dim"])
