"""Plan: the real TPU compiler tells what a train step will need, with no TPU at hand.

Reads: params `plan`, and `fetch`, `tokenize`, `mesh`, `layout`, `load` and `finetune` for what its entries leave out;
no weights, no data.
Writes: `data/metrics/plan.json`, `data/sharding/plan.json`; prints a table. Answers are kept in the cache folder. With
--presets the README's table, and nothing else.
Command: `python -m stages.plan`
"""

from __future__ import annotations

from pathlib import Path

from stages.core.cli import Run, click, stage


@stage
@click.option(
    "--presets",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only write the table of all public presets between its marks in this file, such as README.md (half an hour).",
)
def main(run: Run, presets: Path | None) -> None:
    """Tell what train steps need on devices that are not at hand, by compiling them."""
    from stages.core import devices, inputs, plan_targets
    from stages.core.files import write_json
    from stages.core.paths import PLAN

    params = run.params
    settings = plan_targets.Settings(
        params.fetch, params.tokenize, params.mesh, params.layout, params.load, params.finetune, params.plan
    )
    # The compiler needs no device; Keras needs some JAX to declare weights with, and `cpu:N` as many as it says.
    devices.configure("simulated", plan_targets.simulated_devices(settings))
    from stages.core import plan_presets, plan_search, plan_table, planning

    if presets:
        plan_presets.write_table(settings, presets, run.say)
        return
    inputs.declare(run.paths, "plan", "config.json", plan_targets.own_config(settings.fetch, run.paths.root))
    entries, details = {}, {}
    for target in settings.plan.targets:
        name, question = plan_targets.question_of(settings, target)
        found = planning.answer(question, run.say)
        label = plan_targets.label(name, question)
        entries[label] = plan_targets.entry(name, question, found)
        details[label] = plan_targets.details(name, question, found)
    searched = plan_search.search(settings, settings.plan.search, run.say) if settings.plan.search else None
    scaled = plan_search.scaling(settings, settings.plan.scaling, run.say) if settings.plan.scaling else None

    plan_table.show(entries, searched, scaled)
    write_json(run.paths.write(PLAN), {"targets": details, "search": searched, "scaling": scaled})
    run.write_metrics("plan", entries)


if __name__ == "__main__":
    main()
