"""The plan as tables for the terminal; sizes are per device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.common.sizes import gibibytes
from stages.core.records.plan import Estimate, PlanFile, Scaling, Search, StepTime, Target

BOUND = "step time >= (lower bound)"
ESTIMATE = "estimated"


def show(plan: PlanFile) -> None:
    """Print the targets, and the search and the scaling where there are any."""
    console = Console(width=None if Console().is_terminal else 160)
    if plan.targets:
        console.print(_targets(plan.targets))
    if any(target.step_time for target in plan.targets.values()):
        console.print(_times(plan.targets))
    if plan.search:
        console.print(_search(plan.search))
    if plan.scaling:
        console.print(_scaling(plan.scaling))


def _targets(targets: Mapping[str, Target]) -> Table:
    columns = ("target", "fits", "arguments", "temporaries", "needed", "of", "collectives", BOUND)
    rows = [
        (
            label,
            _yes(target.fits),
            size(target.argument_bytes_per_device),
            size(target.temporary_bytes_per_device),
            size(target.needed_bytes_per_device),
            size(target.hbm_bytes_per_device),
            _counts({kind: collective.count for kind, collective in target.collectives.items()}),
            _bound(target),
        )
        for label, target in targets.items()
    ]
    return _table("Plan: what a step needs on each device", columns, rows)


def _times(targets: Mapping[str, Target]) -> Table:
    priced = any(target.price_per_chip_hour for target in targets.values())
    columns = ["target", "step time >=", ESTIMATE, "of peak", *StepTime.model_fields, "1,000 steps"]
    rows = [
        (
            label,
            milliseconds(target.step_seconds_lower_bound),
            milliseconds(target.estimated_step_seconds),
            f"{target.share_of_peak or 0:.0%}",
            *(milliseconds(seconds) for _, seconds in target.step_time),
            _thousand(target),
        )
        for label, target in targets.items()
        if target.step_time
    ]
    title = "Plan: how long a step takes by the compiler's own estimate, and what that is spent on"
    return _table(title + (" (prices: plan.price_per_chip_hour)" if priced else ""), columns, rows)


def _thousand(target: Target) -> str:
    hours = 1000 * (target.estimated_step_seconds or 0) / 3600
    price = target.price_per_chip_hour
    return f"{hours:.3g} h" + (f", {hours * target.chips * price:,.2f}" if price else "")


def _search(search: Search) -> Table:
    columns = ("mesh and layout", "largest batch", "figures", "needed", BOUND, ESTIMATE, "tokens/s")
    rows = [
        (
            row.name + (" *" if not number and row.fits else ""),
            str(row.largest_batch) if row.fits else row.reason or "does not fit",
            "compiled" if row.compiled else "extrapolated" if row.fits else "",
            size(row.needed_bytes),
            _bound(row),
            milliseconds(row.estimated_step_seconds),
            _tokens(row),
        )
        for number, row in enumerate(search.candidates)
    ]
    return _table(f"Search: {search.preset} on {search.topology} (* best)", columns, rows)


def _scaling(scaling: Scaling) -> Table:
    columns = ("topology", "devices", "mesh", "batch", "fits", "needed", "collectives", BOUND, ESTIMATE, "tokens/s")
    rows = [
        (
            row.topology,
            str(row.devices),
            str(tuple(row.mesh)),
            str(row.batch_size),
            _yes(row.fits),
            size(row.needed_bytes),
            _counts(row.collectives),
            _bound(row),
            milliseconds(row.estimated_step_seconds),
            _tokens(row),
        )
        for row in scaling.rows
    ]
    return _table(f"Scaling: {scaling.preset} (extrapolated from programs of a few blocks)", columns, rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def size(value: float | None) -> str:
    """Return bytes in GiB."""
    return "" if value is None else gibibytes(value)


def milliseconds(seconds: float | None) -> str:
    """Return a time in ms."""
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _counts(collectives: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in collectives.items())


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _bound(row: Target | Estimate) -> str:
    seconds = row.step_seconds_lower_bound
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms ({row.bound_by})"


def _tokens(row: Estimate) -> str:
    """Tokens per second; where there is but a bound of the time, no more than these."""
    return "" if not row.speed else f"{'' if row.tokens_per_second else '<= '}{row.speed:,.0f}"
