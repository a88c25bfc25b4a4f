"""Which process keeps the others waiting, from how far each says it is."""

from __future__ import annotations

from typing import Any


def behind(states: dict[int, dict[str, Any]], names: dict[int, str]) -> tuple[int, str] | None:
    """Return the process that is stuck and why, or None: of those that do not get on, the one that began the least.

    Args:
        states: of each process, as `Star.state` returns them: what it has begun, since when (`age`, seconds) and for
            how long it may take (`limit`, seconds).
        names: of the processes.
    """
    least = min(state["begun"] for state in states.values())
    last = {number: state for number, state in states.items() if state["begun"] == least}
    if not all(state["age"] > state["limit"] for state in last.values()):
        return None
    number, state = next(iter(last.items()))
    stuck = f"{state['what']} has not ended within {state['limit']:.0f} s"
    if len(last) == len(states):
        return number, f"All processes are stuck: {stuck} on any."
    others = "" if len(last) == 1 else f" (and {len(last) - 1} more)"
    return number, f"{names[number]}{others} is stuck, and the others wait for it: {stuck}."
