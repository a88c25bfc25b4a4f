"""Shard and load: load the model directly into its shards on the device mesh, and report every weight's sharding.

Reads: `models/preset/manifest.json` and the preset's files, `models/quantized`; params `mesh`, `layout`, `load`.
Writes: `models/baseline/model.json`, `data/sharding/base.json`, `data/metrics/load.json`; prints the tutorial's table.
Command: `python -m stages.load`. With `--dry-run` it takes no devices and writes nothing: it prints the sharding of all
weights, LoRA kernels and optimizer slots, of the fetched preset or of any public Gemma (`--preset`).
"""

from __future__ import annotations

import time

from stages.core.cli import Run, click, logger, stage
from stages.core.common.errors import ParamsError


@stage
@click.option("--dry-run", is_flag=True, help="Only print every weight's sharding: no weights, no devices.")
@click.option(
    "--preset",
    "public",
    metavar="NAME",
    help="With --dry-run: a public Gemma such as gemma_7b_en instead of the fetched preset.",
)
def main(run: Run, dry_run: bool, public: str | None) -> None:
    """Load the model into its shards on the device mesh."""
    if public and not dry_run:
        raise ParamsError(f"--preset goes with --dry-run; load takes the fetched preset. Received: --preset={public}")
    if dry_run:
        from stages.core.preview.dry_run import dry_run as describe

        click.echo(describe(run, public))
        return
    logger.info("Loading the model into its shards ...")
    from stages.core.common import host_memory
    from stages.core.common.paths import SHARDING
    from stages.core.load import variants
    from stages.core.preview.run_check import run_of, warn_before_running
    from stages.core.records.load import LoadMetrics
    from stages.core.sharding import table
    from stages.core.sharding.layout import check_adapters, check_replication
    from stages.core.sharding.mesh import warn_of_slow_network
    from stages.core.sharding.named_layouts import make_layout, replication_advice

    began = time.perf_counter()
    params = run.params
    preset, mesh = variants.open_preset(run.paths), params.mesh.as_shape()
    layout = make_layout(params.layout, preset.architecture, mesh)
    chosen = variants.chosen_codes(run.paths, preset.fingerprint, params.load.dtype)
    config = variants.model_config(preset, params.load.dtype, mesh, layout, chosen)
    model = variants.declare_model(config, preset.architecture, None)
    check_adapters(layout.rules, [placement.weight for placement in model.placements], mesh)
    warn_before_running(run.paths.root, run_of(config))
    warn_of_slow_network(model.jax_mesh, model.model_axis_bytes)
    advice = replication_advice(params.layout, preset.architecture, model.placements, mesh)
    fraction = check_replication(model.placements, mesh, params.layout.max_replicated_fraction, advice)
    variants.fill_model(model, preset, {}, chosen=chosen)
    variants.check_placed(model)
    report = table.report(
        model.placements,
        model.mesh_shape,
        preset=config.preset,
        layout=layout,
        dtype=config.dtype,
        trainable_parameters=0,
    )
    if not run.first:
        return
    click.echo(table.block_table(model.placements))
    if sizes := table.quantized_sizes(model.placements):
        logger.info(sizes)
    for fallback in layout.fallbacks:
        logger.info(f"Layout: {fallback}")
    config.write(run.paths.write("models/baseline/model.json"))
    report.write(run.paths.write(SHARDING["baseline"]))
    run.write_metrics(
        "load",
        LoadMetrics(
            seconds=round(time.perf_counter() - began, 3),
            peak_host_bytes=host_memory.peak_host_bytes(),
            parameters=report.parameters,
            devices=mesh.devices,
            bytes_per_device_max=report.bytes_per_device,
            replicated_fraction=round(fraction, 6),
        ),
    )


if __name__ == "__main__":
    main()
