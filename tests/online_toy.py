"""A bandit for the online methods: one token an answer, one of which is right."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.config.policy import ArConfig
from speechalign.policy.ar import build_ar, load_ar, save_ar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.training.critic import Critic
from speechalign.training.engine import Engine
from speechalign.training.online_base import Learner, OnlineTask, TrainedPolicy
from speechalign.training.online_dpo import OnlineDpo
from speechalign.training.policy_gradient import PolicyGradient
from speechalign.training.rollouts import Rollout

RIGHT = 13
PROMPTS = {"p0": (2, 9, 3), "p1": (2, 10, 11, 3), "p2": (2, 12, 3), "p3": (2, 9, 9, 3)}


def a_policy_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    vocabulary = Vocabulary(symbols="ab", num_codebooks=1, codebook_size=16)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), vocabulary)
    facts = {"codec_fingerprint": "f", "policy_version": 0, "prefix_frames": 1}
    save_ar(folder, model, vocabulary, facts)
    return folder


def a_config(method: str, **changes: Any) -> OnlineTrainingConfig:
    values: dict[str, Any] = {
        "method": method,
        "num_steps": 100,
        "prompts_per_step": 4,
        "answers_per_forward": 16,
        "heldout": {"num_prompts": 2},
        "engine": {"learning_rate": 0.01, "zero_stage": 0},
        "workers": {"num_workers": 1},
    }
    return OnlineTrainingConfig.model_validate(values | changes)


@contextmanager
def a_process_group(rank: int = 0, num_ranks: int = 1, store: str = "") -> Iterator[None]:
    """Be in a group; that of a process stays, because DeepSpeed holds on to the first it meets."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    if not dist.is_initialized():
        path = store or str(Path(tempfile.mkdtemp()) / "store")
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=num_ranks
        )
    yield
    if num_ranks > 1:
        dist.destroy_process_group()


class Toy:
    """A learner and the policy that it moves."""

    def __init__(
        self, folder: Path, config: OnlineTrainingConfig, samples_per_prompt: int = 8
    ) -> None:
        self.samples_per_prompt = samples_per_prompt
        task = OnlineTask(config=config, temperature=1.0, samples_per_prompt=samples_per_prompt)
        num_micro = task.num_micro_batches
        engine_config = config.engine.model_copy(update={"num_accumulated": num_micro})
        self.engine = Engine(load_ar(folder).model, engine_config, config.num_steps)
        policy = TrainedPolicy(self.engine, load_ar(folder).model, 1.0)
        self.critic = Critic(config, folder, num_micro) if config.method == "ppo" else None
        self.learner: Learner = (
            OnlineDpo(task, policy)
            if config.method == "online_dpo"
            else PolicyGradient(task, policy, self.critic)
        )

    @torch.no_grad()
    def logprobs(self, prompt_id: str) -> torch.Tensor:
        logits = self.engine.module(input_ids=torch.tensor([PROMPTS[prompt_id]])).logits[0, -1]
        return torch.log_softmax(logits.float(), -1)

    def answers(self, step: int, prompt_ids: list[str]) -> list[Rollout]:
        """Draw answers; a tenth of the rewards is missing."""
        rollouts: list[Rollout] = []
        for prompt_id in prompt_ids:
            generator = torch.Generator().manual_seed(1000 * step + int(prompt_id[1]))
            logprobs = self.logprobs(prompt_id)
            drawn = torch.multinomial(
                logprobs.exp(), self.samples_per_prompt, replacement=True, generator=generator
            )
            for index, token in enumerate(drawn.tolist()):
                failed = (step * 7 + index * 3 + int(prompt_id[1])) % 10 == 0
                rollouts.append(
                    Rollout(
                        prompt_id=prompt_id,
                        prompt_token_ids=PROMPTS[prompt_id],
                        token_ids=(token,),
                        sampler_logprobs=(float(logprobs[token]),),
                        reward=None if failed else float(token == RIGHT),
                        is_truncated=False,
                    )
                )
        return rollouts

    def share_of_right(self) -> float:
        """Return the mean probability of the right answer."""
        return sum(float(self.logprobs(p)[RIGHT].exp()) for p in PROMPTS) / len(PROMPTS)
