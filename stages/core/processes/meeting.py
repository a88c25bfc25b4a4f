"""Where the processes of a run meet before JAX starts: at the coordinator's port, which is JAX's own afterwards.

Purpose: while one waits it says for whom, which JAX's own start does not, and what must be the same on all is compared
before anything is loaded. Nothing here authenticates the others, nor does JAX's coordinator: the network between the
hosts must be a private one.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from stages.core.common.errors import StageError, shown
from stages.core.processes import facts as comparing
from stages.core.processes.star import Hub, Member, Star
from stages.core.processes.wire import Wire

logger = logging.getLogger(__name__)

# What each says first: anything else that connects is none of ours.
GREETING = "gemma-tuning 1"
# Seconds between two lines that say for whom one waits, and for which a first message may take.
TELL, FIRST_WORD = 10.0, 5.0


def meet(address: str, index: int, count: int, facts: Mapping[str, str], timeout: float) -> Star:
    """Wait for the others, compare what must be the same, and return this process's end of the connections.

    Args:
        address: host:port of the first process.
        index: of this process.
        count: of all.
        facts: from `facts.facts_of`.
        timeout: seconds to wait, `mesh.join_timeout`.

    Raises:
        StageError: not all came in time, the port is taken, or a process differs.
    """
    name = f"process {index} of {count} ({socket.gethostname()}, pid {os.getpid()})"
    greeting = {"greeting": GREETING, "index": index, "count": count, "name": name, "facts": dict(facts)}
    deadline = time.monotonic() + timeout
    if index == 0:
        return _receive_all(address, greeting, deadline, timeout)
    return _go_there(address, greeting, deadline, timeout)


def _receive_all(address: str, own: dict[str, Any], deadline: float, timeout: float) -> Hub:
    """Take the others' connections, as the first process."""
    port, count = int(address.rpartition(":")[2]), own["count"]
    wires: dict[int, Wire] = {}
    greetings = {0: own}
    try:
        listener = _listener(port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise StageError(
            f"The coordinator's port must be free on this host. Received: {address}, in use: by another run?\n"
            "Name another port, or end that run."
        ) from error
    with listener:
        told = 0.0
        while len(greetings) < count:
            now = time.monotonic()
            here = ", ".join(greetings[number]["name"] for number in sorted(greetings))
            missing = [number for number in range(count) if number not in greetings]
            waiting = f"waits for {len(missing)} of {count} processes: {', '.join(map(str, missing))}; here: {here}"
            if now > deadline:
                reason = f"All processes must join within {timeout:.0f} s (mesh.join_timeout). Received: {waiting}"
                _tell(wires, end=reason)
                raise StageError(reason)
            if now - told >= TELL:
                told = now
                logger.info(f"Process 0 {waiting} ({address})")
                _tell(wires, waiting=waiting)
            listener.settimeout(min(1.0, TELL))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            _admit(Wire(connection), wires, greetings, count)
    numbers = sorted(greetings)
    names = {number: greetings[number]["name"] for number in numbers}
    differs = comparing.difference([greetings[each]["facts"] for each in numbers], list(names.values()))
    if differs:
        _tell(wires, end=differs)
        raise StageError(differs)
    _tell(wires, go=True, first=own["name"])
    return Hub(own["name"], wires, {number: names[number] for number in wires})


def _listener(port: int) -> socket.socket:
    """Return a socket that listens on all of this host's addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _admit(wire: Wire, wires: dict[int, Wire], greetings: dict[int, dict[str, Any]], count: int) -> None:
    """Take one process in, or refuse it."""
    try:
        greeting = wire.receive(FIRST_WORD) or {}
    except TimeoutError:
        greeting = {}
    number = greeting.get("index")
    if greeting.get("greeting") != GREETING or not isinstance(number, int):
        wire.close()
        return
    reason = ""
    if greeting["count"] != count:
        reason = f"All processes must be told the same number. Received: {greeting['count']}, and {count} by process 0."
    elif number in greetings:
        taken = greetings[number]["name"]
        reason = f"Each process must have a number of its own. Received: {number}, which {taken} has: another run?"
    if reason:
        wire.send(end=reason)
        wire.close()
        return
    wires[number], greetings[number] = wire, greeting


def _tell(wires: Mapping[int, Wire], **message: Any) -> None:
    for wire in wires.values():
        wire.send(**message)


def _go_there(address: str, own: dict[str, Any], deadline: float, timeout: float) -> Member:
    """Connect to the first process and wait for its word, as any other."""
    me = f"Process {own['index']} of {own['count']}"
    wire = Wire(_connected(address, me, deadline, timeout))
    wire.send(**own)
    while True:
        try:
            # The first process gives up by the same limit, and says who is missing.
            message = wire.receive(max(deadline - time.monotonic(), 0.0) + 3 * TELL)
        except TimeoutError:
            message = None
        if message is None:
            raise StageError(
                f"{me} must be answered by process 0 of the same run. Received: no word from {address}: it "
                "ended, or it is another program."
            )
        if "end" in message:
            raise StageError(shown(message["end"], 2000))
        if "go" in message:
            return Member(own["index"], own["count"], own["name"], wire, str(message["first"]))
        if "waiting" in message:
            logger.info(f"{me} {shown(message['waiting'], 2000)} ({address})")


def _connected(address: str, me: str, deadline: float, timeout: float) -> socket.socket:
    """Return a connection to the first process, once it listens."""
    host, _, port = address.rpartition(":")
    told = 0.0
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=FIRST_WORD)
        except OSError as error:
            now = time.monotonic()
            if now > deadline:
                raise StageError(
                    f"{me} must reach process 0 within {timeout:.0f} s (mesh.join_timeout). Received: {address}: "
                    f"{error.strerror or error}\nStart process 0 on that host, or name it by COORDINATOR_ADDRESS."
                ) from error
            if now - told >= TELL:
                told = now
                logger.info(f"{me} waits for process 0 at {address} ({error.strerror or error})")
        time.sleep(0.25)
