"""The files between stages: their bytes are pinned, since DVC compares them, and a damaged one is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.common.errors import StageError
from stages.core.common.paths import Paths
from stages.core.files import write_json
from stages.core.records.evaluate import CompareMetrics, EvaluateMetrics
from stages.core.records.finetune import FinetuneMetrics, Sample, Step, read_curve, write_curve
from stages.core.records.generate import GenerateMetrics, Generation
from stages.core.records.layout import Fallback, LoraConfig, MeshShape, NamedLayout, Rule
from stages.core.records.load import LoadMetrics
from stages.core.records.manifest import License, Manifest, PresetFile
from stages.core.records.model_config import ModelConfig, TunedWeights
from stages.core.records.prepare import PrepareMetrics
from stages.core.records.record import FileRecord
from stages.core.records.sharding import Sharding, WeightRow
from stages.core.records.tokenize import TokenizeMetrics
from tests.support.repository import ROOT

METRICS = {
    "prepare": PrepareMetrics,
    "tokenize": TokenizeMetrics,
    "load": LoadMetrics,
    "finetune": FinetuneMetrics,
    "generate/baseline": GenerateMetrics,
    "generate/tuned": GenerateMetrics,
    "evaluate/baseline": EvaluateMetrics,
    "evaluate/tuned": EvaluateMetrics,
    "compare": CompareMetrics,
}
FALLBACK = Fallback("decoder_block_*/attention/key/kernel", "heads", "hidden", "8 devices do not divide 1 heads")
MESH = MeshShape((1, 8), device_kind="simulated")
MODEL = ModelConfig(
    variant="tuned",
    preset="gemma3_270m",
    base="b" * 64,
    dtype="float32",
    mesh=MESH,
    layout=NamedLayout(
        "auto", (Rule(".*kernel", (None, "model")), Rule("a", (("batch", "model"),), optional=True)), (FALLBACK,)
    ),
    tuned=TunedWeights(file="adapter.safetensors", rank=8, alpha=8.0, targets=("attention/.*",)),
)
ROW = {
    "pattern": "final_normalization/scale",
    "count": 1,
    "shape": [640],
    "dtype": "float32",
    "kind": "weight",
    "rule": None,
    "spec": [None],
    "shard_shape": [640],
    "bytes": 2560,
    "bytes_per_device": 2560,
    "replicated": True,
}
WANTED = {"pattern": FALLBACK.pattern, "wanted": "heads", "used": "hidden", "reason": FALLBACK.reason}
MESH_AS_JSON = {"shape": [1, 8], "axis_names": ["batch", "model"], "devices": "simulated"}
SHARDING = {
    "preset": "gemma3_270m",
    "mesh": MESH_AS_JSON | {"devices": "cpu"},
    "layout": "auto",
    "dtype": "float32",
    **dict.fromkeys(("parameters", "trainable_parameters", "bytes", "bytes_per_device", "replicated_bytes"), 640),
    "replicated_fraction": 0.0002,
    "by_kind": {"weight": 2560},
    "weights": [ROW],
    "fallbacks": [WANTED],
}
# What the stages wrote before there were records, and the record of the same.
FORMS: dict[str, tuple[dict, FileRecord]] = {
    "model.json": (
        {
            "variant": "tuned",
            "manifest": "models/preset/manifest.json",
            "preset": "gemma3_270m",
            "base": "b" * 64,
            "dtype": "float32",
            "mesh": MESH_AS_JSON,
            "layout": {
                "name": "auto",
                "rules": [
                    {"pattern": ".*kernel", "spec": [None, "model"], "optional": False},
                    {"pattern": "a", "spec": [["batch", "model"]], "optional": True},
                ],
                "fallbacks": [WANTED],
            },
            "tuned": {"file": "adapter.safetensors", "rank": 8, "alpha": 8.0, "targets": ["attention/.*"]},
        },
        MODEL,
    ),
    "manifest.json": (
        {
            "preset": "tiny",
            "source": "path",
            "format": "keras",
            "handle": None,
            "folder": "/é",
            "license": {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"},
            "files": [{"name": "config.json", "size": 3, "sha256": "0" * 64}],
        },
        Manifest(
            preset="tiny",
            source="path",
            format="keras",
            handle=None,
            folder="/é",
            license=License("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
            files=(PresetFile("config.json", 3, "0" * 64),),
        ),
    ),
    "base.json": (
        SHARDING,
        Sharding(
            **SHARDING
            | {
                "mesh": MeshShape((1, 8), device_kind="cpu"),
                "weights": [WeightRow(**ROW)],
                "fallbacks": [FALLBACK],
            }
        ),
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_committed_metrics_are_read_and_written_to_the_same_bytes(tmp_path: Path, name: str):
    relative = f"data/metrics/{name}.json"
    METRICS[name].read(Paths(ROOT, ROOT), relative).write(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == (ROOT / relative).read_bytes()


@pytest.mark.parametrize("name", FORMS)
def test_a_record_is_written_key_for_key_and_read_again(tmp_path: Path, name: str):
    plain, record = FORMS[name]
    write_json(tmp_path / "plain.json", plain)
    record.write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / "plain.json").read_bytes()
    assert type(record).read(Paths(tmp_path, tmp_path), name) == record


def test_the_curve_and_the_samples_are_written_to_the_same_bytes_and_read_again(tmp_path: Path):
    numbers = {"loss": 3.5418123, "accuracy": 0.25, "tokens": 512, "tokens_per_second": 51.25}
    rest = {"positions_per_second": 51.5, "learning_rate": 1e-3}
    steps = [
        Step(step=1, epoch=1, **numbers, **rest, validation_loss=None),
        Step(step=2, epoch=1, **numbers, **rest, validation_loss=3.25),
    ]
    write_curve(tmp_path / "curve.csv", steps)
    assert (tmp_path / "curve.csv").read_bytes() == (
        b"step,epoch,loss,accuracy,tokens,tokens_per_second,positions_per_second,learning_rate,validation_loss\n"
        b"1,1,3.54181,0.25,512,51.25,51.5,0.001,\n2,1,3.54181,0.25,512,51.25,51.5,0.001,3.25\n"
    )
    paths = Paths(tmp_path, tmp_path)
    assert read_curve(paths, "curve.csv") == [step.model_copy(update={"loss": 3.54181}) for step in steps]
    samples = [Sample(step=30, prompt="a ", text="b\u2028\né")]
    Sample.write_lines(tmp_path / "samples.jsonl", samples)
    assert (tmp_path / "samples.jsonl").read_text("utf-8") == '{"step": 30, "prompt": "a ", "text": "b\u2028\\né"}\n'
    assert Sample.read_lines(paths, "samples.jsonl") == samples
    Generation.write_lines(tmp_path / "tuned.jsonl", [Generation(prompt="a ", text="b")])
    assert (tmp_path / "tuned.jsonl").read_bytes() == b'{"prompt": "a ", "text": "b"}\n'
    second = Generation(prompt="a ", sample=1, text="b")
    Generation.write_lines(tmp_path / "tuned.jsonl", [second])
    assert (tmp_path / "tuned.jsonl").read_bytes() == b'{"prompt": "a ", "sample": 1, "text": "b"}\n'
    assert Generation.read_lines(paths, "tuned.jsonl") == [second]


@pytest.mark.parametrize(
    "changed, named",
    [
        (lambda text: text.replace('"base"', '"fingerprint"'), "base: Field required"),
        (lambda text: text.replace('"dtype"', '"type": 1, "dtype"'), "type: Extra inputs are not permitted"),
        (lambda text: text.replace('"optional"', '"may_be_absent"'), "layout.rules.0.may_be_absent: "),
        (lambda text: text.replace('"devices"', '"kind"'), "mesh.kind: "),
        (lambda text: text[:99], "the file: Invalid JSON"),
    ],
)
def test_a_model_config_that_is_damaged_or_has_another_key_is_told_in_one_line(tmp_path: Path, changed, named: str):
    MODEL.write(tmp_path / "model.json")
    (tmp_path / "model.json").write_text(changed((tmp_path / "model.json").read_text()))
    with pytest.raises(StageError) as raised:
        ModelConfig.read(Paths(tmp_path, tmp_path), "model.json")
    assert str(raised.value).startswith(f"model.json does not have its form: {named}")
    assert str(raised.value).endswith(" Run `dvc repro` to write it again.")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "alpha", "targets", "scale"),
    [
        ((8, None, ("query",)), 8.0, ("query",), 1.0),
        ((4, 2.0, ["query"]), 2.0, ("query",), 0.5),
        ((0, None, ("query",)), None, (), 0.0),
    ],
)
def test_alpha_is_the_rank_unless_it_is_given_and_rank_0_has_no_adapter(given, alpha, targets, scale):
    lora = LoraConfig(*given)
    assert (lora.alpha, lora.targets, lora.scale) == (alpha, targets, scale)
    tuned = TunedWeights(file="x", rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    assert tuned.lora == lora
