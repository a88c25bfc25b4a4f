"""The table of what each block is, held to the layers that keras-hub builds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stages.core.common.errors import StageError
from stages.core.fetch import catalog
from stages.core.load.backbone import build_backbone
from stages.core.presets.architecture import Architecture, of_backbone
from stages.core.presets.layer_kinds import of_blocks, of_both_parts, period
from stages.core.presets.weight_table import weight_table
from tests.support.repository import ROOT
from tests.support.tiny_presets import BACKBONES, CONFIGS, EDGE, EXPERTS

pytestmark = pytest.mark.usefixtures("devices")

UNUSUAL = {
    "gemma": {"use_sliding_window_attention": True, "sliding_window_size": 3, "num_layers": 5},
    "gemma2": {"num_layers": 5, "query_head_dim_normalize": False, "hidden_dim": 80},
    "gemma3": {"num_layers": 7, "use_sliding_window_attention": False, "global_rope_scaling_factor": 4.0},
    "gemma4": {
        "num_layers": 7,
        "layer_types": [("sliding_attention", "full_attention")[number in (0, 3)] for number in range(7)],
        "global_rope_scaling_factor": 2.0,
        "local_rope_scaling_factor": 3.0,
        "local_rope_wavelength": 5000.0,
        "global_rope_partial_rotary_factor": 0.5,
        "num_global_key_value_heads": None,
    },
}


def architectures() -> dict[str, Architecture]:
    found = {name: catalog.architecture(name) for name in catalog.GEMMAS}
    for family, unusual in UNUSUAL.items():
        class_name = BACKBONES.get(family, "GemmaBackbone")
        found[f"tiny {family}"] = Architecture(class_name, CONFIGS[family])
        found[f"unusual {family}"] = Architecture(class_name, {**CONFIGS[family], **unusual})
    for name, edge in EDGE.items():
        found[f"tiny {name}"] = Architecture("Gemma4Backbone", {**CONFIGS["gemma4"], **edge})
    # The first blocks of these share nothing: here are some of both parts.
    for name in ("gemma4_2b", "gemma4_4b"):
        found[f"both parts of {name}"] = Architecture("Gemma4Backbone", of_both_parts(found[name], 6, 6))
    return found | {"with experts": Architecture("Gemma4Backbone", {**CONFIGS["gemma4"], **EXPERTS})}


@pytest.mark.parametrize("name", architectures())
def test_each_block_is_what_keras_hub_makes_of_it(name):
    architecture = architectures()[name]
    small = Architecture(architecture.class_name, of_blocks(architecture, min(12, architecture.config["num_layers"])))
    backbone = build_backbone(small, "float32")
    assert of_backbone(backbone).kinds == small.kinds
    for layer, kind in zip(backbone.transformer_layers, small.kinds, strict=True):
        attention = layer.attention
        shares = getattr(attention, "is_kv_shared_layer", False)
        assert getattr(layer, "kv_shared_layer_index", None) == kind.keys_of and shares == (kind.keys_of is not None)
        kernels = [attention.query_dense.kernel, *([] if shares else [attention.key_dense.kernel])]
        assert [each.shape[0] for each in kernels] == [kind.query_heads, kind.key_heads][: len(kernels)]
        assert {each.shape[2] for each in kernels} == {kind.head}
        assert layer.gating_ffw.kernel.shape[1] == kind.ffw
        assert getattr(layer, "hidden_size_per_layer_input", 0) == kind.layer_input
        window = attention.sliding_window_size if attention.use_sliding_window_attention else None
        rope = attention.rope_layer
        assert (window, rope.max_wavelength, rope.scaling_factor) == (kind.window, kind.wavelength, kind.rope_scaling)
        assert getattr(attention, "rotary_dim", kind.head) == 2 * kind.turned
        assert (attention.value_dense is None) == (kind.keys_are_values or shares)
        assert getattr(layer, "use_post_ffw_norm", True) == kind.post_ffw_norm
        assert getattr(layer, "use_post_attention_norm", True) == kind.post_attention_norm
        assert hasattr(attention, "query_norm") == kind.query_key_norm
        assert hasattr(attention, "value_norm") == kind.value_norm
        assert hasattr(layer, "layer_scalar") == kind.scaled
        assert hasattr(layer, "moe_router") == (kind.experts is not None)
        if kind.experts:
            bank, router = layer.moe_expert_bank, layer.moe_router
            wanted = (kind.experts.count, kind.experts.width, kind.experts.chosen)
            assert (bank.num_experts, bank.expert_intermediate_dim, router.num_experts_per_token) == wanted


@pytest.mark.parametrize("name", architectures())
def test_the_table_of_weights_has_their_paths_shapes_and_order(name):
    architecture = architectures()[name]
    small = Architecture(architecture.class_name, of_blocks(architecture, min(7, architecture.config["num_layers"])))
    declared = {weight.path: tuple(weight.shape) for weight in build_backbone(small, "float32").weights}
    assert list({path: each.shape for path, each in weight_table(small).items()}.items()) == list(declared.items())


def test_shapes_repeat_every_six_blocks_of_gemma_4_and_in_every_block_of_the_others():
    assert {name: period(catalog.architecture(name), 512) for name in catalog.GEMMAS} == {
        **dict.fromkeys(catalog.GEMMAS, 1),
        **{"gemma4_2b": 5, "gemma4_4b": 6, "gemma4_26b_a4b": 6, "gemma4_31b": 6},
    }


def test_windows_repeat_where_sequences_are_longer():
    repeats = {"gemma_7b_en": 1, "gemma2_9b_en": 2, "gemma3_27b_text": 6}
    assert {name: period(catalog.architecture(name), 8192) for name in repeats} == repeats


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_kv_shared_layers": 2}, "an assistant, which drafts for another model"),
        ({"num_kv_shared_layers": 1}, "the blocks with keys of their own are of all the others' kinds"),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 8}, r"the vocabulary's size \(512\)"),
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input"),
        ({"enable_moe_block": True}, "num_experts a number"),
        (
            {"num_experts_per_token": 5, **{key: EXPERTS[key] for key in EXPERTS if "per_token" not in key}},
            "at most num_",
        ),
        ({"layer_types": ["full_attention"]}, "a name for each of its 2 blocks"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"num_global_key_value_heads": 3}, r"a divisor of num_query_heads \(4\)"),
        ({"global_rope_partial_rotary_factor": 1.5}, "global_rope_partial_rotary_factor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_gemma_4_that_the_forward_pass_does_not_compute_is_refused(change, said):
    with pytest.raises(StageError, match=said):
        Architecture("Gemma4Backbone", {**CONFIGS["gemma4"], **change})


def test_a_backbone_is_built_and_its_config_read_without_tensorflow():
    program = (
        "import sys; from stages.core.load.backbone import build_backbone\n"
        "from stages.core.presets.architecture import Architecture, of_backbone\n"
        "from tests.support.tiny_presets import CONFIGS\n"
        "import keras\n"
        "backbone = build_backbone(Architecture('Gemma3Backbone', CONFIGS['gemma3']), 'float32')\n"
        "of_backbone(backbone), keras.saving.serialize_keras_object(backbone)\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
