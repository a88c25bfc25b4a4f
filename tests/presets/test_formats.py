"""The table of formats, and the one of weights that all of them share."""

from __future__ import annotations

import pytest

from stages.core.common.errors import StageError
from stages.core.load.backbone import build_backbone
from stages.core.presets.formats import format_of
from stages.core.presets.weight_table import weight_table
from tests.support.repository import FAMILIES


def test_a_format_that_there_is_not_is_refused():
    with pytest.raises(StageError, match=r"gguf, keras, safetensors\. Received: format=onnx"):
        format_of("onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_lists_each_weight_of_the_backbone_in_its_order_and_shape(presets, devices, family):
    architecture = format_of("keras").read_architecture(presets[family])
    weights = [(each.path, tuple(each.shape)) for each in build_backbone(architecture, "float32").weights]
    table = weight_table(architecture)
    assert [(path, each.shape) for path, each in table.items()] == weights
    for name in ("keras", "gguf", "hugging_face"):
        assert len({getattr(each, name) for each in table.values()}) == len(weights), name
