"""The tutorial as a notebook: executed from its first cell to its last on a tiny preset."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import warm
from tests.support.copies import copy_repository
from tests.support.repository import ROOT
from tests.support.tiny_presets import tiny_reviews

pytestmark = pytest.mark.xdist_group("pipeline")

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


@pytest.fixture(scope="module")
def executed(one_block: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each cell showed, by the cell's id."""
    folder = copy_repository(tmp_path_factory.mktemp("repository"))
    (folder / "reviews.txt").write_text("\n".join(review.replace("\n", " ") for review in tiny_reviews(12)) + "\n")
    # Python and DVC that start at once, in the place of the environment's.
    programs = {"python": f'{warm.python()} "$@"', "dvc": f'{warm.python("dvc")} -m dvc "$@"'}
    (folder / ".venv/bin").mkdir(parents=True)
    for name, command in programs.items():
        (folder / ".venv/bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (folder / ".venv/bin" / name).chmod(0o755)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    small = [
        "fetch.source=path",
        f"fetch.path={one_block}",
        "prepare.source=files",
        "prepare.train_file=reviews.txt",
        "prepare.validation=4",
        "tokenize.length=32",
        "finetune.steps=2",
        "finetune.sample_every=1",
        "generate.max_tokens=4",
        "plan.targets=[]",
    ]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += f"\nSETTINGS = {small!r}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / ".ipython"))
        # The kernel gets this process' environment, without the marks of the test session in it.
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder / "docs")}}).execute()
    assert (folder / "data/report/index.html").is_file(), os.linesep.join(map(str, notebook.cells))[-5000:]
    return {
        cell.id: "".join(
            str(output.get("text", "")) + str(output.get("data", {}).get("text/html", "")) for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def test_the_notebook_runs_the_pipeline_and_shows_metrics_curves_samples_and_report(executed: dict[str, str]):
    assert "Running stage 'finetune'" in executed["run"]
    assert "perplexity_base" in executed["metrics"]
    assert "Loss of training and held-out reviews" in executed["plots"]
    assert "step 1: Best comedy movies in the 90s" in executed["samples"]
    assert executed["samples"].count("before: ") == 3
    assert "srcdoc" in executed["report"] and "fine-tuning report" in executed["report"]


def test_the_notebook_is_valid_and_holds_no_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
