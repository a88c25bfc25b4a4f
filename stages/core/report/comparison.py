"""Runs side by side: this workspace, and git revisions or DVC experiments, in one page.

Purpose: a sweep or a pull request is judged by what differs: settings, results, curves and texts. What a revision's run
wrote is read from git and from DVC's cache.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from ruamel.yaml import YAML
from scmrepo.exceptions import SCMError

from stages.core.common.errors import StageError, shown
from stages.core.common.paths import CURVE, SUMMARY, Paths, generated, metrics
from stages.core.records.evaluate import CompareMetrics
from stages.core.records.finetune import Step, read_curve
from stages.core.records.generate import Generation
from stages.core.records.summary import Summary
from stages.core.report.line_charts import series_chart, smoothed
from stages.core.report.page import fill
from stages.core.report.text import NONE, quantity, signed

PARAMS = "params.yaml"
FILES = (PARAMS, SUMMARY, metrics("compare"), CURVE, generated("tuned"))
WORKSPACE = "workspace"
# How each figure of data/run.json is called, and the key that has its unit.
FIGURES = {
    "perplexity": ("Perplexity", "perplexity"),
    "loss": ("Loss, nats per token", "loss"),
    "accuracy": ("Next token right", "accuracy"),
    "perplexity_base": ("Perplexity before tuning", "perplexity"),
    "trainable": ("Trained parameters", "trainable"),
    "step_s": ("Step, median", "seconds"),
    "tokens_per_s": ("Trained tokens per second", "tokens_per_second"),
    "peak_gib": ("Peak host memory in GiB", "peak"),
    "replicated": ("Replicated weights", "fraction"),
    "plan_hbm": ("Planned memory of a chip", "fraction"),
}


@dataclass(frozen=True)
class ComparedRun:
    """What one run is compared by; `settings` has the text of each setting by `section.key`."""

    name: str
    settings: dict[str, str]
    summary: Summary
    compare: CompareMetrics | None
    curve: list[Step]
    texts: list[Generation]


def read_runs(paths: Paths, revisions: tuple[str, ...]) -> list[ComparedRun]:
    """Read this workspace's run and those of some revisions.

    Args:
        paths: the workspace's.
        revisions: git revisions, or names of experiments as `dvc exp show` lists them.

    Raises:
        StageError: a revision that does not exist, or whose run wrote no `data/run.json`.
    """
    runs = [_read(WORKSPACE, paths)]
    for revision in revisions:
        with tempfile.TemporaryDirectory() as folder:
            _extract(paths.root, revision, Path(folder))
            runs.append(_read(revision, Paths(Path(folder), Path(folder))))
    return runs


def _extract(root: Path, revision: str, folder: Path) -> None:
    """Copy what a revision's run wrote; a file that neither git nor the cache has is left out."""
    try:
        files = DVCFileSystem(url=str(root), rev=revision)
        for relative in FILES:
            try:
                content = files.read_bytes(relative)
            except FileNotFoundError:
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            (folder / relative).write_bytes(content)
    except (DvcException, SCMError) as error:
        raise StageError(
            "--compare takes a git revision, or the name of an experiment that `dvc exp show` lists. Received: "
            f"--compare={shown(revision)} ({shown(error)})."
        ) from error


def _read(name: str, paths: Paths) -> ComparedRun:
    def there(relative: str) -> bool:
        try:
            return paths.read(relative).is_file()
        except StageError:
            return False

    if not there(SUMMARY):
        raise StageError(
            f"Each compared run must have {SUMMARY}, which the stage report writes. Received: {shown(name)}, without "
            "it. Run `dvc repro` there."
        )
    return ComparedRun(
        name=name,
        settings=_flat(YAML(typ="safe").load(paths.read(PARAMS).read_text(encoding="utf-8"))),
        summary=Summary.read(paths, SUMMARY),
        compare=CompareMetrics.read(paths, metrics("compare")) if there(metrics("compare")) else None,
        curve=read_curve(paths, CURVE) if there(CURVE) else [],
        texts=Generation.read_lines(paths, generated("tuned")) if there(generated("tuned")) else [],
    )


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        f"{section}.{key}": "null" if value is None else str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }


def render_comparison(runs: list[ComparedRun]) -> str:
    """Return the page as text.

    Args:
        runs: at least one, in the order of the columns.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    settings = [(key, [run.settings.get(key, NONE) for run in runs]) for key in keys]
    prompts = dict.fromkeys(text.prompt for run in runs for text in run.texts)
    return fill(
        "comparison.html",
        names=[run.name for run in runs],
        figures=_figures(runs),
        settings=[(key, values) for key, values in settings if len(set(values)) > 1],
        charts=[chart for chart in _charts(runs) if chart],
        texts=[
            (prompt, [(run.name, text.text) for run in runs for text in run.texts if text.prompt == prompt])
            for prompt in prompts
        ],
    )


def _figures(runs: list[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of results; a figure that no run has is left out."""
    rows = [("Loss, change by tuning", [_change(run.compare) for run in runs])]
    rows += [
        (label, [quantity(unit, getattr(run.summary, key)) for run in runs]) for key, (label, unit) in FIGURES.items()
    ]
    return [(label, values) for label, values in rows if set(values) != {NONE}]


def _change(compared: CompareMetrics | None) -> str:
    if compared is None:
        return NONE
    error = compared.loss_difference_standard_error
    return signed(compared.loss_difference, 3) + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.3f}")


def _charts(runs: list[ComparedRun]) -> list[Any]:
    """Return the training loss as a moving mean, and the validation loss, a line for each run."""

    def mean(curve: list[Step]) -> list[tuple[float, float]]:
        span = max(2, len(curve) // 10)
        return [(row.step, loss) for row, loss in zip(curve, smoothed([row.loss for row in curve], span), strict=True)]

    def held_out(curve: list[Step]) -> list[tuple[float, float]]:
        return [(row.step, row.validation_loss) for row in curve if row.validation_loss is not None]

    return [
        series_chart(title, "nats per token", "step", [(run.name, points(run.curve)) for run in runs], doubling=False)
        for title, points in (("Training loss, moving mean", mean), ("Loss on validation sequences", held_out))
    ]
