"""dvc.yaml says what the code does: code dependencies are the imports, params sections are those that are read."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from stages.core.common.code import ROOT, dependencies
from stages.core.config.reader import read_params
from stages.core.config.schema import Params
from stages.core.config.section import without
from tests.support.repository import STAGES, of_variant, outputs, variants_of

# Scripts that change settings or clean up, and make nothing: no stage of the pipeline.
COMMANDS = {"cache", "profile", "rehearse"}
# Stages that take seconds list whole folders: where the same bytes come out again, nothing after them reruns.
QUICK = {"prepare", "tokenize", "report"}
PACKAGES = {folder.parent.relative_to(ROOT).as_posix() for folder in (ROOT / "stages" / "core").glob("*/__init__.py")}


def files_of(path: str) -> list[str]:
    """The modules that a dependency of dvc.yaml stands for: itself, or all of a folder."""
    if path.endswith(".py"):
        return [path]
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / path).rglob("*.py")]
    return [file for file in files if not file.endswith("/__init__.py")]


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_dependencies_are_the_imports(stage: str):
    listed = [path for path in STAGES[stage]["deps"] if path.startswith("stages/")]
    files = [file for path in listed for file in files_of(path)]
    assert len(files) == len(set(files)), "listed twice"
    needed = dependencies(f"stages/{stage}.py")
    if stage in QUICK:
        assert needed <= set(files) and all(needed & set(files_of(path)) for path in listed)
    else:
        assert needed == set(files)


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_is_listed_where_all_of_its_files_are_dependencies(stage: str):
    needed = dependencies(f"stages/{stage}.py")
    whole = {folder for folder in PACKAGES if set(files_of(folder)) <= needed}
    listed = {path for path in STAGES[stage]["deps"] if path in PACKAGES}
    assert whole <= listed if stage in QUICK else whole == listed


@pytest.mark.parametrize("stage", STAGES)
def test_the_params_sections_are_those_that_the_script_reads(stage: str):
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in Params.model_fields and "params" in ast.unparse(node.value)
    }
    passes_all = any(
        isinstance(node, ast.Call) and any(ast.unparse(argument) == "run.params" for argument in node.args)
        for node in ast.walk(tree)
    )
    listed = {name.partition(".")[0] for name in STAGES[stage].get("params", [])}
    # Samples while training are put in the chat format if generate says so; they are no result. A stage for each
    # variant depends on the folder of its own.
    apart = {"finetune": {"generate"}, "generate": {"variants"}, "evaluate": {"variants"}}
    assert listed == (set(Params.model_fields) if passes_all else read - apart.get(stage, set()))


def test_every_listed_setting_exists():
    params = read_params(ROOT / "params.yaml").model_dump()
    for stage in STAGES.values():
        for section, _, key in (name.partition(".") for name in stage.get("params", [])):
            assert section in params and (not key or key in params[section]), f"{section}.{key}"


@pytest.mark.parametrize(("stage", "unused"), [("finetune", ["display"]), ("plan", ["display", "run"])])
def test_of_finetunes_settings_those_that_change_no_result_are_left_out(stage: str, unused: list[str]):
    listed = {name for name in STAGES[stage]["params"] if name.startswith("finetune")}
    settings = read_params(ROOT / "params.yaml").finetune
    assert listed == {f"finetune.{key}" for key in without(settings, *unused)}


def test_what_computes_depends_on_the_pinned_packages():
    assert {name for name, stage in STAGES.items() if "requirements.txt" in stage["deps"]} == set(STAGES) - {
        "fetch",
        "report",
    }


def test_every_stage_says_what_it_does_and_has_a_script():
    scripts = {path.stem for path in (ROOT / "stages").glob("[a-z]*.py")}
    assert set(STAGES) == scripts - COMMANDS
    assert scripts >= COMMANDS
    for name, stage in STAGES.items():
        assert len(stage["desc"]) > 20, name
        assert stage["cmd"].startswith(f"python -m stages.{name}")


def test_no_output_has_two_owners_and_none_is_always_stale():
    written = [path for stage in STAGES for path in outputs(stage)]
    assert len(written) == len(set(written))
    for stage in STAGES.values():
        assert not {"always_changed", "frozen"} & set(stage)


def test_no_output_that_dvc_keeps_is_in_git_too():
    names = ["git", "ls-files", "--", *(path for stage in STAGES for path in outputs(stage, kept=True))]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == []


def test_what_a_stage_reads_of_the_pipeline_is_what_another_writes():
    written = {Path(path) for stage in STAGES for path in outputs(stage)}
    for name, stage in STAGES.items():
        for path in (Path(of_variant(each, variant)) for each in stage["deps"] for variant in variants_of(name)):
            if path.parts[0] in ("data", "models") and path.parts[1] != "inputs":
                # A folder of outputs, or a file of an output, is one too.
                assert any(path.is_relative_to(each) or each.is_relative_to(path) for each in written), (name, path)


def test_stage_scripts_are_short_and_straight():
    for path in (ROOT / "stages").glob("[a-z]*.py"):
        assert len(path.read_text().splitlines()) <= 90, path.name


def test_no_stage_imports_dvc():
    # Which runs under DVC. Comparing runs is a command for the user, who has DVC at hand.
    compares = ROOT / "stages/core/report/comparison.py"
    for path in set((ROOT / "stages").rglob("*.py")) - {compares}:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "dvc" for name in names), path
