"""Imports what workers need, then forks one for each connection until its standard input ends."""

import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

IMPORTS = (
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pandas",
    "pydantic",
    "grpc",
    "fastapi",
    "sklearn.metrics",
    "transformers.models.auto.auto_factory",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "vllm",
)
"""Not Ray: it reads the worker's environment when it is imported. Not ours: that takes 0.1 s."""


class Server:
    """Forks workers and tells each launcher how its worker ended."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.launchers: dict[int, socket.socket] = {}
        self.deaths, self.death = os.pipe()
        self.selector = selectors.DefaultSelector()
        for readable in (self.listener, sys.stdin, self.deaths):
            self.selector.register(readable, selectors.EVENT_READ)

    def run(self) -> dict[str, Any] | None:
        """Return None when all is over, and in a forked process what it shall be."""
        os.set_blocking(self.death, False)
        signal.set_wakeup_fd(self.death)
        signal.signal(signal.SIGCHLD, wake)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self.listener:
                    request = self.fork(self.listener.accept()[0])
                    if request:
                        return request
                else:
                    os.read(self.deaths, 4096)
                    self.reap()

    def fork(self, launcher: socket.socket) -> dict[str, Any] | None:
        size, streams, _, _ = socket.recv_fds(launcher, 4, 3)
        if not streams:  # ended before it could ask
            launcher.close()
            return None
        payload = launcher.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
        pid = os.fork()
        if pid:
            self.launchers[pid] = launcher
        else:
            self.leave(launcher)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        return None if pid else json.loads(payload)

    def leave(self, launcher: socket.socket) -> None:
        """Be a server no more, and in a group of one's own: Ray cleans up by process group."""
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for connection in (self.listener, launcher, *self.launchers.values()):
            connection.close()
        os.close(self.deaths)
        os.close(self.death)

    def reap(self) -> None:
        while self.launchers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            # Ray may have ended the launcher before its worker.
            with self.launchers.pop(pid) as launcher, suppress(OSError):
                launcher.send(bytes([code if code >= 0 else 128 - code]))


def wake(number: int, frame: object) -> None:
    """Do nothing: the pipe has a byte of the signal, and that wakes the loop."""


def be_worker(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    np.random.seed(None)  # noqa: NPY002 - libraries draw from it
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    wanted = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = [path for path in wanted if path not in sys.path]  # of a job's directory
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # no collection copies the pages that workers share
    request = server.run()
    if request:
        be_worker(request)


if __name__ == "__main__":
    main()
