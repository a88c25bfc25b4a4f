"""The named layouts: `auto` for every Gemma and mesh, `tutorial`, and rules written out by the person.

Purpose: which dimension of which weight goes over the mesh's `model` axis, with a reason where it is not the usual one.

Weight paths and shapes of a block (N query heads, K key/value heads, D hidden, H head, F feed-forward):
    token_embedding/embeddings                    (vocabulary, D)
    decoder_block_*/attention/query/kernel        (N, D, H)
    decoder_block_*/attention/(key|value)/kernel  (K, D, H)
    decoder_block_*/attention/attention_output/kernel (N, H, D)
    decoder_block_*/(ffw_gating|ffw_gating_2)/kernel  (D, F)
    decoder_block_*/ffw_linear/kernel             (F, D)
    .../<kernel's layer>/lora_kernel_a, lora_kernel_b
    decoder_block_*/.../scale, final_normalization/scale  replicated: a few thousand bytes each
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from stages.core.config.schema import Layout
from stages.core.presets.architecture import Architecture
from stages.core.records.layout import Fallback, MeshShape, NamedLayout, Rule, Spec
from stages.core.sharding.layout import Placement, as_spec, replicated_fraction, resolve

# Sizes of the model axis that a message lists at the most.
AXES_TOLD = 6
BLOCK = r"decoder_block_\d+"


def make_layout(settings: Layout, architecture: Architecture, mesh: MeshShape) -> NamedLayout:
    """Return the layout that `params.yaml` asks for.

    Args:
        settings: the section `layout`.
        architecture: the backbone's class and arguments.
        mesh: the mesh's axis names and sizes.
    """
    if settings.name == "rules":
        rules = [Rule(rule.pattern, as_spec(rule.spec)) for rule in settings.rules or ()]
        return NamedLayout("rules", tuple(rules))
    return tutorial() if settings.name == "tutorial" else auto(architecture, mesh)


def replication_advice(
    settings: Layout, architecture: Architecture, placements: Sequence[Placement], mesh: MeshShape
) -> Callable[[], str] | None:
    """Return what `check_replication` tells to do: for `auto` the model axes that split these weights far enough.

    They are told in falling order, from the largest that the mesh has devices for; None for another layout.
    """
    if settings.name != "auto":
        return None

    def fits(size: int) -> bool:
        trial = MeshShape((1, size), mesh.axis_names)
        found = resolve(auto(architecture, trial).rules, [each.weight for each in placements], trial)
        return replicated_fraction(found, trial) <= settings.max_replicated_fraction

    def advice() -> str:
        sizes = itertools.islice(filter(fits, range(mesh.devices, 0, -1)), AXES_TOLD)
        return f"Set the model axis of mesh.shape to one that divides this model: {', '.join(map(str, sizes))}"

    return advice


def tutorial() -> NamedLayout:
    """Return the rules of "Distributed tuning with Gemma using Keras", letter by letter but for the anchoring.

    Source: the code cell of https://ai.google.dev/gemma/docs/core/distributed_tuning. LoRA kernels match none of them
    and are replicated, as in the tutorial.
    """
    return NamedLayout(
        "tutorial",
        (
            Rule("token_embedding/embeddings", ("model", None)),
            Rule("decoder_block.*attention.*(query|key|value)/kernel", ("model", None, None)),
            Rule("decoder_block.*attention_output/kernel", ("model", None, None)),
            Rule("decoder_block.*ffw_gating.*/kernel", (None, "model")),
            Rule("decoder_block.*ffw_linear/kernel", ("model", None)),
        ),
    )


def auto(architecture: Architecture, mesh: MeshShape) -> NamedLayout:
    """Return a valid layout for any Gemma on any mesh.

    Attention and feed-forward kernels are split as in Megatron-LM (https://arxiv.org/abs/1909.08053): the first of a
    pair over its output, the second over its input, so that a block needs one sum forward and one backward for each
    pair. Heads are the natural unit. Where the axis does not divide them, a kernel is split inside its heads
    (head_dim): nothing is replicated, and the projections' outputs (never the weights) are gathered once. Splitting
    the hidden dimension instead would sum whole activations in the forward pass, twice the bytes on the wire.
    """
    size = mesh.sizes["model"]
    if size == 1:
        return NamedLayout("auto", ())
    config = architecture.config
    rules: list[Rule] = []
    fallbacks: list[Fallback] = []

    def rule(pattern: str, spec: Spec) -> None:
        rules.append(Rule(pattern, spec, optional=True))

    def first_that_divides(pattern: str, unit: str, choices: Sequence[tuple[str, int, Spec]]) -> Spec:
        """Pick the first choice (dimension name, size, spec) that the axis divides; anything but the first is told."""
        for place, (name, length, spec) in enumerate(choices):
            if length % size == 0:
                if place:
                    fallbacks.append(
                        Fallback(pattern, unit, name, f"{size} devices do not divide {choices[0][1]} {unit}")
                    )
                return spec
        fallbacks.append(
            Fallback(
                pattern,
                unit,
                "replicated",
                f"{size} devices divide no dimension of {[length for _, length, _ in choices]}",
            )
        )
        return (None,) * len(choices[0][2])

    vocabulary, hidden = config["vocabulary_size"], config["hidden_dim"]
    heads, kv_heads, head = config["num_query_heads"], config["num_key_value_heads"], config["head_dim"]
    # GemmaBackbone counts both gate matrices in intermediate_dim, Gemma3Backbone counts one.
    ffw = config["intermediate_dim"] // (2 if architecture.class_name == "GemmaBackbone" else 1)
    rule(
        "token_embedding/embeddings",
        first_that_divides(
            "token_embedding/embeddings",
            "vocabulary rows",
            [("vocabulary rows", vocabulary, ("model", None)), ("hidden_dim", hidden, (None, "model"))],
        ),
    )
    for layers, count, unit in (("query", heads, "query heads"), ("(key|value)", kv_heads, "key/value heads")):
        path = f"{BLOCK}/attention/{layers}"
        spec = first_that_divides(
            f"{path}/kernel",
            unit,
            [
                (unit, count, ("model", None, None)),
                ("head_dim", head, (None, None, "model")),
                ("hidden_dim", hidden, (None, "model", None)),
            ],
        )
        rule(f"{path}/kernel", spec)
        # A (heads, D, rank) and B (rank, head_dim) follow the kernel; what is left is a few kilobytes a layer.
        rule(f"{path}/lora_kernel_a", (spec[0], spec[1], None))
        rule(f"{path}/lora_kernel_b", (None, spec[2]))
    path = f"{BLOCK}/attention/attention_output"
    spec = first_that_divides(
        f"{path}/kernel",
        "query heads",
        [
            ("query heads", heads, ("model", None, None)),
            ("head_dim", head, (None, "model", None)),
            ("hidden_dim", hidden, (None, None, "model")),
        ],
    )
    rule(f"{path}/kernel", spec)
    rule(f"{path}/lora_kernel_a", (spec[0], spec[1], None))
    rule(f"{path}/lora_kernel_b", (None, spec[2]))
    for layers, choices in (
        ("(ffw_gating|ffw_gating_2)", [("ffw units", ffw, (None, "model")), ("hidden_dim", hidden, ("model", None))]),
        ("ffw_linear", [("ffw units", ffw, ("model", None)), ("hidden_dim", hidden, (None, "model"))]),
    ):
        path = f"{BLOCK}/{layers}"
        spec = first_that_divides(f"{path}/kernel", "ffw units", choices)
        rule(f"{path}/kernel", spec)
        rule(f"{path}/lora_kernel_a", (spec[0], None))
        rule(f"{path}/lora_kernel_b", (None, spec[1]))
    return NamedLayout("auto", tuple(rules), tuple(fallbacks))
