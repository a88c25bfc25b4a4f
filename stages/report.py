"""Write one HTML page that shows what the pipeline did, and its headline figures for `dvc metrics show`.

Reads: the preset's manifest, `data/sharding/`, and what exists of `data/metrics/`, `data/plots/` and
`data/generated/`. Writes: `data/report/index.html`, which needs no network and no other file, and `data/run.json`.
Command: python -m stages.report
"""

from __future__ import annotations

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import REPORT, SUMMARY
from stages.core.files import write_text


@stage
def main(run: Run) -> None:
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
    logger.info(f"Wrote {REPORT} ({len(page.encode()) / 1024:,.0f} KiB): open it in a browser.")


if __name__ == "__main__":
    main()
