"""A command whose cluster forks its workers from the server of the tests that started it.

python -m tests.ray.warm_workers.command ray start --head
"""

import sys
from importlib.metadata import entry_points

from tests.ray.warm_workers import use_launcher


def main() -> None:
    use_launcher()
    sys.argv = sys.argv[1:]
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(script.load()())


if __name__ == "__main__":
    main()
