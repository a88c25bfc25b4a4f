"""LoRA on keras-hub's layers: declaring the kernels, applying them as x A B, and their first values.

Purpose: Keras' own `EinsumDense` forms W + AB in full, forward and backward, for every layer and step; x A B costs
rank / output of that. Source of the method: https://arxiv.org/abs/2106.09685.

On an `EinsumDense` kernel A has the kernel's shape with the last dimension replaced by the rank, and B is
(rank, last dimension): on Gemma's query one A a head and one B for all heads.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.core.errors import StageError

if TYPE_CHECKING:
    import jax
    import keras

# Drops out part of what goes into the adapter of the layer with a path.
Dropout = Callable[["jax.Array", str], "jax.Array"]
# Every matrix of a block, in the model's order.
PROJECTIONS = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")


def target_layers(backbone: keras.Model, targets: Sequence[str]) -> list[Any]:
    """Return the projections that match a target, in the model's order.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        targets: each a regular expression that must match a layer's path (`decoder_block_0/attention/query`) whole, or
            the end of it that begins after a slash: so a layer's name is a target, and so is `attention/.*`.

    Raises:
        StageError: a target that is no regular expression, or matches nothing; the message names what there is.
    """
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.name in PROJECTIONS]
    paths = {layer.path: layer for layer in layers if layer.weights}
    chosen = set()
    for target in targets:
        try:
            pattern = re.compile(rf"(?:.*/)?(?:{target})")
        except re.error as error:
            raise StageError(
                f"A LoRA target must be a layer's name or a regular expression: {error}. Received: targets={target!r}."
            ) from error
        found = {path for path in paths if pattern.fullmatch(path)}
        if not found:
            blocks = len({path.split("/")[0] for path in paths})
            names = ", ".join(dict.fromkeys(path.split("/", 1)[1] for path in paths))
            raise StageError(
                f"A LoRA target must match a layer, and this one matches none. Received: targets={target!r}. "
                f"There are: {names}, each below decoder_block_0 to decoder_block_{blocks - 1}."
            )
        chosen |= found
    return [layer for path, layer in paths.items() if path in chosen]


def declare(backbone: keras.Model, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    """Freeze the backbone and declare LoRA kernels on its target layers; rank 0 leaves every weight trainable.

    The kernels have shapes and paths but no values, as the backbone's own weights after `build_backbone`.
    """
    from stages.core.architecture import declared_only

    backbone.trainable = True
    if rank == 0:
        return
    chosen = target_layers(backbone, targets)
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = False
    with declared_only():
        for layer in chosen:
            layer.trainable = True
            layer.enable_lora(rank, lora_alpha=alpha if alpha is not None else rank)


def first_value(path: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return the value a LoRA kernel starts from, as a NumPy float32 array.

    A is He-uniform and B zero, as in Keras' `enable_lora`, so that the tuned model starts as the base. Each A has its
    own stream, named by its path: adding a target changes no other layer's start.
    """
    import numpy as np

    if path.endswith("lora_kernel_b"):
        return np.zeros(shape, np.float32)
    # Keras' fan-in of a kernel with more than two dimensions: all but the last.
    limit = (6.0 / np.prod(shape[:-1])) ** 0.5
    stream = np.random.default_rng([seed, zlib.crc32(path.encode())])
    return stream.uniform(-limit, limit, shape).astype(np.float32)


def project(layer: Any, x: jax.Array, dropout: Dropout | None = None, *, divided: bool = False) -> jax.Array:
    """Apply an `EinsumDense` layer without bias, with its adapter if it has one.

    Args:
        layer: one of Gemma's projections; its equation is such as `btd,ndh->btnh`.
        x: the activation, in the compute dtype.
        dropout: applied to what goes into the adapter only; told the layer's path.
        divided: whether XLA is to divide the output's dimensions over devices, see `widen`.

    Returns:
        x W + (alpha / rank) x A B, in the compute dtype.
    """
    return apply(layer, x, arrays_of(layer), dropout, divided=divided)


def arrays_of(layer: Any) -> dict[str, jax.Array]:
    """Return the layer's kernel, and its LoRA kernels if it has them, each in the dtype it is kept in."""
    arrays = {"kernel": layer._kernel}
    if layer.lora_enabled:
        arrays |= {"lora_kernel_a": layer.lora_kernel_a, "lora_kernel_b": layer.lora_kernel_b}
    return {name: variable.value for name, variable in arrays.items()}


def apply(
    layer: Any,
    x: jax.Array,
    arrays: dict[str, jax.Array],
    dropout: Dropout | None = None,
    *,
    divided: bool = False,
) -> jax.Array:
    """Do what `project` does with the layer's arrays, or a device's parts of them, given."""
    y = base(layer, x, arrays)
    if "lora_kernel_a" not in arrays:
        return y
    into = x if dropout is None else dropout(x, layer.path)
    return y + widen(layer, narrowed(layer, into, arrays["lora_kernel_a"]), arrays, divided=divided)


def base(layer: Any, x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
    """Return x W, in the compute dtype."""
    from stages.core.products import product

    kernel = arrays["kernel"]
    # A frozen kernel has no gradient, for which x would be kept.
    return product(layer.equation, x, kernel if layer._kernel.trainable else kernel.astype(x.dtype))


def narrowed(layer: Any, x: jax.Array, a: jax.Array) -> jax.Array:
    """Return x A: the layer's output dimensions with the rank in the last one's place, in the compute dtype."""
    from stages.core.products import product

    inputs, axes, low = _equation(layer)
    return product(f"{inputs},{axes[:-1]}r->{low}", x, a)


def widen(layer: Any, narrow: jax.Array, arrays: dict[str, jax.Array], *, divided: bool = False) -> jax.Array:
    """Return (alpha / rank) x A B from x A, in the compute dtype.

    The product is of two matrices, so that the gradient of B is one too: from more dimensions XLA would first transpose
    the layer's whole gradient. Where XLA divides those dimensions itself (`divided`), it could not once they are one.
    """
    import jax.numpy as jnp

    from stages.core.products import product

    narrow = narrow * jnp.asarray(layer.lora_alpha / layer.lora_rank, narrow.dtype)
    b = arrays["lora_kernel_b"]
    if divided:
        _, axes, low = _equation(layer)
        return product(f"{low},r{axes[-1]}->{layer.equation.split('->')[1]}", narrow, b)
    wide = product("nr,rh->nh", narrow.reshape(-1, narrow.shape[-1]), b)
    return wide.reshape(*narrow.shape[:-1], b.shape[-1])


def _equation(layer: Any) -> tuple[str, str, str]:
    """Return the axes of the input, of the kernel, and of x A: there `r`, free in Gemma's equations, is the rank."""
    operands, result = layer.equation.split("->")
    inputs, axes = operands.split(",")
    return inputs, axes, result.replace(axes[-1], "r")
