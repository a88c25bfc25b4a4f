"""Runs side by side: what differs between the workspace and a revision, and what cannot be compared."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.copies import IDENTITY, dvc
from tests.support.pages import Reader, edit, run_stage
from tests.support.report_outputs import write_generations

PAGE = "data/report/comparison.html"
TEXT = "<b>Bold</b> film & music."


@pytest.fixture
def repository(root: Path) -> Path:
    """The outputs of a run with a learning rate of its own, after those of another were committed."""
    assert run_stage(root).returncode == 0
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", *IDENTITY, "commit", "-qm", "A run"], cwd=root, check=True)
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("learning_rate: 5.6e-4", "learning_rate: 1.0e-3"))
    edit(root, "data/run.json", perplexity=20.5)
    write_generations(root, "tuned", [("This movie was", TEXT)])
    return root


def test_results_settings_curves_and_texts_of_two_runs_stand_side_by_side(repository: Path):
    result = run_stage(repository, "--compare", "HEAD")
    assert (result.returncode, result.stderr.count("\n")) == (0, 1), result.stderr
    page = Reader((repository / PAGE).read_text())
    text = " ".join(" ".join(page.pieces).split())
    assert "workspace HEAD Loss, change by tuning" in text
    assert re.search(r"Perplexity 20\.50 (?!20\.50)\d+\.\d\d ", text)
    assert "finetune.learning_rate 0.001 0.00056" in text
    assert "finetune.rank" not in text, "only what differs"
    assert [a["data-name"] for tag, a in page.elements if tag == "polyline"] == ["workspace", "HEAD"] * 2
    assert TEXT in text, "shown as it was written"


def test_a_run_against_itself_differs_in_no_setting(repository: Path):
    subprocess.run(["git", "checkout", "-q", "."], cwd=repository, check=True)
    assert run_stage(repository, "--compare", "HEAD").returncode == 0
    assert "None: code, data or packages differ, or nothing does." in (repository / PAGE).read_text()


@pytest.mark.parametrize(
    ("revision", "says"),
    [("no-such", "Received: --compare=no-such (unknown Git revision"), ("empty", "Received: empty, without it.")],
)
def test_a_revision_without_a_run_ends_in_one_line(repository: Path, revision: str, says: str):
    for command in (["rm", "-q", "-f", "data/run.json"], [*IDENTITY, "commit", "-qm", "None"], ["tag", "empty"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    edit_back = subprocess.run(["git", "show", "HEAD~1:data/run.json"], cwd=repository, capture_output=True, check=True)
    (repository / "data/run.json").write_bytes(edit_back.stdout)
    result = run_stage(repository, "--compare", revision)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert says in result.stderr


def test_the_page_can_be_opened_and_written_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    browser = root / "browser.sh"
    browser.write_text(f'#!/bin/sh\necho "$1" > {root}/opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    for _ in range(2):
        result = run_stage(root, "--open")
        assert result.returncode == 0, result.stderr
        assert (root / "opened").read_text().strip() == (root / "data/report/index.html").as_uri()
