"""What the real dvc runs again when one setting changes. Stand-ins take the place of the stages' commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import stand_in
from tests.support.copies import change, copy_repository, dvc, ran
from tests.support.repository import ROOT, STAGES

pytestmark = pytest.mark.xdist_group("reruns")

ALL = {
    f"{name}@{variant}" if variant else name
    for name, stage in STAGES.items()
    for variant in stage.get("matrix", {"variant": [""]})["variant"]
}
TUNED = {"finetune", "generate@tuned", "evaluate@tuned", "compare", "report"}
CHANGES = {
    "a prompt and the chat format": (
        "generate",
        {"prompts": ["Best comedy movies in the 90s "], "chat_template": True},
        {"generate@baseline", "generate@tuned", "report"},
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
        {"evaluate@baseline", "evaluate@tuned", "compare", "report"},
    ),
    "the validation size": ("prepare", {"validation": 5}, ALL - {"fetch", "load", "generate@baseline", "plan"}),
    "the end of a review": ("tokenize", {"eos": "never"}, ALL - {"fetch", "prepare", "load", "generate@baseline"}),
    "the mesh": ("mesh", {"shape": [2, 4]}, ALL - {"fetch", "prepare", "tokenize"}),
    "the layout": ("layout", {"max_replicated_fraction": 0.5}, ALL - {"fetch", "prepare", "tokenize"}),
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


@pytest.mark.parametrize("case", CHANGES)
def test_only_what_depends_on_a_changed_setting_runs_again(repository: Path, case: str):
    """Each change comes on top of those before."""
    section, values, expected = CHANGES[case]
    change(repository, section, **values)
    assert f"{section}." in dvc(repository, "params", "diff").stdout
    assert ran(dvc(repository, "repro", PYTHONPATH=str(ROOT))) == expected
