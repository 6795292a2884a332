"""Two ranks with half of the groups each learn what one rank learns with all of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.online_toy import a_policy_folder

SCRIPT = """
import sys
import numpy as np
from dataclasses import replace
from pathlib import Path
from tests.online_toy import PROMPTS, Toy, a_config, a_process_group

folder, store, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rank, num_ranks = int(sys.argv[4]), int(sys.argv[5])
with a_process_group(rank, num_ranks, store):
    engine = {"learning_rate": 0.01, "zero_stage": 2}
    toy = Toy(folder, a_config(method, engine=engine, workers={"num_workers": num_ranks}))
    answers = toy.answers(0, list(PROMPTS))
    rewards = [None if i % 7 == 0 else float(i % 3) for i in range(len(answers))]
    answers = [replace(a, reward=r) for a, r in zip(answers, rewards)]
    mine = set(list(PROMPTS)[rank::num_ranks])
    values = toy.learner.learn([a for a in answers if a.prompt_id in mine], 0)
    if rank == 0:
        values = {k: v for k, v in values.items() if k != "kept_answers"}
        np.savez(sys.argv[6], norm=toy.engine.grad_norm, **values)
"""


def learned(folder: Path, method: str, num_ranks: int) -> dict[str, float]:
    output = folder.parent / f"{method}-{num_ranks}.npz"
    store = folder.parent / f"store-{method}-{num_ranks}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folder, store, method, str(rank), str(num_ranks), output]
        )
        for rank in range(num_ranks)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * num_ranks
    with np.load(output) as found:
        return {name: float(found[name]) for name in found.files}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo", "online_dpo"])
def test_the_gradient_does_not_depend_on_the_number_of_ranks(tmp_path: Path, method: str):
    folder = a_policy_folder(tmp_path / "policy")
    one, two = learned(folder, method, 1), learned(folder, method, 2)
    assert one["norm"] > 0
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
