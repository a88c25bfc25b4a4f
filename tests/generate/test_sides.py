"""Variants side by side: each is the model that it is by itself, whichever are opened together, and on any mesh."""

from __future__ import annotations

import shutil

import pytest

from stages.core.common.paths import Paths
from stages.core.config.reader import read_params
from stages.core.generate.sides import open_sides
from stages.core.load import adapter, variants
from stages.core.presets.formats import format_of
from stages.core.records.layout import MeshShape
from tests.support.repository import ROOT
from tests.support.tiny_models import describe, open_tiny
from tests.support.tuned_models import tuned

pytestmark = pytest.mark.usefixtures("devices")
PROMPTS = [[2, 10, 11, 12], [2, 40]]


@pytest.fixture(scope="module")
def opened(presets, tmp_path_factory):
    """Returns a function that opens variants of a tiny Gemma 3, `mine` among them: a copy of tuned."""
    root = tmp_path_factory.mktemp("root")
    (root / "models/tuned").mkdir(parents=True)
    _, model = tuned(presets["gemma3"], root / "models/tuned")
    own = model.config.model_copy(update={"mesh": MeshShape((2, 2), device_kind="simulated")})
    own.write(root / "models/tuned/model.json")
    said = {"base": model.preset.fingerprint, "preset": "tiny", **own.tuned.model_dump()}
    arrays = {path: model.trained.array(path) for path in model.trained}
    adapter.save(root / "models/tuned/adapter.safetensors", arrays, said)
    describe(model.preset, (2, 2)).write(root / "models/baseline/model.json")
    shutil.copytree(root / "models/tuned", root / "mine")
    settings = read_params(ROOT / "params.yaml", ("generate.max_tokens=6",)).generate
    tokenizer = format_of(model.preset.manifest.format).load_tokenizer(model.preset.folder)

    def open_them(*names, **more):
        return open_sides(
            Paths(root, root), model.preset, tokenizer, names, {"mine": "mine"}, settings, (tokenizer.eos,), **more
        )

    return open_them


def texts(sides):
    return {side.variant: side.continued(PROMPTS, 0)[0] for side in sides}


def test_each_variant_writes_what_it_writes_by_itself_and_a_copy_of_tuned_what_tuned_does(opened):
    alone = {name: texts(opened(name))[name] for name in ("baseline", "tuned", "mine")}
    assert alone["baseline"] != alone["tuned"] == alone["mine"]
    assert texts(opened("baseline", "tuned")) == {name: alone[name] for name in ("baseline", "tuned")}


def test_what_is_only_tried_is_on_one_device_and_writes_the_same(opened):
    (tried,), (kept,) = opened("tuned", trying=True), opened("tuned")
    devices = [len(side.weights()[0].sharding.device_set) for side in (tried, kept)]
    assert devices == [1, 4]
    assert texts([tried]) == texts([kept])


def test_real_devices_are_used_for_trying_too(presets, monkeypatch):
    config = describe(open_tiny(presets["gemma3"]), (1, 4))

    def tried(kind, accelerator=None):
        monkeypatch.setattr(variants.devices, "accelerator", lambda: accelerator)
        mesh = MeshShape((1, 4), device_kind=kind)
        return variants.for_trying(config.model_copy(update={"mesh": mesh})).mesh.devices

    assert [tried("real"), tried("auto", "tpu"), tried("auto"), tried("simulated", "gpu")] == [4, 4, 1, 1]
