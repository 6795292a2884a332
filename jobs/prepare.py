"""Recordings to golden codec tokens, as a Ray job.

    ray job submit ... -- python jobs/prepare.py RECIPE [OVERRIDES...]

Flags and exit codes are those of `speechalign prepare`; `speechalign submit` needs no script.
"""

from speechalign.cli import main

if __name__ == "__main__":
    main("prepare")
