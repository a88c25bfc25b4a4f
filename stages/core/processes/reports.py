"""What the processes of a run report to the first, by topic."""

from __future__ import annotations

import threading
from typing import Any


class Reports:
    """Reports that have come in and were not taken yet; any thread may put and take."""

    def __init__(self) -> None:
        """Begin with none."""
        self._arrived = threading.Condition()
        self._by_topic: dict[str, dict[int, Any]] = {}

    def put(self, number: int, topic: str, content: Any) -> None:
        """Take in what a process reports."""
        with self._arrived:
            self._by_topic.setdefault(topic, {})[number] = content
            self._arrived.notify_all()

    def take(self, topic: str, count: int) -> list[Any]:
        """Wait until as many processes have reported on a topic, and return what, in the order of their numbers."""
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._by_topic.get(topic, {})) >= count)
            return [content for _, content in sorted(self._by_topic.pop(topic).items())]
