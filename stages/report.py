"""Write one HTML page that shows what the pipeline did, and its headline figures for `dvc metrics show`.

Reads: the preset's manifest, `data/sharding/`, and what exists of `data/metrics/`, `data/plots/` and
`data/generated/`. Writes: `data/report/index.html`, which needs no network and no other file, and `data/run.json`.
Command: python -m stages.report
"""

from __future__ import annotations

import webbrowser

from stages.core.cli import Run, click, logger, stage
from stages.core.common.paths import REPORT, SUMMARY
from stages.core.files import write_text


@stage
@click.option("--open", "show", is_flag=True, help="Open the page in the web browser.")
def main(run: Run, show: bool) -> None:
    """Write one self-contained HTML page that shows what the pipeline did."""
    from stages.core.report.inputs import read_inputs
    from stages.core.report.page import render
    from stages.core.report.summary import summary

    inputs = read_inputs(run.paths)
    page = render(inputs, run.params)
    write_text(run.paths.write(REPORT), page)
    summary(inputs, run.params).write(run.paths.write(SUMMARY))
    for relative, command in inputs.missing.items():
        logger.info(f"Left out: {relative} does not exist; `{command}` writes it.")
    logger.info(f"Wrote {REPORT} ({len(page.encode()) / 1024:,.0f} KiB){'' if show else ': open it in a browser'}.")
    if show:
        webbrowser.open(run.paths.read(REPORT).resolve().as_uri())


if __name__ == "__main__":
    main()
