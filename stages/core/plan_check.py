"""Before a run on real devices: what the plan said of it.

Purpose: a run that will not fit is told of before the accelerator's time is spent, not by its running out of memory.
Reads: `data/sharding/plan.json`, where it is there. It changes nothing but what is said, so no stage depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.core.files import read_json
from stages.core.params import Finetune
from stages.core.paths import PLAN

GIB = 2**30


def warn_if_planned_not_to_fit(
    root: Path, asked: Mapping[str, Any], device_bytes: int | None, say: Callable[[str], None]
) -> None:
    """Say so where the plan's answer for this very run is that it does not fit, or needs more than the devices have.

    Args:
        root: the repository's folder.
        asked: what is known of the run, by the keys of a plan's entry: from `run_of`.
        device_bytes: memory of one device as the backend tells it; None where it does not.
        say: prints one line for the person.
    """
    try:
        targets = read_json(root / PLAN)["targets"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for label, target in targets.items():
        if any(target.get(key) != value for key, value in asked.items()):
            continue
        needed = target.get("needed_bytes_per_device")
        if not target["fits"]:
            size = f" it needs {needed / GIB:.2f} GiB a device" if needed else ""
            say(f"Warning: the plan says that this run does not fit on {target['topology']}:{size} ({label}).")
        elif needed and device_bytes and needed > device_bytes:
            say(
                f"Warning: the plan says that a device needs {needed / GIB:.2f} GiB for this run, and those here have "
                f"{device_bytes / GIB:.2f} GiB ({label})."
            )


def warn_before_running(root: Path, asked: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Do that for the devices of this process; simulated ones share the host's memory, and nothing is said."""
    import jax

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        limit = (device.memory_stats() or {}).get("bytes_limit")
        warn_if_planned_not_to_fit(root, asked, limit, say)


def run_of(description: Mapping[str, Any], settings: Finetune | None = None, length: int | None = None) -> dict:
    """Return a run by the keys of a plan's entry: the loaded model, and how it is trained where that is known.

    Args:
        description: of the model, as in `models/<variant>/model.json`.
        settings: the training's.
        length: tokens a window.
    """
    run = {
        "preset": description["preset"],
        "mesh": description["mesh"]["shape"],
        "layout": description["layout"]["name"],
        "dtype": description["dtype"],
        "step": "ours",
    }
    if settings:
        run |= {key: getattr(settings, key) for key in ("batch_size", "rank", "rematerialize")}
    return run if length is None else {**run, "length": length}
