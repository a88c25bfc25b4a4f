"""Write one HTML page that shows what the pipeline did, and its headline figures for `dvc metrics show`.

Reads: the preset's manifest, `data/sharding/`, and what exists of `data/metrics/`, `data/plots/` and
`data/generated/`. Writes: `data/report/index.html`, which needs no network and no other file, and `data/run.json`.
Command: python -m stages.report. With --compare it only writes `data/report/comparison.html`.
"""

from __future__ import annotations

import webbrowser

from stages.core.cli import Run, click, logger, stage
from stages.core.common.paths import COMPARISON, REPORT, SUMMARY
from stages.core.files import write_text


@stage
@click.option(
    "--compare",
    "revisions",
    multiple=True,
    metavar="REVISION",
    help="Write data/report/comparison.html instead: this run beside that of a git revision or DVC experiment; may be "
    "repeated.",
)
@click.option("--open", "show", is_flag=True, help="Open the page in the web browser.")
def main(run: Run, revisions: tuple[str, ...], show: bool) -> None:
    """Write one self-contained HTML page that shows what the pipeline did."""
    if revisions:
        from stages.core.report.comparison import read_runs, render_comparison

        relative, page = COMPARISON, render_comparison(read_runs(run.paths, revisions))
    else:
        from stages.core.report.inputs import read_inputs
        from stages.core.report.page import render
        from stages.core.report.summary import summary

        inputs = read_inputs(run.paths, run.params.variants)
        relative, page = REPORT, render(inputs, run.params)
        summary(inputs, run.params).write(run.paths.write(SUMMARY))
        for missing, command in inputs.missing.items():
            logger.info(f"Left out: {missing} does not exist; `{command}` writes it.")
    write_text(run.paths.write(relative), page)
    logger.info(f"Wrote {relative} ({len(page.encode()) / 1024:,.0f} KiB){'' if show else ': open it in a browser'}.")
    if show:
        webbrowser.open(run.paths.read(relative).resolve().as_uri())


if __name__ == "__main__":
    main()
