"""Ray's workers, forked from one process that has imported what they need.

A worker of a tiny run spends more time on importing torch, transformers and DeepSpeed than on its
work, and the tests start hundreds: with this they take a third of the time. Ray starts
`launcher.py` in place of each worker; it has `server.py` fork one and stays until that has ended.
From Ray's own `default_worker.py` on, a forked worker does what any other does.

`command.py` gives the same to a command that a test starts (`ray start`, `speechalign align`). The
demo of `.ci/run` has Ray's usual workers.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._private import ray_constants

HERE = Path(__file__).parent
ADDRESS = "SPEECHALIGN_WARM_WORKERS"
"""The environment variable that tells launchers where the server listens."""


@contextmanager
def warm_workers() -> Iterator[None]:
    """Have the clusters that this process starts inside the block fork their workers."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ADDRESS] = f"{folder}/socket"
        server = start_server(os.environ[ADDRESS])
        usual = ray_constants.SETUP_WORKER_FILENAME
        use_launcher()
        try:
            yield
        finally:
            ray_constants.SETUP_WORKER_FILENAME = usual
            del os.environ[ADDRESS]
            server.communicate(timeout=30)  # its standard input ends, and so does it


def use_launcher() -> None:
    """Have the clusters that this process starts start the launcher in place of each worker."""
    ray_constants.SETUP_WORKER_FILENAME = str(HERE / "launcher.py")


def start_server(address: str) -> subprocess.Popen[bytes]:
    """Start it with a socket that listens already: launchers wait until it has imported."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        number = listener.fileno()
        command = [sys.executable, str(HERE / "server.py"), str(number)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number])
