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

folder, store = Path(sys.argv[1]), sys.argv[2]
rank, num_ranks = int(sys.argv[3]), int(sys.argv[4])
with a_process_group(rank, num_ranks, store):
    for method in sys.argv[5:]:
        engine = {"learning_rate": 0.01, "zero_stage": 2}
        toy = Toy(folder, a_config(method, engine=engine, workers={"num_workers": num_ranks}))
        answers = toy.answers(0, list(PROMPTS))
        rewards = [None if i % 7 == 0 else float(i % 3) for i in range(len(answers))]
        answers = [replace(a, reward=r) for a, r in zip(answers, rewards)]
        mine = set(list(PROMPTS)[rank::num_ranks])
        values = toy.learner.learn([a for a in answers if a.prompt_id in mine], 0)
        if rank == 0:
            values = {k: v for k, v in values.items() if k != "kept_answers"}
            np.savez(f"{store}-{method}.npz", norm=toy.engine.grad_norm, **values)
"""
METHODS = ("grpo", "ppo", "online_dpo")

Learned = dict[str, float]


def learned(folder: Path, num_ranks: int) -> dict[str, Learned]:
    """Return what each method reports; to start a process takes longer than all of them."""
    store = folder.parent / f"store-{num_ranks}"
    command = [sys.executable, "-c", SCRIPT, folder, store]
    processes = [
        subprocess.Popen([*command, str(rank), str(num_ranks), *METHODS])
        for rank in range(num_ranks)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * num_ranks
    found: dict[str, Learned] = {}
    for method in METHODS:
        with np.load(f"{store}-{method}.npz") as values:
            found[method] = {name: float(values[name]) for name in values.files}
    return found


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Learned]]:
    folder = a_policy_folder(tmp_path_factory.mktemp("world") / "policy")
    return [learned(folder, num_ranks) for num_ranks in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_does_not_depend_on_the_number_of_ranks(
    one_and_two: list[dict[str, Learned]], method: str
):
    one, two = (learned[method] for learned in one_and_two)
    assert one["norm"] > 0
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
