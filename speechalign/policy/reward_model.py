"""A reward model over codec tokens: the AR policy's backbone and a scalar head.

Bradley-Terry on pairs (Christiano et al. 2017; Ouyang et al. 2022, eq. 1). SpeechAlign trains one
on golden against synthetic tokens (section 3.2). The reward is the mean of what the head says at
every token of the answer: what tells golden from synthetic is spread over all of it. Read at the
last token alone, as Ouyang et al. do, the same pairs teach it less (docs/experiments.md).

    FOLDER/config.json  model.safetensors  vocabulary.json  manifest.json

Left out: a bias of the head, which no difference of rewards can learn.

Shapes: B rows, S token positions, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from speechalign.artifacts import committed_folder, verify_folder
from speechalign.errors import ConfigError
from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.vocabulary import Vocabulary

WEIGHTS = "model.safetensors"


class RewardModel(nn.Module):
    """One number for each answer."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        width: int = backbone.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)  # Stiennon et al. 2020

    @classmethod
    def on_policy(cls, policy: PreTrainedModel) -> "RewardModel":
        """Return a reward model that starts from a policy, without its language head."""
        return cls(cast("PreTrainedModel", policy.base_model))

    def forward(self, batch: AnswerBatch) -> Tensor:
        """Return reward_B of the answers: the mean over each one's tokens."""
        hidden_BSD = self.backbone(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        ).last_hidden_state
        said_BS = self.head(hidden_BSD).squeeze(-1).float() * batch.answer_mask_BS
        return said_BS.sum(1) / batch.answer_mask_BS.sum(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRewardModel:
    """A reward model ready to judge."""

    model: RewardModel
    vocabulary: Vocabulary
    facts: Mapping[str, Any]

    @torch.no_grad()
    def rewards(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Return the reward of each (prompt, answer)."""
        device = next(self.model.parameters()).device
        return self.model(collate_answers(rows).to(device)).tolist()


def save_reward_model(
    folder: Path, model: RewardModel, vocabulary: Vocabulary, facts: Mapping[str, Any]
) -> None:
    """Commit a reward model: whole or not at all."""
    with committed_folder(folder, {"kind": "reward_model"} | dict(facts)) as partial:
        model.backbone.config.save_pretrained(partial)
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, partial / WEIGHTS)
        vocabulary.save(partial / VOCABULARY)


def load_reward_model(folder: Path, *, device: str = "cpu") -> LoadedRewardModel:
    """Load a reward model after its files were checked against the manifest.

    Raises:
        ConfigError: the folder holds no reward model.
        CorruptArtifact: a file differs from the manifest.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} holds no reward model; train one: `speechalign reward-model`")
    facts = verify_folder(folder)
    if facts.get("kind") != "reward_model":
        raise ConfigError(f"{folder} holds a {facts.get('kind')!r} artifact, not a reward model")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = RewardModel(AutoModel.from_config(config))
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return LoadedRewardModel(
        model=model.to(device).eval(),
        vocabulary=Vocabulary.load(folder / VOCABULARY),
        facts=facts,
    )
