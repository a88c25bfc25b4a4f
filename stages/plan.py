"""Plan: what a training step needs on absent devices, by ahead-of-time compilation with the real TPU compiler.

Reads: params `plan`, and `fetch`, `tokenize`, `mesh`, `layout`, `load` and `finetune` for what its entries leave out;
no weights, no data.
Writes: `data/sharding/plan.json`; prints tables. Results are cached. With --presets or --published it only writes a
table in docs/planning.md.
Command: `python -m stages.plan`
"""

from __future__ import annotations

from pathlib import Path

from stages.core.cli import Run, click, logger, stage


@stage
@click.option(
    "--presets",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only write the table of all public presets between its marks in this file, docs/planning.md (half an hour).",
)
@click.option(
    "--published",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only write the table of published step times beside planned ones, likewise (ten minutes).",
)
def main(run: Run, presets: Path | None, published: Path | None) -> None:
    """Report what training steps need on absent devices, by ahead-of-time compilation."""
    logger.info("Planning train steps on absent devices ...")
    from stages.core.common import inputs
    from stages.core.common.paths import PLAN
    from stages.core.plan import compilation, presets_table, search, table, targets
    from stages.core.plan import published as published_table
    from stages.core.records.plan import PlanFile
    from stages.core.sharding import devices

    params = run.params
    settings = targets.Settings(
        params.fetch, params.tokenize, params.mesh, params.layout, params.load, params.finetune, params.plan
    )
    # The compiler needs no device; Keras needs some JAX to declare weights with, and `cpu:N` as many as it says.
    devices.configure("simulated", targets.simulated_devices(settings))
    if presets:
        presets_table.write_table(settings, presets)
    if published:
        published_table.write_table(settings, published)
    if presets or published:
        return
    inputs.declare(run.paths, "plan", "config.json", targets.own_config(settings.fetch, run.paths.root))
    targets.check(settings)
    planned, prices = {}, targets.prices(settings.plan)
    for wanted in settings.plan.targets:
        name, request = targets.compile_request_of(settings, wanted)
        price = prices.get(wanted.topology.partition(":")[0])
        target = targets.target_of(name, request, compilation.compile_step(request), price)
        planned[targets.label(target)] = target
    plan = PlanFile(
        targets=planned,
        search=search.search(settings, settings.plan.search) if settings.plan.search else None,
        scaling=search.scaling(settings, settings.plan.scaling) if settings.plan.scaling else None,
    )
    table.show(plan)
    plan.write(run.paths.write(PLAN))


if __name__ == "__main__":
    main()
