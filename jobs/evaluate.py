"""Run an alignment as far as its measurements, as a Ray job.

    ray job submit ... -- python jobs/evaluate.py RECIPE [OVERRIDES...]

Flags and exit codes are those of `speechalign evaluate`; `speechalign submit` needs no script.
"""

from speechalign.cli import main

if __name__ == "__main__":
    main("evaluate")
