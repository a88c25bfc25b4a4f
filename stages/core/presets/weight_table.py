"""Where each of a Gemma's weights is stored, in every format: one row per weight, one column per format."""

from __future__ import annotations

from typing import NamedTuple

from stages.core.presets.architecture import Architecture
from stages.core.presets.layer_kinds import LayerKind

# Of each block: path below the block, shape, kind (see `StoredWeight`), and the names in the three formats.
SCALAR = ("layer_scalar", "", "scalar", "", "layer_output_scale", "layer_scalar")
BLOCK = [
    ("pre_attention_norm/scale", "hidden", "scale", "pre_attention_norm", "attn_norm", "input_layernorm"),
    (
        *("post_attention_norm/scale", "hidden", "scale"),
        *("post_attention_norm", "post_attention_norm", "post_attention_layernorm"),
    ),
    ("attention/query/kernel", "heads hidden head", "heads_out", "attention/query_dense", "attn_q", "self_attn.q_proj"),
    ("attention/key/kernel", "keys hidden head", "heads_out", "attention/key_dense", "attn_k", "self_attn.k_proj"),
    ("attention/value/kernel", "keys hidden head", "heads_out", "attention/value_dense", "attn_v", "self_attn.v_proj"),
    ("attention/query_norm/scale", "head", "scale", "attention/query_norm", "attn_q_norm", "self_attn.q_norm"),
    ("attention/key_norm/scale", "head", "scale", "attention/key_norm", "attn_k_norm", "self_attn.k_norm"),
    (
        *("attention/attention_output/kernel", "heads head hidden", "heads_in"),
        *("attention/output_dense", "attn_output", "self_attn.o_proj"),
    ),
    ("pre_ffw_norm/scale", "hidden", "scale", "pre_ffw_norm", "ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm/scale", "hidden", "scale", "post_ffw_norm", "post_ffw_norm", "post_feedforward_layernorm"),
    ("ffw_gating/kernel", "hidden wide", "transposed", "gating_ffw", "ffn_gate", "mlp.gate_proj"),
    ("ffw_gating_2/kernel", "hidden wide", "transposed", "gating_ffw_2", "ffn_up", "mlp.up_proj"),
    ("ffw_linear/kernel", "wide hidden", "transposed", "ffw_linear", "ffn_down", "mlp.down_proj"),
]
# The same of a block's experts, beside which the dense feed-forward's output has a norm of its own. A Hugging Face file
# has the gates and the other matrices that take hidden states one below the other in one tensor.
EXPERTS = [
    ("pre_ffw_norm_moe/scale", "hidden", "scale", "pre_ffw_norm_moe", "pre_ffw_norm_2", "pre_feedforward_layernorm_2"),
    (
        *("post_ffw_norm_dense/scale", "hidden", "scale"),
        *("post_ffw_norm_dense", "post_ffw_norm_1", "post_feedforward_layernorm_1"),
    ),
    (
        *("post_ffw_norm_moe_path/scale", "hidden", "scale"),
        *("post_ffw_norm_moe_path", "post_ffw_norm_2", "post_feedforward_layernorm_2"),
    ),
    ("moe_router/per_dim_scale", "hidden", "vector", "moe_router", "ffn_gate_inp.scale", "router.scale"),
    ("moe_router/proj/kernel", "hidden experts", "transposed", "moe_router/proj", "ffn_gate_inp", "router.proj"),
    (
        *("moe_expert_bank/gate_proj", "experts hidden narrow", "experts_gate"),
        *("moe_expert_bank/vars/0", "ffn_gate_up_exps", "experts.gate_up_proj"),
    ),
    (
        *("moe_expert_bank/up_proj", "experts hidden narrow", "experts_up"),
        *("moe_expert_bank/vars/1", "ffn_gate_up_exps", "experts.gate_up_proj"),
    ),
    (
        *("moe_expert_bank/down_proj", "experts narrow hidden", "experts"),
        *("moe_expert_bank/vars/2", "ffn_down_exps", "experts.down_proj"),
    ),
    (
        *("moe_expert_bank/per_expert_scale", "experts", "vector"),
        *("moe_expert_bank/vars/3", "ffn_down_exps.scale", "router.per_expert_scale"),
    ),
]
WITHOUT_SUFFIX = (
    "layer_scalar",
    "router.scale",
    "router.per_expert_scale",
    "experts.gate_up_proj",
    "experts.down_proj",
)
"""Names in a Hugging Face file that do not end in `.weight`."""
# What a block does with its own part of a token's embedding (`model/layer_embeddings.py`), and whence it is.
LAYER_INPUT = [
    (
        "per_layer_input_gate/kernel",
        "hidden input",
        "transposed",
        "per_layer_input_gate",
        "inp_gate",
        "per_layer_input_gate",
    ),
    ("per_layer_up_proj/kernel", "input hidden", "transposed", "per_layer_up_proj", "proj", "per_layer_projection"),
    (
        *("post_per_layer_input_norm/scale", "hidden", "scale"),
        *("post_per_layer_input_norm", "post_norm", "post_per_layer_input_norm"),
    ),
]
LAYER_TABLE = "per_layer_token_embedding/embeddings"


class StoredWeight(NamedTuple):
    """A weight of the model, and its name in each format.

    Attributes:
        shape: keras-hub's.
        kind: how it relates to the tensor in GGUF and Hugging Face files, where a linear layer is a matrix
            outputs x inputs: `scale`, `vector` and `rows` are the same (but for the one that GGUF files add to a
            `scale`), `scalar` is a vector of one number, `transposed` is the transposed matrix, `heads_out` (heads,
            inputs, head size) has heads one after the other in the matrix's outputs, and `heads_in` (heads, head size,
            outputs) in its inputs. `experts` (experts, inputs, outputs) is a transposed matrix an expert, and
            `experts_gate` and `experts_up` are the first and second half of the outputs of such a tensor.
        keras: the dataset in a weights file; Keras names layers by their classes and counts them.
        gguf: the tensor in a GGUF file.
        hugging_face: the tensor in a Hugging Face folder, without what its name begins with there.
    """

    shape: tuple[int, ...]
    kind: str
    keras: str
    gguf: str
    hugging_face: str

    @property
    def is_matrix(self) -> bool:
        """Whether it is the kernel of a linear layer."""
        return self.kind in ("transposed", "heads_out", "heads_in")

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, as PyTorch states it."""
        if self.kind == "scalar":
            return (1,)
        if self.kind.startswith("experts"):
            experts, inputs, outputs = self.shape
            return (experts, outputs if self.kind == "experts" else 2 * outputs, inputs)
        if self.kind == "heads_out":
            heads, hidden, head = self.shape
            return (heads * head, hidden)
        if self.kind == "heads_in":
            heads, head, hidden = self.shape
            return (hidden, heads * head)
        return self.shape[::-1] if self.kind == "transposed" else self.shape


def weight_table(architecture: Architecture) -> dict[str, StoredWeight]:
    """Return a model's weights by keras-hub's path, in the order of `backbone.weights`."""
    config, family = architecture.config, architecture.family
    hidden = config["hidden_dim"]
    vector = "scale" if family.scale_from_one else "vector"
    # A Gemma has one other norm; despite its name it comes before the feed-forward layers.
    posts = architecture.kinds[0].post_attention_norm
    renamed = {} if posts else {"pre_feedforward_layernorm": "post_attention_layernorm"}
    found = {
        "token_embedding/embeddings": StoredWeight(
            (config["vocabulary_size"], hidden),
            *("rows", "layers/reversible_embedding/vars/0", "token_embd.weight", "embed_tokens.weight"),
        )
    }
    inputs = architecture.kinds[0].layer_input
    if inputs:
        found |= _layer_embeddings(config["vocabulary_size"], hidden, config["num_layers"] * inputs, inputs)
    for number, layer_kind in enumerate(architecture.kinds):
        layer = f"layers/{family.block}{f'_{number}' if number else ''}"
        sizes = _sizes(architecture, layer_kind)
        for path, shape, kind, keras, gguf, hugging_face in _rows(layer_kind):
            name = f"layers.{number}.{renamed.get(hugging_face, hugging_face)}"
            found[f"decoder_block_{number}/{path}"] = StoredWeight(
                tuple(sizes[axis] for axis in shape.split()),
                vector if kind == "scale" else kind,
                "/".join(part for part in (layer, keras, "" if "/vars/" in keras else "vars/0") if part),
                f"blk.{number}.{gguf}" if "." in gguf else f"blk.{number}.{gguf}.weight",
                name if hugging_face in WITHOUT_SUFFIX else f"{name}.weight",
            )
    found["final_normalization/scale"] = StoredWeight(
        (hidden,),
        *(vector, f"layers/rms_normalization{'_1' if inputs else ''}/vars/0", "output_norm.weight", "norm.weight"),
    )
    return found


def _layer_embeddings(vocabulary: int, hidden: int, columns: int, inputs: int) -> dict[str, StoredWeight]:
    """Return the weights that a token's numbers for each block are made of."""
    name = "per_layer_model_projection"
    return {
        LAYER_TABLE: StoredWeight(
            (vocabulary, columns),
            *("rows", "layers/embedding/vars/0", "per_layer_token_embd.weight", "embed_tokens_per_layer.weight"),
        ),
        f"{name}/kernel": StoredWeight(
            (hidden, columns), *("transposed", "layers/dense/vars/0", "per_layer_model_proj.weight", f"{name}.weight")
        ),
        "per_layer_projection_norm/scale": StoredWeight(
            (inputs,),
            *("vector", "layers/rms_normalization/vars/0", "per_layer_proj_norm.weight"),
            "per_layer_projection_norm.weight",
        ),
    }


def of_vault(hugging_face: str) -> str:
    """Return what a VaultGemma's files call a tensor that a Gemma's call so; both have as many norms."""
    return hugging_face.replace("post_attention_layernorm", "pre_feedforward_layernorm")


def unread_of_sharing(architecture: Architecture) -> set[str]:
    """Return Hugging Face's names of what files may have of blocks that share keys and values, and is never used."""
    numbers = [number for number, kind in enumerate(architecture.kinds) if kind.keys_of is not None]
    return {f"layers.{number}.self_attn.{name}.weight" for number in numbers for name in ("k_proj", "v_proj", "k_norm")}


def _sizes(architecture: Architecture, kind: LayerKind) -> dict[str, int]:
    """Return the lengths of the axes of a block's weights."""
    return {
        "hidden": architecture.config["hidden_dim"],
        "head": kind.head,
        "heads": kind.query_heads,
        "keys": kind.key_heads,
        "wide": kind.ffw,
        "input": kind.layer_input,
        **({"experts": kind.experts.count, "narrow": kind.experts.width} if kind.experts else {}),
    }


def _rows(kind: LayerKind) -> list[tuple[str, str, str, str, str, str]]:
    """Return the rows of `BLOCK` that a kind of block has, in the order of keras-hub's layers."""
    there = {
        "post_attention_norm/scale": kind.post_attention_norm,
        "post_ffw_norm/scale": kind.post_ffw_norm,
        "attention/query_norm/scale": kind.query_key_norm,
        "attention/key_norm/scale": kind.query_key_norm and kind.keys_of is None,
        "attention/key/kernel": kind.keys_of is None,
        "attention/value/kernel": not kind.keys_are_values and kind.keys_of is None,
    }
    rows = [row for row in BLOCK if there.get(row[0], True)]
    if kind.experts:
        rows += EXPERTS
    if kind.layer_input:
        rows += LAYER_INPUT
    if kind.scaled:
        rows.insert(0, SCALAR)
    if kind.value_norm and kind.keys_of is None:
        # keras-hub's Gemma 4 makes the norms of keys and values first.
        place = next(number for number, row in enumerate(rows) if row[0] == "attention/query_norm/scale")
        rows[place : place + 2] = rows[place + 1], rows[place]
    return rows
