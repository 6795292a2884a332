"""Train an AR or a NAR model, as a Ray job.

    ray job submit ... -- python jobs/sft.py RECIPE [OVERRIDES...]

Flags and exit codes are those of `speechalign sft`; `speechalign submit` needs no script.
"""

from speechalign.cli import main

if __name__ == "__main__":
    main("sft")
