"""LoRA on keras-hub's layers, applied as x A B.

Purpose: Keras' own `EinsumDense` forms W + AB in full, forward and backward, for every layer and step; x A B costs
rank / output of that. Source of the method: https://arxiv.org/abs/2106.09685. The kernels are those of
`load/lora_kernels.py`. A model that is only read from now on, a token at a time, does without even that: `merge`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras

from stages.core.model.codes import values_of
from stages.core.model.products import few_rows, gathered, gathered_product, product
from stages.core.sharding.keras_internals import equation_of, kernel_of, layers_within, set_value

# A layer's variables with which the codes of its kernel become values.
BESIDE_CODES = ("kernel_scale", "kernel_offset")
# Drops out part of what goes into the adapter of the layer with a path.
Dropout = Callable[["jax.Array", str], "jax.Array"]


def project(layer: Any, x: jax.Array, dropout: Dropout | None = None, *, divided: bool = False) -> jax.Array:
    """Apply an `EinsumDense` layer without bias, with its adapter if it has one.

    Args:
        layer: one of Gemma's projections; its equation is such as `btd,ndh->btnh`.
        x: the activation, in the compute dtype.
        dropout: applied to the adapter's input only; called with the layer's path.
        divided: whether XLA is to divide the output's dimensions over devices, see `widen`.

    Returns:
        x W + (alpha / rank) x A B, in the compute dtype.
    """
    return apply(layer, x, arrays_of(layer), dropout, divided=divided)


def arrays_of(layer: Any) -> dict[str, jax.Array]:
    """Return the layer's kernel, and what goes with codes and LoRA kernels if it has them, each in the dtype it is
    kept in.
    """
    arrays = {"kernel": kernel_of(layer)}
    arrays |= {name: each for name in BESIDE_CODES if (each := getattr(layer, name, None)) is not None}
    if layer.lora_enabled:
        arrays |= {"lora_kernel_a": layer.lora_kernel_a, "lora_kernel_b": layer.lora_kernel_b}
    return {name: variable.value for name, variable in arrays.items()}


def in_codes(layer: Any) -> bool:
    """Return whether the layer's kernel is of codes, with scales beside it."""
    return getattr(layer, BESIDE_CODES[0], None) is not None


@dataclass(frozen=True)
class Gathering:
    """A kernel of which each device of the batch axis has a part: in which dimension, and `again` of `products`."""

    dimension: int
    again: bool


def apply(
    layer: Any,
    x: jax.Array,
    arrays: dict[str, jax.Array],
    dropout: Dropout | None = None,
    *,
    divided: bool = False,
    gathering: Gathering | None = None,
) -> jax.Array:
    """Do what `project` does with the layer's arrays, or a device's parts of them, given."""
    y = base(layer, x, arrays, divided=divided, gathering=gathering)
    if "lora_kernel_a" not in arrays:
        return y
    into = x if dropout is None else dropout(x, layer.path)
    return y + widen(layer, narrowed(layer, into, arrays["lora_kernel_a"]), arrays, divided=divided)


def base(
    layer: Any,
    x: jax.Array,
    arrays: dict[str, jax.Array],
    *,
    divided: bool = False,
    gathering: Gathering | None = None,
) -> jax.Array:
    """Return x W, in the compute dtype; `divided` as for `widen`, and a kernel that is to be gathered as that says."""
    kernel = arrays["kernel"]
    if "kernel_scale" in arrays:
        # The backward pass converts the codes anew: it would keep all of them in the compute dtype, the whole model.
        codes = {name: arrays[name] for name in ("kernel", *BESIDE_CODES) if name in arrays}
        return jax.checkpoint(functools.partial(_base_of_codes, layer, divided))(x, codes)
    if gathering and x.shape[1] > 1:
        return gathered_product(equation_of(layer), x, kernel, gathering.dimension, again=gathering.again)
    if gathering:
        kernel = gathered(kernel, gathering.dimension, x.dtype)
    if x.shape[1] == 1 and not divided:
        return _of_one_token(layer, x, kernel.astype(x.dtype))
    # A frozen kernel has no gradient, for which x would be kept.
    return product(equation_of(layer), x, kernel if kernel_of(layer).trainable else kernel.astype(x.dtype))


def _base_of_codes(layer: Any, divided: bool, x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
    """Return x W of a frozen kernel of codes, in the compute dtype.

    With a scale for each channel that is (x codes) scale, scaled in float32; of groups the values are made first.
    """
    codes, scale = arrays["kernel"], arrays["kernel_scale"]
    grouped = "kernel_offset" in arrays
    kernel = values_of(codes, scale, arrays["kernel_offset"], x.dtype) if grouped else codes.astype(x.dtype)
    one_token = x.shape[1] == 1 and not divided
    y = _of_one_token(layer, x, kernel) if one_token else jnp.einsum(equation_of(layer), x, kernel)
    if grouped:
        return y
    # A scale for each output, which are the kernel's dimensions that are not summed over, in their order.
    _, axes, _ = _equation(layer)
    result = equation_of(layer).split("->")[1]
    outputs = [size for axis, size in zip(axes, codes.shape, strict=True) if axis in result]
    return (y.astype(jnp.float32) * scale.reshape(outputs)).astype(x.dtype)


def _of_one_token(layer: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x W for one token a row, without a gradient of W, as products that take W in its own order.

    From the equation itself, XLA on the CPU copies W with its dimensions in another order, for every token.
    """
    rows = x.reshape(x.shape[0], -1)
    if kernel.ndim == 2 or x.ndim == 4:
        return few_rows(rows, kernel.reshape(-1, kernel.shape[-1]))[:, None]
    if kernel.shape[0] == 1:
        return few_rows(rows, kernel[0])[:, None, None]
    alike = jnp.broadcast_to(rows, (kernel.shape[0], *rows.shape))
    return jnp.swapaxes(jax.lax.dot_general(alike, kernel, (((2,), (1,)), ((0,), (0,)))), 0, 1)[:, None]


def narrowed(layer: Any, x: jax.Array, a: jax.Array) -> jax.Array:
    """Return x A: the layer's output dimensions with the rank in the last one's place, in the compute dtype."""
    inputs, axes, low = _equation(layer)
    return product(f"{inputs},{axes[:-1]}r->{low}", x, a)


def widen(layer: Any, narrow: jax.Array, arrays: dict[str, jax.Array], *, divided: bool = False) -> jax.Array:
    """Return (alpha / rank) x A B from x A, in the compute dtype.

    The product is of two matrices, so that the gradient of B is one too: from more dimensions XLA would first transpose
    the layer's whole gradient. Where XLA divides those dimensions itself (`divided`), it could not once they are one.
    """
    narrow = narrow * jnp.asarray(layer.lora_alpha / layer.lora_rank, narrow.dtype)
    b = arrays["lora_kernel_b"]
    if divided:
        _, axes, low = _equation(layer)
        return product(f"{low},r{axes[-1]}->{equation_of(layer).split('->')[1]}", narrow, b)
    wide = product("nr,rh->nh", narrow.reshape(-1, narrow.shape[-1]), b)
    return wide.reshape(*narrow.shape[:-1], b.shape[-1])


def merge(backbone: keras.Model) -> None:
    """Add each adapter to its layer's kernel, on the devices and split as the kernel is, and switch the adapters off.

    From then on a projection costs what the base's does. The sum is computed in float32 and rounded to the kernel's
    dtype, as Keras' own `kernel` is. Beside a kernel of codes, which would round the change away, an adapter stays.

    Args:
        backbone: loaded; without an adapter it stays as it is.
    """
    set_aside(backbone)()


def set_aside(backbone: keras.Model, *, keep_base: bool = False) -> Callable[[], None]:
    """Switch the adapters off, which leaves the base, and return what adds them to their kernels: `merge` in two steps.

    Args:
        backbone: loaded.
        keep_base: whether the base's kernels are still needed by someone who holds them; else their memory is reused.
    """
    layers = [layer for layer in _adapted(backbone) if not in_codes(layer)]
    groups = [arrays_of(layer) for layer in layers]
    kernels = [each.pop("kernel") for each in groups]
    scales = tuple(layer.lora_alpha / layer.lora_rank for layer in layers)
    for layer in layers:
        layer.lora_enabled = False

    def add() -> None:
        if not layers:
            return
        # One program for all layers: it is compiled, and kept, once.
        run = jax.jit(
            functools.partial(_merged, scales),
            donate_argnums=() if keep_base else (0,),
            out_shardings=[kernel.sharding for kernel in kernels],
        )
        for layer, kernel in zip(layers, run(kernels, groups), strict=True):
            set_value(kernel_of(layer), kernel)

    return add


def values_of_base(backbone: keras.Model) -> list[jax.Array]:
    """Return the values of all variables with which the model is the base, once its adapters are set aside.

    Where an adapter stays beside its kernel, which is of codes, they have zeros for its B.
    """
    beside = {layer.lora_kernel_b.path for layer in _adapted(backbone) if in_codes(layer)}

    def value(variable: keras.Variable) -> jax.Array:
        held = variable.value
        return jax.device_put(jnp.zeros(held.shape, held.dtype), held.sharding) if variable.path in beside else held

    return [value(variable) for variable in backbone.variables]


def _adapted(backbone: keras.Model) -> list[Any]:
    """Return the layers with an adapter."""
    return [layer for layer in layers_within(backbone) if getattr(layer, "lora_enabled", False)]


def _merged(scales: tuple[float, ...], kernels: list[jax.Array], groups: list[dict[str, jax.Array]]) -> list[jax.Array]:
    """Return W + scale A B of each layer."""

    def merged(scale: float, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        change = jnp.matmul(a, b, preferred_element_type=jnp.float32)
        return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)

    pairs = [(each["lora_kernel_a"], each["lora_kernel_b"]) for each in groups]
    return [merged(scale, kernel, *pair) for scale, kernel, pair in zip(scales, kernels, pairs, strict=True)]


def _equation(layer: Any) -> tuple[str, str, str]:
    """Return the axes of the input, of the kernel, and of x A: there `r`, free in Gemma's equations, is the rank."""
    operands, result = equation_of(layer).split("->")
    inputs, axes = operands.split(",")
    return inputs, axes, result.replace(axes[-1], "r")
