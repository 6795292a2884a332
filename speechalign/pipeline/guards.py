"""What the evaluations of a run say of its iterations, and the best one as an artifact.

RUN/best/manifest.json     iteration, policy (a path relative to RUN), reason, comparisons
"""

import os
from pathlib import Path

import pyarrow.parquet as pq

from speechalign.artifacts import committed_folder, is_committed
from speechalign.config.align import AlignConfig
from speechalign.evaluation.guards import Verdict, judge
from speechalign.sampling.pipeline import SCORED

SOUND = ("waveform_pcm", "reference_pcm")


def judge_iterations(config: AlignConfig) -> Verdict:
    """Return the verdict on the iterations evaluated so far; the same files give the same one."""
    files = [
        config.run_dir / f"iteration-{number}" / "evaluation" / SCORED
        for number in range(config.pipeline.iterations + 1)
    ]
    tables = [
        pq.read_table(file, columns=[c for c in pq.read_schema(file).names if c not in SOUND])
        for file in files
        if is_committed(file.parent)
    ]
    return judge(tables, config.pipeline.guards, config.evaluation.num_resamples)


def write_best(verdict: Verdict, policy: Path, folder: Path) -> None:
    """Commit which policy is the best.

    Args:
        verdict: of all iterations that were run.
        policy: the folder of the best policy.
        folder: in the run directory; the path of the policy is relative to that.
    """
    relative = os.path.relpath(policy.resolve(), folder.resolve().parent)
    facts = verdict.to_json() | {"kind": "best", "iteration": verdict.best, "policy": relative}
    del facts["best"]
    with committed_folder(folder, facts):
        pass
