"""The named layouts: `auto` for every Gemma and mesh, `tutorial`, and rules written out by the user.

Purpose: which dimension of which weight goes over the mesh's `model` axis, with a reason where it is not the usual one.

Weight paths and shapes of a block (N query heads, K key/value heads, D hidden, H head, F feed-forward); N, K, H and F
are those of the block's kind. Of Gemma 4's small sizes each token has P numbers for each of L blocks:
    token_embedding/embeddings                    (vocabulary, D)
    per_layer_token_embedding/embeddings          (vocabulary, L P)
    per_layer_model_projection/kernel             (D, L P)
    decoder_block_*/attention/query/kernel        (N, D, H)
    decoder_block_*/attention/(key|value)/kernel  (K, D, H)
    decoder_block_*/attention/attention_output/kernel (N, H, D)
    decoder_block_*/(ffw_gating|ffw_gating_2)/kernel  (D, F)
    decoder_block_*/ffw_linear/kernel             (F, D)
    decoder_block_*/moe_expert_bank/(gate|up)_proj    (experts, D, an expert's F), down_proj (experts, its F, D)
    decoder_block_*/per_layer_input_gate/kernel   (D, P)
    decoder_block_*/per_layer_up_proj/kernel      (P, D)
    .../<kernel's layer>/lora_kernel_a, lora_kernel_b
    decoder_block_*/.../scale, decoder_block_*/layer_scalar, final_normalization/scale  replicated: a few thousand bytes
    decoder_block_*/moe_router/...                    replicated: every device chooses the experts of its own tokens
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from stages.core.config.schema import Layout
from stages.core.presets.architecture import Architecture
from stages.core.presets.layer_kinds import Experts, LayerKind
from stages.core.records.layout import Fallback, MeshShape, NamedLayout, Rule, Spec
from stages.core.sharding.layout import Placement, as_spec, replicated_fraction, resolve

# Sizes of the model axis that a message lists at the most.
AXES_TOLD = 6
BLOCK = r"decoder_block_\d+"
# A dimension that can be split: its name, its length, and the spec that splits it.
Choice = tuple[str, int, Spec]


def make_layout(settings: Layout, architecture: Architecture, mesh: MeshShape) -> NamedLayout:
    """Return the layout that `params.yaml` asks for.

    Args:
        settings: the section `layout`.
        architecture: the backbone's class and arguments.
        mesh: the mesh's axis names and sizes.
    """
    if settings.name == "rules":
        rules = [Rule(rule.pattern, as_spec(rule.spec)) for rule in settings.rules or ()]
        named = NamedLayout("rules", tuple(rules))
    else:
        named = tutorial() if settings.name == "tutorial" else auto(architecture, mesh)
    return dataclasses.replace(named, shard_over_batch=settings.shard_over_batch)


def replication_advice(
    settings: Layout, architecture: Architecture, placements: Sequence[Placement], mesh: MeshShape
) -> Callable[[], str] | None:
    """Return the advice of `check_replication`: for `auto` the model axes that split these weights far enough.

    In falling order, from the largest that the mesh has devices for; None for another layout.
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
    rules: list[Rule] = []
    fallbacks: list[Fallback] = []

    def split(pattern: str, choices: Sequence[Choice]) -> Spec:
        spec, fallback = _first_that_divides(size, pattern, choices)
        rules.append(Rule(pattern, spec, optional=True))
        fallbacks.extend(fallback)
        return spec

    config = architecture.config
    rows, hidden = config["vocabulary_size"], config["hidden_dim"]
    split(
        "token_embedding/embeddings",
        [("vocabulary rows", rows, ("model", None)), ("hidden_dim", hidden, (None, "model"))],
    )
    if inputs := architecture.kinds[0].layer_input:
        columns = ("numbers of all blocks", config["num_layers"] * inputs, (None, "model"))
        split(
            "per_layer_token_embedding/embeddings",
            [("vocabulary rows", rows, ("model", None)), columns],
        )
        split("per_layer_model_projection/kernel", [columns, ("hidden_dim", hidden, ("model", None))])
    by_kind = {kind: _choices_within_block(architecture, kind) for kind in architecture.kinds}
    for layers in next(iter(by_kind.values())):
        # Kinds of blocks that are split alike have one rule.
        alike: dict[str, list[LayerKind]] = {}
        for kind, choices in by_kind.items():
            alike.setdefault(repr(_first_that_divides(size, "", choices[layers])), []).append(kind)
        for kinds in alike.values():
            blocks = _pattern(architecture, kinds) if len(alike) > 1 else BLOCK
            spec = split(f"{blocks}/{layers}/kernel", by_kind[kinds[0]][layers])
            # A (heads, D, rank) and B (rank, head_dim) follow the kernel; what is left is a few kilobytes a layer.
            rules.append(Rule(f"{blocks}/{layers}/lora_kernel_a", (*spec[:-1], None), optional=True))
            rules.append(Rule(f"{blocks}/{layers}/lora_kernel_b", (None, spec[-1]), optional=True))
    if experts := architecture.kinds[0].experts:
        for matrices, within in _choices_of_experts(hidden, experts).items():
            split(f"{BLOCK}/moe_expert_bank/{matrices}", within)
    return NamedLayout("auto", tuple(rules), tuple(fallbacks))


def _choices_of_experts(hidden: int, experts: Experts) -> dict[str, list[Choice]]:
    """Return how the matrices of a block's experts could be split; split over `hidden_dim` they are gathered."""
    return {
        "(gate|up)_proj": [
            ("experts", experts.count, ("model", None, None)),
            ("expert units", experts.width, (None, None, "model")),
            ("hidden_dim", hidden, (None, "model", None)),
        ],
        "down_proj": [
            ("experts", experts.count, ("model", None, None)),
            ("expert units", experts.width, (None, "model", None)),
            ("hidden_dim", hidden, (None, None, "model")),
        ],
    }


def _pattern(architecture: Architecture, kinds: Sequence[LayerKind]) -> str:
    """Return a pattern of the names of the blocks of some kinds."""
    numbers = [str(number) for number, kind in enumerate(architecture.kinds) if kind in kinds]
    return f"decoder_block_({'|'.join(numbers)})"


def _choices_within_block(architecture: Architecture, kind: LayerKind) -> dict[str, list[Choice]]:
    """Return how the kernels of a kind of block could be split, the best way first, by their layers."""
    hidden, head, ffw = architecture.config["hidden_dim"], kind.head, kind.ffw

    def inputs(unit: str, count: int) -> list[Choice]:
        return [
            (unit, count, ("model", None, None)),
            ("head_dim", head, (None, None, "model")),
            ("hidden_dim", hidden, (None, "model", None)),
        ]

    own = ("numbers of a block", kind.layer_input)
    of_layer_input: dict[str, list[Choice]] = {
        "per_layer_input_gate": [(*own, (None, "model")), ("hidden_dim", hidden, ("model", None))],
        "per_layer_up_proj": [(*own, ("model", None)), ("hidden_dim", hidden, (None, "model"))],
    }
    return {
        "attention/query": inputs("query heads", kind.query_heads),
        "attention/(key|value)": inputs("key/value heads", kind.key_heads),
        "attention/attention_output": [
            ("query heads", kind.query_heads, ("model", None, None)),
            ("head_dim", head, (None, "model", None)),
            ("hidden_dim", hidden, (None, None, "model")),
        ],
        "(ffw_gating|ffw_gating_2)": [("ffw units", ffw, (None, "model")), ("hidden_dim", hidden, ("model", None))],
        "ffw_linear": [("ffw units", ffw, ("model", None)), ("hidden_dim", hidden, (None, "model"))],
        **(of_layer_input if kind.layer_input else {}),
    }


def _first_that_divides(size: int, pattern: str, choices: Sequence[Choice]) -> tuple[Spec, list[Fallback]]:
    """Return the spec of the first choice that an axis of some size divides, and a fallback for any but the first."""
    unit, count, _ = choices[0]
    for place, (name, length, spec) in enumerate(choices):
        if length % size == 0:
            why = f"{size} devices do not divide {count} {unit}"
            return spec, [Fallback(pattern, unit, name, why)] if place else []
    lengths = [length for _, length, _ in choices]
    why = f"{size} devices divide no dimension of {lengths}"
    return (None,) * len(choices[0][2]), [Fallback(pattern, unit, "replicated", why)]
