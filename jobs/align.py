"""Run every stage of an alignment, as a Ray job.

    ray job submit ... -- python jobs/align.py RECIPE [OVERRIDES...]

Flags and exit codes are those of `speechalign align`; `speechalign submit` needs no script.
"""

from speechalign.cli import main

if __name__ == "__main__":
    main("align")
