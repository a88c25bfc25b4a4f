"""params.yaml and dvc.yaml have the form in which DVC writes them anew: a command changes what it says and no more."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import get_args

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import modify_yaml

from stages.core.config.profiles import PROFILES, apply
from stages.core.config.schema import Params
from stages.core.config.section import Section
from tests.support.copies import copy_repository, dvc
from tests.support.repository import ROOT

pytestmark = pytest.mark.xdist_group("pipeline")
SETTINGS = (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml"])
def test_what_dvc_reads_and_writes_is_the_same_to_the_byte(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_text((ROOT / name).read_text())
    with modify_yaml(path):
        pass
    assert path.read_text() == (ROOT / name).read_text()


def test_an_experiment_changes_the_line_of_its_setting_and_freezing_a_stage_nothing_that_stays(tmp_path: Path):
    repository = copy_repository(tmp_path / "repository")
    dvc(repository, "exp", "run", "--queue", "-S", "finetune.rank=16")
    queued = ["git", "show", "refs/exps/celery/stash:params.yaml"]
    written = subprocess.run(queued, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert SETTINGS.count("\n  rank: 8\n") == 1
    assert written == SETTINGS.replace("\n  rank: 8\n", "\n  rank: 16\n")
    # What `exp run` without --queue does to the user's own file.
    apply_overrides(repository / "params.yaml", ["finetune.rank=16"])
    assert (repository / "params.yaml").read_text() == written

    pipeline = (repository / "dvc.yaml").read_text()
    # DVC freezes no stage of a matrix.
    stages = ["fetch", "prepare", "tokenize", "quantize", "load", "finetune", "compare", "export", "plan", "report"]
    dvc(repository, "freeze", *stages)
    assert (repository / "dvc.yaml").read_text().count("frozen: true") == len(stages)
    dvc(repository, "unfreeze", *stages)
    assert (repository / "dvc.yaml").read_text() == pipeline


def values_of(annotation: object) -> list[str]:
    """A number, and where the setting may be one a list or a section, in the words of `-S`."""
    kinds = {annotation, *get_args(annotation), *(kind for each in get_args(annotation) for kind in get_args(each))}
    listed = any(kind is list or getattr(kind, "__origin__", None) is list for kind in kinds)
    section = any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
    return ["7", *(["[a,b]"] if listed else []), *(["{a: 1}"] if section and not listed else [])]


SETTABLE = [
    (f"{section}.{key}", value)
    for section, each in Params.model_fields.items()
    for key, field in getattr(each.annotation, "model_fields", {}).items()
    for value in values_of(field.annotation)
]


def test_lists_and_sections_are_among_the_values_that_are_set():
    found = {key: value for key, value in SETTABLE if value != "7"}
    assert found == {
        **dict.fromkeys(("prepare.train_file", "prepare.validation_file", "mesh.shape", "layout.rules"), "[a,b]"),
        **dict.fromkeys(("finetune.targets", "generate.prompts", "generate.stop_strings", "evaluate.tasks"), "[a,b]"),
        **dict.fromkeys(("export.formats", "plan.targets"), "[a,b]"),
        **dict.fromkeys(("plan.search", "plan.scaling"), "{a: 1}"),
    }


def comments(text: str) -> list[str]:
    """Comments and empty lines."""
    return [line for line in text.splitlines() if line.strip()[:1] in ("", "#")]


@pytest.mark.parametrize("key, value", SETTABLE)
def test_no_setting_takes_a_comment_with_it(key: str, value: str, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(SETTINGS)
    for each in (value, "null"):
        # What the first leaves at another place a second loses.
        for _ in range(2):
            apply_overrides(path, [f"{key}={each}"])
            assert comments(path.read_text()) == comments(SETTINGS)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_writes_the_form_that_dvc_does(name: str, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(apply(name, SETTINGS, "params.yaml")[0])
    before = path.read_text()
    apply_overrides(path, [])
    assert path.read_text() == before
