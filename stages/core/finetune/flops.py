"""Arithmetic of a training step, and this machine's matrix product rate, for the model flops utilization.

Purpose: a share of the machine's peak is comparable between machines; seconds are not.
"""

from __future__ import annotations

import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import keras

from stages.core.presets.architecture import of_backbone

# A product of two square float32 matrices of this size: large enough to run at full speed, 17 GFLOP.
MATRIX = 2048
PRODUCTS = 3


def step_flops(backbone: keras.Model, batch: int, length: int) -> int:
    """Return the model flops of a training step.

    Model flops count the matrix products of the mathematics, a multiplication and an addition as 2; recomputation is
    not counted (PaLM, appendix B: https://arxiv.org/abs/2204.02311). A token takes:

    - each weight that a product touches: 2 forward, 2 for the gradient in its input, and 2 more for its own gradient
      unless it is frozen. The embedding table is touched once, as the output head. A LoRA kernel B on queries, keys and
      values serves every head.
    - experts: those that it is sent to, of their number.
    - attention: 4 x length x heads x head dimension a block forward (scores and mixing, over the whole square, as
      there), and twice that backward.

    A table of numbers for each block is looked up, never multiplied. What is made of the token embeddings beside it has
    no gradient in its input unless these are trained.

    Args:
        backbone: with its adapter, frozen as it is trained.
        batch: sequences per step, without padding of the batch.
        length: tokens per sequence.
    """
    tokens, kinds = batch * length, of_backbone(backbone).kinds
    experts = kinds[0].experts
    shapes = {variable.path: variable.shape for variable in backbone.variables}
    a_token = 0
    for variable in backbone.variables:
        layer, _, name = variable.path.rpartition("/")
        forward_and_back = 6 if variable.trainable else 4
        if experts and name in ("gate_proj", "up_proj", "down_proj"):
            a_token += forward_and_back * math.prod(variable.shape) // experts.count * experts.chosen
        if name not in ("kernel", "embeddings", "lora_kernel_a", "lora_kernel_b"):
            continue
        # Looked up, as the token table would be were it not the head too.
        if layer == "per_layer_token_embedding":
            continue
        times = 1
        if name == "lora_kernel_b" and layer.endswith(("query", "key", "value")):
            times = shapes[f"{layer}/kernel"][0]
        if layer == "per_layer_model_projection" and not variable.trainable:
            forward_and_back = 2
        a_token += forward_and_back * times * math.prod(variable.shape)
    attention = 12 * length * sum(kind.query_heads * kind.head for kind in kinds)
    return tokens * (a_token + attention)


@functools.cache
def matrix_product_rate() -> float:
    """Return the flops per second of this machine's float32 matrix product: the median of a few on one device.

    Simulated devices share the machine's cores, so one of them can use all. Takes half a second on two cores, once.
    """
    matrix = jax.device_put(jnp.full((MATRIX, MATRIX), 1.0 / MATRIX, jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * MATRIX**3 / statistics.median(seconds)
