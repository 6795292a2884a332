"""Run an alignment as far as its new policy, as a Ray job.

    ray job submit ... -- python jobs/train.py RECIPE [OVERRIDES...]

Flags and exit codes are those of `speechalign train`; `speechalign submit` needs no script.
"""

from speechalign.cli import main

if __name__ == "__main__":
    main("train")
