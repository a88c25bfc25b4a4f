"""Export: write the tuned model in the forms that others read, and prove that each computes what the pipeline's does.

Reads: `models/tuned/`, the preset; for the model cards what was measured before and after, and the samples; params
`export`, `finetune`, `prepare.source` and `generate.chat_template`.
Writes: `models/export/<format>/`, `data/metrics/export.json`.
Command: `python -m stages.export`. With `--verify` it writes nothing: it compares what was written with the tuned model
by the libraries that it was written for, where they are installed.
"""

from __future__ import annotations

from stages.core.cli import Run, click, logger, stage
from stages.core.common.paths import EXPORT


@stage
@click.option("--verify", is_flag=True, help="Only compare what was written by transformers, PEFT and keras-hub.")
def main(run: Run, verify: bool) -> None:
    """Write the tuned model for others, and prove that it is right."""
    logger.info("Opening the tuned model ...")
    from stages.core.common import host_memory
    from stages.core.export import exporting, verifying
    from stages.core.export.card import read_facts
    from stages.core.export.formats import make_job
    from stages.core.export.tuned import open_tuned
    from stages.core.records.export import ExportMetrics

    params = run.params
    job = make_job(open_tuned(run.paths), params.export, params.generate.chat_template)
    with exporting.reference(job) as compared:
        if verify:
            for line in verifying.verify(compared, run.paths.read(EXPORT)):
                click.echo(line)
            return
        facts = read_facts(run.paths, params.finetune, params.prepare.source)
        for command in facts.missing:
            logger.info(f"The model cards lack what `{command}` writes.")
        found = exporting.export(compared, run.paths.write(EXPORT), facts)
        run.write_metrics(
            "export",
            ExportMetrics(
                tokens=len(compared.ids),
                positions=len(compared.reading.hidden),
                formats=found,
                peak_host_bytes=host_memory.peak_host_bytes(),
            ),
        )


if __name__ == "__main__":
    main()
