"""The same answers through our GRPO and through TRL's loss: the same values and gradients."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechalign.policy.answer_batch import AnswerBatch
from speechalign.training.online_base import OnlineTask
from speechalign.training.policy_gradient import PolicyGradient
from speechalign.training.rollouts import Rollout
from tests.online_toy import a_config

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, NUM_MICRO, STOP = 24, 2, 1
GROUPS = {
    "p0": ((8, 9, 10, STOP), (11, 12, STOP), (13, STOP), (14, 15, 16, 17, 18, 19)),
    "p1": ((19, 8, STOP), (20, 21, 22, 23), (9, 9, STOP), (STOP,)),
}
"""One answer of each is cut off."""
REWARDS = {"p0": (0.0, 1.0, 3.0, 0.5), "p1": (-2.0, 0.0, 1.0, 5.0)}
CAP = 2.0


class Table:
    """A policy of which a token has one log-prob wherever it stands, and its engine.

    After the first update it is somewhere else, as after a very long step: both clips hold back.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        drawn = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))
        self.old_V, self.moved_V, self.reference_V, self.sampler_V = drawn * 0.7 - 3.0
        self.current_V = self.old_V.clone().requires_grad_()
        self.updates: list[tuple[float, Tensor]] = []
        """Loss and gradient of each."""
        self._losses: list[float] = []

    @property
    def engine(self) -> "Table":
        return self

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        logprobs_BS = self.current_V[batch.input_ids_BS] * batch.answer_mask_BS
        return logprobs_BS, torch.zeros_like(logprobs_BS)

    def reference(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        logprobs_BS = self.reference_V[batch.input_ids_BS] * batch.answer_mask_BS
        return logprobs_BS, torch.zeros_like(logprobs_BS)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self._losses.append(float(loss.detach()))
        if len(self._losses) < NUM_MICRO:
            return
        assert self.current_V.grad is not None
        self.updates.append((sum(self._losses) / NUM_MICRO, self.current_V.grad / NUM_MICRO))
        self.current_V = self.moved_V.clone().requires_grad_()
        self._losses = []


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One loss in our words, and what TRL calls it."""

    loss_type: str
    normalised_over: str
    divides_by_std: bool = True
    clips: tuple[float, float] = (0.2, 0.28)
    beta: float = 0.0
    max_staleness: int = 0
    masks_truncated: bool = False

    @property
    def counted_share(self) -> float:
        """Of the answers in TRL's mean over answers, those in ours: TRL counts a 0 for each masked
        one, and we do not."""
        return 6 / 8 if self.masks_truncated and self.normalised_over == "sequences" else 1.0


def ours(table: Table, setting: Setting) -> dict[str, float]:
    low, high = setting.clips
    config = a_config(
        "grpo",
        prompts_per_step=2,
        answers_per_forward=4,
        num_epochs=2,
        max_staleness=setting.max_staleness,
        importance_cap=CAP,
        truncated="masked" if setting.masks_truncated else "kept",
        kl={"coefficient": setting.beta},
        grpo={
            "clip_low": low,
            "clip_high": high,
            "divides_by_std": setting.divides_by_std,
            "normalised_over": setting.normalised_over,
        },
    )
    task = OnlineTask(config=config, temperature=1.0, samples_per_prompt=4)
    assert task.num_micro_batches == NUM_MICRO
    policy: Any = table
    rollouts = [
        Rollout(
            prompt_id=prompt_id,
            prompt_token_ids=(2, int(prompt_id[1]) + 3, 4),
            token_ids=answer,
            sampler_logprobs=tuple(table.sampler_V[list(answer)].tolist()),
            reward=reward,
            is_truncated=answer[-1] != STOP,
        )
        for prompt_id, answers in GROUPS.items()
        for answer, reward in zip(answers, REWARDS[prompt_id], strict=True)
    ]
    return PolicyGradient(task, policy, None).learn(rollouts, 0)


def advantages(setting: Setting) -> Tensor:
    found: list[Tensor] = []
    for rewards in REWARDS.values():
        rewards_G = torch.tensor(rewards)
        centred_G = rewards_G - rewards_G.mean()
        found.append(centred_G / rewards_G.std() if setting.divides_by_std else centred_G)
    return torch.cat(found)


def theirs(
    table: Table, setting: Setting, current_V: Tensor
) -> tuple[float, Tensor, dict[str, list[float]]]:
    """Return TRL's loss, its gradient and what it logs, of a policy with these log-probs."""
    answers = [torch.tensor(answer) for group in GROUPS.values() for answer in group]
    ids_BT = pad_sequence(answers, batch_first=True)
    mask_BT = pad_sequence([torch.ones(len(a)) for a in answers], batch_first=True)
    if setting.masks_truncated:  # as in its _generate_and_score_completions
        mask_BT *= torch.tensor([float(a[-1] == STOP) for a in answers])[:, None]
    current_V = current_V.clone().requires_grad_()
    trainer = a_trainer(setting, current_V[ids_BT])
    old_BT = table.old_V[ids_BT]
    loss_of: Any = trl.GRPOTrainer._compute_loss
    loss = loss_of(
        trainer,
        None,
        {
            "prompt_ids": torch.full((len(answers), 1), 2),
            "prompt_mask": torch.ones(len(answers), 1),
            "completion_ids": ids_BT,
            "completion_mask": mask_BT,
            "advantages": advantages(setting),
            "old_per_token_logps": old_BT,
            "ref_per_token_logps": table.reference_V[ids_BT],
            "importance_sampling_ratio": (old_BT - table.sampler_V[ids_BT]).exp().clamp(max=CAP),
        },
    )
    loss.backward()
    assert current_V.grad is not None
    return float(loss.detach()), current_V.grad, trainer._metrics["eval"]


def a_trainer(setting: Setting, logprobs_BT: Tensor) -> SimpleNamespace:
    """Return what TRL's method asks of its trainer; `eval` neither accumulates nor logs steps."""

    def scored(*_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        return logprobs_BT, torch.zeros_like(logprobs_BT), None

    def same(value: Tensor, **_: object) -> Tensor:
        return value

    return SimpleNamespace(
        _get_per_token_logps_and_entropies=scored,
        _metrics={"eval": defaultdict[str, list[float]](list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(gather=same, reduce=same, num_processes=1),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        beta=setting.beta,
        epsilon_low=setting.clips[0],
        epsilon_high=setting.clips[1],
        importance_sampling_level="token",
        loss_type=setting.loss_type,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=setting.max_staleness > 0,
        vllm_importance_sampling_correction=True,
    )


SETTINGS: Sequence[Setting] = (
    Setting(loss_type="grpo", normalised_over="sequences"),
    Setting(loss_type="bnpo", normalised_over="tokens"),
    Setting(loss_type="grpo", normalised_over="sequences", beta=0.3),
    Setting(loss_type="bnpo", normalised_over="tokens", beta=0.3, divides_by_std=False),
    Setting(loss_type="bnpo", normalised_over="tokens", clips=(0.4, 0.1)),
    Setting(loss_type="grpo", normalised_over="sequences", beta=0.3, max_staleness=1),
    Setting(loss_type="bnpo", normalised_over="tokens", beta=0.3, masks_truncated=True),
    Setting(loss_type="grpo", normalised_over="sequences", beta=0.3, masks_truncated=True),
)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_our_grpo_is_trls(setting: Setting):
    table = Table()
    means = ours(table, setting)
    logged: dict[str, list[float]] = {}
    for (loss, gradient_V), current_V in zip(
        table.updates, (table.old_V, table.moved_V), strict=True
    ):
        their_loss, their_gradient_V, logged = theirs(table, setting, current_V)
        share = setting.counted_share
        assert loss * share == pytest.approx(their_loss, rel=1e-4, abs=1e-5)
        assert torch.allclose(gradient_V * share, their_gradient_V, rtol=1e-4, atol=1e-5)
    # of the second update; in the first the policy has not moved, and nothing is held back
    assert logged["clip_ratio/low_mean"][0] > 0
    assert logged["clip_ratio/high_mean"][0] > 0
    assert 2 * means["clip_fraction"] == pytest.approx(logged["clip_ratio/region_mean"][0])
