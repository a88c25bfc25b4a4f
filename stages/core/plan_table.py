"""The plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIB = 2**30


def show(entries: dict[str, dict[str, Any]], searched: dict[str, Any] | None, scaled: dict[str, Any] | None) -> None:
    """Print the targets, and the search and the scaling where there are any; sizes are for one device.

    Args:
        entries: as in `data/metrics/plan.json`.
        searched: from `plan_search.search`.
        scaled: from `plan_search.scaling`.
    """
    console = Console(width=None if Console().is_terminal else 160)
    if entries:
        console.print(
            _table(
                "Plan: what a step needs on each device",
                (
                    "target",
                    "fits",
                    "arguments",
                    "temporaries",
                    "needed",
                    "of",
                    "collectives",
                    "least step (lower bound)",
                ),
                [
                    (
                        label,
                        _yes(each["fits"]),
                        size(each.get("argument_bytes_per_device")),
                        size(each.get("temporary_bytes_per_device")),
                        size(each.get("needed_bytes_per_device")),
                        size(each.get("hbm_bytes_per_device")),
                        counts({kind: found["count"] for kind, found in each["collectives"].items()}),
                        _least(each.get("least_step_seconds"), each.get("least_step_limit"))
                        + (
                            f" (measured: {each['measured_step_seconds'] * 1e3:.0f} ms)"
                            if "measured_step_seconds" in each
                            else ""
                        ),
                    )
                    for label, each in entries.items()
                ],
            )
        )
    if searched:
        rows = [
            (
                each["name"] + (" *" if not number and each["fits"] else ""),
                str(each["largest_batch"]) if each["fits"] else each.get("reason", "does not fit"),
                "compiled" if each.get("compiled") else "extrapolated" if each["fits"] else "",
                size(each.get("needed_bytes")),
                _least(each.get("least_seconds"), each.get("least_limit")),
                f"{each['tokens_per_second_bound']:,.0f}" if each.get("tokens_per_second_bound") else "",
            )
            for number, each in enumerate(searched["candidates"])
        ]
        columns = (
            "mesh and layout",
            "largest batch",
            "figures",
            "needed",
            "least step (lower bound)",
            "tokens/s at most",
        )
        console.print(_table(f"Search: {searched['preset']} on {searched['topology']} (* best)", columns, rows))
    if scaled:
        rows = [
            (
                each["topology"],
                str(each["devices"]),
                str(tuple(each["mesh"])),
                str(each["batch_size"]),
                _yes(each["fits"]),
                size(each.get("needed_bytes")),
                counts(each.get("collectives", {})),
                _least(each.get("least_seconds"), each.get("least_limit")),
                f"{each['tokens_per_second_bound']:,.0f}" if each.get("tokens_per_second_bound") else "",
            )
            for each in scaled["rows"]
        ]
        columns = (
            *("topology", "devices", "mesh", "batch", "fits", "needed", "collectives"),
            *("least step (lower bound)", "tokens/s at most"),
        )
        console.print(_table(f"Scaling: {scaled['preset']} (extrapolated from two and four blocks)", columns, rows))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def size(value: float | None) -> str:
    """Return bytes in GiB."""
    return "" if value is None else f"{value / GIB:.2f} GiB"


def counts(collectives: dict[str, int]) -> str:
    """Return collectives as `116 all-reduce, 2 all-gather`."""
    return ", ".join(f"{count} {kind}" for kind, count in collectives.items())


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _least(seconds: float | None, limit: str | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms ({limit})"
