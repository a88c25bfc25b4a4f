"""What the real dvc runs again when one setting changes. Stand-ins take the place of the stages' commands."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import stand_in
from tests.support.copies import IDENTITY, change, copy_repository, dvc, ran
from tests.support.repository import ROOT, STAGES, variants_of

pytestmark = pytest.mark.xdist_group("reruns")

ALL = {f"{name}@{variant}" if variant else name for name in STAGES for variant in variants_of(name)}
TUNED = {"finetune", "generate@tuned", "evaluate@tuned", "compare", "export", "report"}
ADAPTER = {"generate@again", "evaluate@again"}
CHANGES = {
    "a prompt and the chat format": (
        "generate",
        {"prompts": ["Best comedy movies in the 90s "], "chat_template": True},
        {"generate@baseline", "generate@tuned", "export", "report"},
    ),
    "the learning rate": ("finetune", {"learning_rate": 0.002}, TUNED),
    "what is printed while training": (
        "finetune",
        {"sample_every": 2, "sample_prompt": "It was", "checkpoint_every": 2, "checkpoint_keep": 1},
        {"report"},
    ),
    # A plan fills what its entries leave out from the sections that shape a step.
    "the LoRA rank": ("finetune", {"rank": 2}, TUNED | {"plan"}),
    "the longest review measured": (
        "evaluate",
        {"max_length": 24},
        {"evaluate@baseline", "evaluate@tuned", "compare", "export", "report"},
    ),
    "the validation size": ("prepare", {"validation": 5}, ALL - {"fetch", "plan"}),
    "the end of a review": ("tokenize", {"eos": "never"}, ALL - {"fetch", "prepare"}),
    "the mesh": ("mesh", {"shape": [1, 8]}, ALL - {"fetch", "prepare", "tokenize", "quantize"}),
    "the layout": ("layout", {"max_replicated_fraction": 0.5}, ALL - {"fetch", "prepare", "tokenize", "quantize"}),
    "what is planned": ("plan", {"targets": []}, {"plan", "report"}),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, run once."""
    folder = copy_repository(tmp_path_factory.mktemp("repository"))
    stand_in.install(folder)
    assert ran(dvc(folder, "repro", PYTHONPATH=str(ROOT))) == ALL
    assert ran(dvc(folder, "repro", PYTHONPATH=str(ROOT))) == set()
    return folder


def test_a_sweep_runs_what_its_setting_changes_and_its_table_fits_160_columns(repository: Path):
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    subprocess.run(["git", "add", "-A"], cwd=repository, check=True)
    subprocess.run(["git", *IDENTITY, "commit", "-qm", "Run"], cwd=repository, check=True)
    queue = ["exp", "run", "--queue", "-S", "finetune.learning_rate=0.001,0.002"]
    names = re.findall(r"Queued experiment '(.+)'", dvc(repository, *queue, **environment).stdout)
    dvc(repository, "queue", "start", "-j", "1", **environment)
    until = time.monotonic() + 600
    while dvc(repository, "queue", "status").stdout.count("Success") < 2 and time.monotonic() < until:
        time.sleep(1)
    assert [ran(dvc(repository, "queue", "logs", name)) for name in names] == [TUNED, TUNED]
    show = ["exp", "show", "--no-pager", "--only-changed", "--drop", "^(data|models)/|Created|State|Executor"]
    table = dvc(repository, *show, **environment).stdout
    assert max(map(len, table.splitlines())) <= 160
    assert {*names, "perplexity", "loss", "finetune.learning_rate"} <= set(re.findall(r"[\w.-]+", table))
    dvc(repository, "exp", "apply", names[1], **environment)
    assert "learning_rate: 0.002" in (repository / "params.yaml").read_text()
    subprocess.run(["git", "checkout", "-q", "."], cwd=repository, check=True)
    dvc(repository, "checkout")


@pytest.mark.parametrize("case", CHANGES)
def test_only_what_depends_on_a_changed_setting_runs_again(repository: Path, case: str):
    """As DVC says beforehand, given that a stage which runs writes something else, as the stand-ins do."""
    section, values, expected = CHANGES[case]
    settings = repository / "params.yaml"
    before = settings.read_text()
    change(repository, section, **values)
    try:
        assert f"{section}." in dvc(repository, "params", "diff").stdout
        assert ran(dvc(repository, "repro", "--dry", "--force-downstream", PYTHONPATH=str(ROOT))) == expected
    finally:
        settings.write_text(before)


def test_an_adapter_beside_runs_alone_and_runs_again_with_the_tuned_model(repository: Path):
    change(repository, "variants", again="models/tuned")
    assert ran(dvc(repository, "repro", PYTHONPATH=str(ROOT))) == ADAPTER | {"compare", "report"}
    change(repository, "finetune", learning_rate=0.003)
    assert ran(dvc(repository, "repro", PYTHONPATH=str(ROOT))) == TUNED | ADAPTER
