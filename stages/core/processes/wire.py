"""Messages between two processes of a run: JSON, one per line, over a TCP connection."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

# Far more than the state of any run; what is longer is no message of ours.
LONGEST = 1 << 28


class Wire:
    """A connection. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected socket."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._stream = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, **message: Any) -> bool:
        """Send a message; False if the other end is gone."""
        content = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(content)
        except OSError:
            return False
        return True

    def receive(self, silence: float | None = None) -> dict[str, Any] | None:
        """Return the next message, or None if the other end is gone or talks of something else.

        Args:
            silence: seconds to wait for it; None: any time.

        Raises:
            TimeoutError: nothing came; the connection is of no use then.
        """
        self._socket.settimeout(silence)
        try:
            line = self._stream.readline(LONGEST)
            message = json.loads(line) if line.endswith(b"\n") else None
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._socket.close()
