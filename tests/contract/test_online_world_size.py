"""Two ranks with half of the groups each learn what one rank learns with all of them.

Answers have 1 to 5 tokens, some no reward, some no end, and one rank has a group without a best
answer: means over tokens, answers and groups differ, and so do those of the ranks. What is compared
is the second step: by then the policy has left its reference, and the critic says something.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.online_toy import a_policy_folder

SCRIPT = """
import json
import sys
import numpy as np
from dataclasses import replace
from pathlib import Path
from tests.online_toy import PROMPTS, Toy, a_config, a_process_group

folder, store = Path(sys.argv[1]), sys.argv[2]
rank, num_ranks = int(sys.argv[3]), int(sys.argv[4])
with a_process_group(rank, num_ranks, store):
    for name, (method, changes) in json.loads(sys.argv[5]).items():
        engine = {"learning_rate": 0.01, "zero_stage": 2}
        workers = {"num_workers": num_ranks}
        toy = Toy(folder, a_config(method, engine=engine, workers=workers, **changes))
        single = toy.answers(0, list(PROMPTS))
        drawn = [answer.token_ids[0] for answer in single]
        answers = [
            replace(
                answer,
                token_ids=tuple(drawn[(i + 3 * k) % len(drawn)] for k in range(1 + i % 5)),
                sampler_logprobs=(-2.0,) * (1 + i % 5),
                reward=None if i % 7 == 0 else float(i % 3 if i < 24 else 1),
                is_truncated=i % 6 == 5,
            )
            for i, answer in enumerate(single)
        ]
        mine = set(list(PROMPTS)[rank::num_ranks])
        for step in range(2):
            values = toy.learner.learn([a for a in answers if a.prompt_id in mine], step)
        values["norm"] = toy.engine.grad_norm
        if toy.critic is not None:
            values["critic_norm"] = toy.critic.engine.grad_norm
        if rank == 0:
            np.savez(f"{store}-{name}.npz", **values)
"""
KL = {"kl": {"coefficient": 0.1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo-tokens": ("grpo", KL),
    "grpo-sequences": ("grpo", KL | {"grpo": {"normalised_over": "sequences"}}),
    "ppo": ("ppo", KL),
    "ppo-not-whitened": ("ppo", KL | {"ppo": {"whiten_advantages": False}}),
    "online-dpo": ("online_dpo", {}),
}

Learned = dict[str, float]


def learned(folder: Path, num_ranks: int) -> dict[str, Learned]:
    """Return what each case reports; to start a process takes longer than all of them."""
    store = folder.parent / f"store-{num_ranks}"
    command = [sys.executable, "-c", SCRIPT, folder, store]
    processes = [
        subprocess.Popen([*command, str(rank), str(num_ranks), json.dumps(CASES)])
        for rank in range(num_ranks)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * num_ranks
    found: dict[str, Learned] = {}
    for case in CASES:
        with np.load(f"{store}-{case}.npz") as values:
            found[case] = {name: float(values[name]) for name in values.files}
    return found


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Learned]]:
    folder = a_policy_folder(tmp_path_factory.mktemp("world") / "policy")
    return [learned(folder, num_ranks) for num_ranks in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_does_not_depend_on_the_number_of_ranks(
    one_and_two: list[dict[str, Learned]], case: str
):
    one, two = (learned[case] for learned in one_and_two)
    assert one["norm"] > 0
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
