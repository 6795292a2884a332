"""What Ray starts as a worker: has the server fork one and lives as long as it does.

No module of Ray is imported here: it would take longer than the rest of a worker's start.
"""

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

CONTEXT = "--serialized-runtime-env-context="


def main(arguments: list[str]) -> int:
    """Return how the worker ended.

    Args:
        arguments: Ray's for `setup_worker.py`: the script of its worker, that one's arguments, and
            the runtime environment if there is one.
    """
    contexts = [part.removeprefix(CONTEXT) for part in arguments if part.startswith(CONTEXT)]
    context = json.loads(contexts[0] if contexts else "{}")
    folder = folder_of(context)
    rest = [part for part in arguments if not part.startswith((CONTEXT, "--language="))]
    if not rest[0].endswith(".py"):  # `-m` and a module: another process that Ray sets up so
        become_usual_worker(arguments)
    with socket.socket(socket.AF_UNIX) as server:
        if folder is None or server.connect_ex(os.environ["SPEECHALIGN_WARM_WORKERS"]):
            become_usual_worker(arguments)
        request = {
            "arguments": rest,
            "environment": dict(os.environ) | context.get("env_vars", {}),
            "folder": folder,
        }
        return fork(server, request)


def folder_of(context: dict[str, Any]) -> str | None:
    """Return where a worker works, or None if it cannot be forked: it has a command of its own."""
    match [context.get("override_worker_entrypoint"), context.get("command_prefix") or []]:
        case [None, []]:
            return str(Path.cwd())
        case [None, ["cd", quoted, "&&"]]:  # the working directory of a job
            return shlex.split(quoted)[0]
        case _:
            return None


def fork(server: socket.socket, request: dict[str, Any]) -> int:
    payload = json.dumps(request).encode()
    socket.send_fds(server, [len(payload).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(payload)
    return int.from_bytes(server.recv(1))  # nothing comes from a server that is gone


def become_usual_worker(arguments: list[str]) -> None:
    from ray._private import workers

    setup = Path(workers.__path__[0]) / "setup_worker.py"
    os.execv(sys.executable, [sys.executable, str(setup), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
