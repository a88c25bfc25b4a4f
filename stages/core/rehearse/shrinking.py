"""A model small enough for any machine that a mesh splits as it splits the real one.

Purpose: heads are kept, and every other dimension is divided by the mesh's model axis where the real one is; so the
layout, and what crosses from process to process in a step, are those of the real model.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from stages.core.presets.architecture import Architecture
from stages.core.presets.layer_kinds import of_blocks, of_both_parts

# About the least of each dimension. Two layers, since all are split alike, and each costs seconds of compilation.
HIDDEN, HEAD, FEED_FORWARD, VOCABULARY, LAYERS, WINDOW = 64, 16, 64, 512, 2, 16


def tiny(architecture: Architecture, model_axis: int) -> Architecture:
    """Return an architecture of the same kind with small dimensions.

    Args:
        architecture: the real one.
        model_axis: devices on the mesh's model axis.

    Example:
        A model axis of 3 divides none of Gemma 3 270M's dimensions (hidden_dim 640, head_dim 256), nor the tiny one's.
    """
    # Of a model in which blocks share keys and values, as many that do.
    sharing = min(architecture.config.get("num_kv_shared_layers", 0), LAYERS)
    most = min(architecture.config["num_layers"], LAYERS)
    config = of_both_parts(architecture, most, sharing) if sharing else of_blocks(architecture, most)
    # keras-hub needs heads that divide the hidden dimension where it scales queries by it, and rotates halves of heads.
    by_heads = 1 if config.get("query_head_dim_normalize", True) else config["num_query_heads"]
    config["hidden_dim"] = _small(config["hidden_dim"], HIDDEN, model_axis, by_heads)
    config["head_dim"] = _small(config["head_dim"], HEAD, model_axis, 2)
    gates = architecture.family.gates
    config["intermediate_dim"] = gates * _small(architecture.ffw_dim, FEED_FORWARD, model_axis, 2)
    config["vocabulary_size"] = _small(config["vocabulary_size"], VOCABULARY, model_axis, 1)
    if experts := architecture.kinds[0].experts:
        config["num_experts"] = _small(experts.count, 2 * experts.chosen, model_axis, 1)
        config["expert_intermediate_dim"] = _small(experts.width, FEED_FORWARD, model_axis, 1)
    if config.get("hidden_size_per_layer_input"):
        config["hidden_size_per_layer_input"] = _small(config["hidden_size_per_layer_input"], HEAD, model_axis, 1)
        config["vocab_size_per_layer_input"] = config["vocabulary_size"]
    if "sliding_window_size" in config:
        config["sliding_window_size"] = min(config["sliding_window_size"], WINDOW)
    return Architecture(architecture.class_name, config)


def _small(size: int, least: int, axis: int, multiple: int) -> int:
    """Return a size of at least `least` that the axis divides if it divides `size`, a multiple of `multiple`."""
    if size % axis == 0:
        unit = math.lcm(axis, multiple)
        return min(-(-least // unit) * unit, size)
    found = -(-least // multiple) * multiple
    while found % axis == 0:
        found += multiple
    return min(found, size)


class RandomWeights:
    """A source of random weights: the same for the same path, whoever reads which part."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Take each weight's shape by its path."""
        self._shapes = shapes

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._shapes[path]

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a part of a weight, float32."""
        shape = self._shapes[path]
        values = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, np.float32)
        fan_in = 1 if len(shape) == 1 else math.prod(shape[:-1])
        return (0.1 if len(shape) == 1 else min(1.0, 4.0 / fan_in**0.5)) * values[index]
