"""Outputs that are missing or broken."""

from __future__ import annotations

import json
import shutil

import pytest

from stages.core.common.errors import StageError
from stages.core.common.paths import REPORT
from tests.support.pages import Reader, rendered, run_stage
from tests.support.report_outputs import COLUMNS, METRICS, ROW, curve, write_curve


@pytest.mark.parametrize(
    ("relative", "command"),
    [
        ("data/plots/finetune.csv", "python -m stages.finetune"),
        ("data/plots/samples.jsonl", "python -m stages.finetune"),
        ("data/generated/tuned.jsonl", "python -m stages.generate --variant tuned"),
        ("data/sharding/tuned.json", "python -m stages.finetune"),
        ("data/sharding/plan.json", "python -m stages.plan"),
        *((f"data/metrics/{name}.json", f"python -m stages.{name.replace('/', ' --variant ')}") for name in METRICS),
    ],
)
def test_a_missing_output_is_left_out_and_said_with_the_command_that_makes_it(root, relative, command):
    (root / relative).unlink()
    assert f"Left out: {relative} does not exist; {command} writes it." in Reader(rendered(root)).text


def test_a_page_of_the_loaded_model_alone_is_written_before_anything_is_tuned(root):
    for gone in ("data/metrics", "data/plots", "data/generated"):
        shutil.rmtree(root / gone)
    (root / "data/sharding/tuned.json").unlink()
    result = run_stage(root)
    assert result.returncode == 0
    text = Reader((root / REPORT).read_text(encoding="utf-8")).text
    assert "gemma3_270m, sharded over 8 devices Each of 8 devices held 128 MiB of weights." in text
    assert "Left out: data/plots/finetune.csv" in result.stderr


@pytest.mark.parametrize("relative", ["models/preset/manifest.json", "data/sharding/base.json"])
def test_without_the_manifest_or_the_sharding_there_is_no_report(root, relative):
    (root / relative).unlink()
    result = run_stage(root)
    assert result.returncode == 1
    assert relative in result.stderr
    assert "Traceback" not in result.stderr
    assert not (root / REPORT).exists()


@pytest.mark.parametrize(
    ("relative", "content", "named"),
    [
        ("models/preset/manifest.json", "{", "the file"),
        ("data/sharding/base.json", '{"preset": "x"}', "mesh"),
        ("data/sharding/tuned.json", '{"preset": 3}', "preset"),
        ("data/metrics/load.json", "[1]", "object"),
        ("data/metrics/load.json", "{", "JSON"),
        ("data/generated/tuned.jsonl", '{"prompt": "p"}', "line 1"),
        ("data/plots/samples.jsonl", '{"prompt": "p", "text": "t"}', "line 1"),
        ("data/metrics/load.json", json.dumps(METRICS["load"] | {"<b>": 1}), "Extra inputs"),
        ("data/metrics/load.json", json.dumps(METRICS["load"] | {"peak_host_bytes": "<b>"}), "peak_host_bytes"),
        ("data/plots/finetune.csv", "loss\n3\n", "columns step, epoch, loss,"),
        ("data/plots/finetune.csv", COLUMNS + "\n" + ROW.format(step=1, loss=3) + "2,1,much,0,9,1,1,1,", "line 3"),
        ("data/plots/finetune.csv", f"{COLUMNS}\n{ROW.format(step='', loss=3)}", "line 2"),
        ("data/plots/finetune.csv", f"{COLUMNS}\n1,1,3\n", "line 2"),
        ("data/generated/tuned.jsonl", b"\xff\xfe", "UTF-8"),
        ("data/plots/finetune.csv", b"\xff\xfe", "UTF-8"),
        ("data/metrics/load.json", b"\xff\xfe", "JSON"),
    ],
)
def test_a_broken_input_is_named_with_its_place(root, relative, content, named):
    (root / relative).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as raised:
        rendered(root)
    assert relative in str(raised.value)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_diverged_loss_breaks_the_line_and_is_counted(root):
    rows = curve()
    for row in rows[100:110]:
        row["loss"] = "nan"
    write_curve(root, rows)
    page = rendered(root)
    assert "10 of 223 steps have a loss that is not a number" in Reader(page).text
    raw = [values for tag, values in Reader(page).elements if tag == "polyline" and values["class"] == "line raw"]
    assert [len(values["points"].split()) for values in raw[:2]] == [100, 113]


def test_a_curve_without_rows_or_without_any_number_is_said(root):
    (root / "data/plots/finetune.csv").write_text(f"{COLUMNS}\n", encoding="utf-8")
    assert "finetune.csv has no rows" in Reader(rendered(root)).text
    rows = ROW.format(step=1, loss="nan") + ROW.format(step=2, loss="inf")
    (root / "data/plots/finetune.csv").write_text(f"{COLUMNS}\n{rows}", encoding="utf-8")
    assert "2 of 2 steps have a loss that is not a number" in Reader(rendered(root)).text


def test_a_run_of_thirty_thousand_steps_still_makes_a_small_page(root):
    write_curve(root, curve(30_000))
    assert len(rendered(root)) < 300_000
