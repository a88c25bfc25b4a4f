"""The watchdog: every process has a connection to the first, which notices what fails and ends all.

Purpose: JAX's heartbeats see a dead process after minutes and a stuck one never; here a process that is killed, stopped
or raises, or is behind the others for too long, ends all within seconds, with its number and the reason on each.
A connection that closes is a process that died. One that is silent belongs to a process that is stopped, or whose host
is gone. A process that talks but makes no progress shows in the count of what it has begun.
"""

from __future__ import annotations

import abc
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from stages.core.processes.behind import behind
from stages.core.processes.group import Group

# Seconds between two beats, and without one after which a process is taken for stopped. gloo, by which CPU devices
# talk, gives up after 30 s of its own, with a message that names nobody.
BEAT, SILENT = 2.0, 20.0
# Seconds for which the first process waits for a better reason than an exception that is no error of the user's: a
# process whose partner died sees its collective fail.
HOLD = 5.0
NOTHING = "nothing yet"
KILLED = "ended without a word: it was killed."
STOPPED = f"has been silent for {SILENT:.0f} s: it is stopped, or its host is gone."


class Star(Group, abc.ABC):
    """What the first process and the others have in common."""

    def __init__(self, index: int, count: int, name: str) -> None:
        """Begin with nothing done.

        Args:
            index: of this process.
            count: of all.
            name: of this process for messages.
        """
        super().__init__()
        self.index, self.count, self.name = index, count, name
        self.leaving = False
        self._failing = False
        self._answered = threading.Event()
        self._shared: queue.Queue[Any] = queue.Queue()
        self._begun, self._what, self._since, self._limit = 0, NOTHING, time.monotonic(), float("inf")
        self._agreement = threading.Condition()
        self._passed, self._stop_step = 0, -1
        self._why: str | None = None
        self._asked = False

    def doing(self, what: str, limit: float) -> None:
        """Say what begins now; see `Group`."""
        self._begun, self._what, self._since, self._limit = self._begun + 1, what, time.monotonic(), limit

    def state(self) -> dict[str, Any]:
        """Return how far this process is, as its beats report."""
        return {
            "begun": self._begun,
            "what": self._what,
            "age": round(time.monotonic() - self._since, 3),
            "limit": min(self._limit, 1e9),
        }

    def stop_after(self, step: int, asked: str | None) -> str | None:
        """Return why the run stops after a step, or None; see `Group`.

        The first process asks all which step they have passed, and none passes another until it has said after which
        step all stop. Those that asks are threads: a process that waits within a step answers too.
        """
        if asked and not self._asked:
            self._asked = True
            self.ask_stop(f"{asked} to {self.name}")
        with self._agreement:
            if self._why is not None:
                self._agreement.wait_for(lambda: self._stop_step >= 0)
                if step >= self._stop_step:
                    return self._why
            self._passed = step
        return None

    @abc.abstractmethod
    def start(self) -> None:
        """Begin to watch and to be watched."""

    @abc.abstractmethod
    def ask_stop(self, why: str) -> None:
        """Ask the first process to stop all."""

    @abc.abstractmethod
    def fail(self, reason: str, certain: bool) -> None:
        """Tell all that this process ends.

        Args:
            reason: in a line.
            certain: an error of the user's or the system's; else an exception that another process's end may have
                caused: that process is named, if one is found.
        """

    @abc.abstractmethod
    def finish(self) -> None:
        """Say that this process has done its work, and wait until all have."""

    def hold_steps(self, why: str) -> int:
        """Let no step pass from now on until `go_to` is called, and return the last that did."""
        with self._agreement:
            self._why = self._why or why
            return self._passed

    def go_to(self, step: int) -> None:
        """Let steps pass up to one, after which the run stops."""
        with self._agreement:
            self._stop_step = step
            self._agreement.notify_all()

    def exit(self, reason: str) -> None:
        """End this process with a message, unless it is ending already, for a reason of its own."""
        if self.leaving:
            return
        self.leaving = True
        sys.stderr.write(f"{self.prefix}Error: {reason}\n")
        exit_now(1)


class Hub(Star):
    """The first process, to which the others are connected."""

    def __init__(self, name: str, members: dict[int, Any], names: dict[int, str]) -> None:
        """Take the connections and begin to watch.

        Args:
            name: of this process.
            members: a `Wire` to each of the others, by their numbers.
            names: theirs, for messages.
        """
        super().__init__(0, len(members) + 1, name)
        self._members, self._names = members, {0: name, **names}
        now = time.monotonic()
        self._heard = dict.fromkeys(members, now)
        self._states: dict[int, dict[str, Any]] = {}
        self._done: set[int] = set()
        self._acks: dict[int, int] | None = None
        self._held: list[tuple[float, int, str]] = []
        self._ending = threading.Lock()

    def start(self) -> None:
        """Begin to listen and to watch."""
        for number in self._members:
            _thread(functools.partial(self._listen, number))
        _thread(self._watch)

    def share(self, value: Any = None) -> Any:
        """Send a value to all."""
        self._tell_all(share=value)
        return value

    def ask_stop(self, why: str) -> None:
        """Ask all which step they have passed."""
        with self._agreement:
            if self._acks is not None:
                return
            self._acks = {}
        self._tell_all(hold=why)
        self._acknowledge(0, self.hold_steps(why))

    def fail(self, reason: str, certain: bool) -> None:
        """Tell all that this process ends; see `Star`."""
        if not certain:
            time.sleep(HOLD)
        self.leaving = True
        self._tell_all(end=f"{self.name} ended: {reason}", by=0)
        time.sleep(0.5)

    def finish(self) -> None:
        """Wait until all have done their work, and let them go."""
        while len(self._done) < len(self._members):
            time.sleep(0.02)
        self.leaving = True
        self._tell_all(bye=True)

    def _tell_all(self, **message: Any) -> None:
        for wire in self._members.values():
            wire.send(**message)

    def _end_all(self, number: int, reason: str) -> None:
        """End all for what one process did."""
        with self._ending:
            if self.leaving:
                return
            self._tell_all(end=reason, by=number)
            # The others read it before this process's end breaks their connection to JAX's coordinator.
            time.sleep(0.5)
            self.exit(reason)

    def _listen(self, number: int) -> None:
        """Take what one of the others says."""
        wire = self._members[number]
        while (message := wire.receive()) is not None:
            self._heard[number] = time.monotonic()
            if "state" in message:
                self._states[number] = message["state"]
            elif "stop" in message:
                self.ask_stop(str(message["stop"]))
            elif "passed" in message:
                self._acknowledge(number, int(message["passed"]))
            elif "done" in message:
                self._done.add(number)
            elif "report" in message:
                self.inbox.put(number, message["report"], message["content"])
            elif "failed" in message:
                reason = f"{self._names[number]} ended: {message['failed']}"
                if message["certain"]:
                    self._end_all(number, reason)
                self._held.append((time.monotonic(), number, reason))
        failed = [reason for _, who, reason in self._held if who == number]
        if number not in self._done or failed:
            self._end_all(number, failed[0] if failed else f"{self._names[number]} {KILLED}")

    def _acknowledge(self, number: int, passed: int) -> None:
        """Take the step that a process has passed; with all of them, say after which one all stop."""
        with self._agreement:
            if self._acks is None:
                return
            self._acks[number] = passed
            if len(self._acks) < self.count:
                return
            step = max(self._acks.values()) + 1
        self._tell_all(until=step)
        self.go_to(step)

    def _watch(self) -> None:
        """Send beats, and look at those of the others."""
        last = 0.0
        while not self.leaving:
            now = time.monotonic()
            if now - last >= BEAT:
                self._tell_all(beat=True)
                last = now
            for number, heard in self._heard.items():
                if number not in self._done and now - heard > SILENT:
                    self._end_all(
                        number,
                        f"{self._names[number]} {STOPPED}",
                    )
            for since, number, reason in self._held:
                if now - since > HOLD:
                    self._end_all(number, reason)
            if found := behind({0: self.state(), **self._states}, self._names):
                self._end_all(*found)
            time.sleep(0.25)


class Member(Star):
    """Any other process, which is connected to the first."""

    def __init__(self, index: int, count: int, name: str, wire: Any, first: str) -> None:
        """Take the connection.

        Args:
            index: of this process.
            count: of all.
            name: of this process for messages.
            wire: the `Wire` to the first.
            first: the first's name.
        """
        super().__init__(index, count, name)
        self._wire, self._first = wire, first

    def start(self) -> None:
        """Begin to listen and to report."""
        _thread(self._listen)
        _thread(self._beat)

    def share(self, value: Any = None) -> Any:
        """Return what the first process shares."""
        return self._shared.get()

    def report(self, topic: str, content: Any) -> None:
        """Tell the first process something; see `Group`."""
        self._wire.send(report=topic, content=content)

    def ask_stop(self, why: str) -> None:
        """Ask the first process to stop all."""
        self._wire.send(stop=why)

    def fail(self, reason: str, certain: bool) -> None:
        """Tell the first process that this one ends; see `Star`."""
        self._failing, self.leaving = True, certain
        self._wire.send(failed=reason, certain=certain)
        self._answered.wait(HOLD + 3)
        self.leaving = True

    def finish(self) -> None:
        """Say that this process has done its work, and wait for the others."""
        self._wire.send(done=True)
        self._answered.wait()
        self.leaving = True

    def _beat(self) -> None:
        while not self.leaving and self._wire.send(state=self.state()):
            time.sleep(BEAT)

    def _listen(self) -> None:
        """Take what the first process says, and end if it says nothing."""
        try:
            while (message := self._wire.receive(SILENT)) is not None:
                if "share" in message:
                    self._shared.put(message["share"])
                elif "hold" in message:
                    self._wire.send(passed=self.hold_steps(str(message["hold"])))
                elif "until" in message:
                    self.go_to(int(message["until"]))
                elif "bye" in message:
                    self.leaving = True
                    self._answered.set()
                elif "end" in message:
                    # A process that ends for this very reason says so itself.
                    if not (self._failing and message["by"] == self.index):
                        self.exit(str(message["end"]))
                    self.leaving = True
                    self._answered.set()
            self.exit(f"{self._first}, which coordinates, {KILLED}")
        except TimeoutError:
            self.exit(f"{self._first}, which coordinates, {STOPPED}")


def exit_now(code: int) -> NoReturn:
    """End this process without waiting for anything: a collective that waits for a dead process cannot be left."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


def _thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
