"""The same pairs through our reward task, and through TRL's collator and RewardTrainer's loss."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from speechalign.artifacts import committed_folder
from speechalign.config.policy import ArConfig
from speechalign.config.training import RewardModelConfig
from speechalign.policy.answer_batch import collate_answers
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.vocabulary import PAD_ID, Vocabulary
from speechalign.rows import pairs_to_table
from speechalign.training.reward_model import RewardTask
from speechalign.training.stored_pairs import PAIRS, split_pairs
from speechalign.types import PreferencePair
from tests.builders import some_pairs

reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=32)


def a_task(folder: Path, pairs: list[PreferencePair]) -> RewardTask:
    torch.manual_seed(0)
    with committed_folder(folder / "pairs", {}) as partial:
        pq.write_table(pairs_to_table(pairs), partial / PAIRS)
    ar = build_ar(ArConfig(num_layers=2, hidden_size=32, num_heads=2), VOCABULARY)
    facts = {"codec_fingerprint": "f", "policy_version": 0, "prefix_frames": 4}
    save_ar(folder / "ar", ar, VOCABULARY, facts)
    config = RewardModelConfig(
        policy=folder / "ar",
        pairs=(folder / "pairs",),
        output=folder / "rm",
        num_steps=1,
        rows_per_step=4,
        heldout_share=0.2,
    )
    return RewardTask(config)


class AsTrlCallsIt(torch.nn.Module):
    """Our model with the inputs and outputs of one for sequence classification."""

    def __init__(self, model: torch.nn.Module, prompt: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self._prompt = model, prompt

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        said = [
            ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        start = len(self._prompt)
        batch = collate_answers([(ids[:start], ids[start:]) for ids in said])
        return SimpleNamespace(logits=self.model(batch)[:, None])


def trl_loss(model: torch.nn.Module, pairs: list[PreferencePair]) -> torch.Tensor:
    collator = reward_trainer.DataCollatorForPreference(pad_token_id=PAD_ID)
    inputs = collator(
        [
            {
                "chosen_ids": [*pair.prompt_token_ids, *pair.chosen_token_ids],
                "rejected_ids": [*pair.prompt_token_ids, *pair.rejected_token_ids],
            }
            for pair in pairs
        ]
    )
    alone = SimpleNamespace(gather=torch.as_tensor, gather_for_metrics=torch.as_tensor)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=alone,
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )
    called = AsTrlCallsIt(model, pairs[0].prompt_token_ids)
    return reward_trainer.RewardTrainer.compute_loss(trainer, called, inputs)


def test_our_bradley_terry_loss_and_its_gradient_are_trls(tmp_path: Path):
    pairs = some_pairs(12)
    task = a_task(tmp_path, pairs)
    model, (learned, _) = task.model, split_pairs(pairs, 0.2, 0)
    head = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in head:  # one that starts at 0 says nothing of any answer
            weight += 0.5 * torch.randn_like(weight)
    total, count = task.loss(model, [0, 1, 2, 3], 0)
    ours, theirs = total / count, trl_loss(model, learned[:4])
    assert abs(float(ours) - 0.6931) > 0.01
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, head), torch.autograd.grad(theirs, head), strict=True
    ):
        torch.testing.assert_close(mine, other)
