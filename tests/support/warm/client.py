"""Takes the place of `python`: asks the server beside it to fork, and ends as the forked process does.

It is run by `python -IS`, which starts in a hundredth of a second, so it imports little.
"""

import os
import signal
import socket
import sys

SOCKET = sys.argv[0].rpartition("/")[0] + "/socket"
# What these libraries read when they are imported: the server has imported them with these two.
READ_BY_IMPORTS = ("JAX_", "XLA_", "KERAS_", "LIBTPU_", "NVIDIA_")
AS_IMPORTED = {"KERAS_BACKEND": "jax", "KERAS_HOME": os.devnull}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def main():
    """Pass on arguments, environment, folder, standard streams and signals."""
    others = os.environ.items() - AS_IMPORTED.items()
    if sys.argv[1:2] not in (["-m"], ["-c"]) or any(name.startswith(READ_BY_IMPORTS) for name, _ in others):
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    mask = os.umask(0)
    os.umask(mask)
    environment = [f"{name}={value}" for name, value in os.environ.items()]
    # pathlib takes longer to import than all else here.
    folder = os.getcwd()  # noqa: PTH109
    parts = [folder, str(mask), str(len(sys.argv) - 1), *sys.argv[1:], *environment]
    request = "\0".join(parts).encode("utf-8", "surrogateescape")
    server = socket.socket(socket.AF_UNIX)
    server.connect(SOCKET)
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: server.sendall(bytes([received])))
    answer = b""
    while len(answer) < 4:
        part = server.recv(4 - len(answer))
        if not part:
            sys.exit("the server that forks processes for tests has ended")
        answer += part
    end = os.waitstatus_to_exitcode(int.from_bytes(answer, "big"))
    if end < 0:
        if -end != signal.SIGKILL:
            signal.signal(-end, signal.SIG_DFL)
        os.kill(os.getpid(), -end)
    os._exit(end)


main()
