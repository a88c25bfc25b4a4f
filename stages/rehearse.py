"""Rehearse a run of several processes on this machine: tiny weights, a few steps, compared with one process.

Reads: `models/preset/manifest.json` and the preset's configuration; all settings. Writes nothing.
Command: `python -m stages.rehearse --processes 4 --devices 2`
"""

from __future__ import annotations

from stages.core.cli import Run, click, logger, stage


@stage
@click.option("--processes", type=click.IntRange(2, 64), default=2, show_default=True, help="Processes to start.")
@click.option("--devices", type=click.IntRange(1, 64), default=2, show_default=True, help="Simulated devices of each.")
@click.option("--steps", type=click.IntRange(1, 100), default=3, show_default=True, help="Steps to train.")
def main(run: Run, processes: int, devices: int, steps: int) -> None:
    """Rehearse a run of several processes on this machine, and compare it with one process."""
    from stages.core.rehearse.rehearsing import rehearse

    logger.info(f"Rehearsing {steps} steps on one process, then on {processes} ...")
    for line in rehearse(run, processes, devices, steps).lines:
        click.echo(line)


if __name__ == "__main__":
    main()
