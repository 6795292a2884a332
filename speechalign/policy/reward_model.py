"""A reward model over codec tokens: an AR policy, and a head that reads how it takes an answer.

Bradley-Terry on pairs (Christiano et al. 2017; Ouyang et al. 2022, eq. 1). SpeechAlign trains one
on golden against synthetic tokens (section 3.2). The head sees, at every token of the answer, the
policy's last hidden state, the token's log-prob, the entropy it was expected with, and their sum
(how much it surprised); it pools them by mean and standard deviation (x-vectors: Snyder et al.
2018), because what tells golden from synthetic is spread over the answer. A scalar head on the
hidden states of a fine-tuned backbone got .79 of the held-out pairs that this gets .95 of; of
recordings that the policy never saw it gets .69 (docs/experiments.md).

    FOLDER/config.json  model.safetensors  vocabulary.json  manifest.json

Shapes: B rows, S token positions, P what is kept of a hidden state, T width of the token layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from speechalign.artifacts import committed_folder, verify_folder
from speechalign.errors import ConfigError, DataError
from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.logprobs import answer_logprobs, token_entropies
from speechalign.policy.prompt_format import without_feedback
from speechalign.policy.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
NUM_KEPT, NUM_SURPRISE, TOKEN_WIDTH, HEAD_WIDTH = 16, 3, 32, 32
VARIANCE_FLOOR = 1e-5
"""Of an answer whose tokens are all alike; the root of zero has no gradient."""


class RewardModel(nn.Module):
    """One number for each answer."""

    offset: Tensor

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__()
        self.policy = policy
        self.kept = nn.Linear(policy.config.hidden_size, NUM_KEPT)
        self.token = nn.Sequential(nn.Linear(NUM_KEPT + NUM_SURPRISE, TOKEN_WIDTH), nn.GELU())
        self.head = nn.Sequential(
            nn.Linear(2 * TOKEN_WIDTH, HEAD_WIDTH), nn.GELU(), nn.Linear(HEAD_WIDTH, 1, bias=False)
        )
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, batch: AnswerBatch) -> Tensor:
        """Return reward_B of the answers."""
        token_BST = self.token(self._seen(batch))
        return self.head(_mean_and_deviation(token_BST, batch.answer_mask_BS))[:, 0] - self.offset

    def _seen(self, batch: AnswerBatch) -> Tensor:
        """Return what the head sees of each token, (B, S, P + 3)."""
        said = self.policy(
            input_ids=batch.input_ids_BS,
            attention_mask=batch.attention_mask_BS,
            output_hidden_states=True,
            use_cache=False,
        )
        logprobs_BS = answer_logprobs(said.logits, batch.input_ids_BS, batch.answer_mask_BS)
        entropy_BS = token_entropies(said.logits, batch.answer_mask_BS)
        surprise_BS3 = torch.stack([logprobs_BS, entropy_BS, logprobs_BS + entropy_BS], -1)
        return torch.cat([self.kept(said.hidden_states[-1]).float(), surprise_BS3], -1)


def _mean_and_deviation(token_BST: Tensor, answer_mask_BS: Tensor) -> Tensor:
    """Return the statistics of the answers' tokens, (B, 2 T)."""
    mask_BS1 = answer_mask_BS[..., None]
    count_B1 = mask_BS1.sum(1)
    mean_BT = (token_BST * mask_BS1).sum(1) / count_B1
    variance_BT = ((token_BST - mean_BT[:, None]).square() * mask_BS1).sum(1) / count_B1
    return torch.cat([mean_BT, (variance_BT + VARIANCE_FLOOR).sqrt()], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRewardModel:
    """A reward model ready to judge."""

    model: RewardModel
    vocabulary: Vocabulary
    facts: Mapping[str, Any]

    @torch.no_grad()
    def rewards(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Return the reward of each (prompt, answer).

        What a prompt says of its answer (chain of hindsight) is not read: it was never learned.
        """
        device = next(self.model.parameters()).device
        bare = [(without_feedback(prompt), answer) for prompt, answer in rows]
        return self.model(collate_answers(bare).to(device)).tolist()


def save_reward_model(
    folder: Path, model: RewardModel, vocabulary: Vocabulary, facts: Mapping[str, Any]
) -> None:
    """Commit a reward model: whole or not at all."""
    with committed_folder(folder, {"kind": "reward_model"} | dict(facts)) as partial:
        model.policy.config.save_pretrained(partial)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, partial / WEIGHTS)  # cloned: the head may be tied
        vocabulary.save(partial / VOCABULARY)


def load_reward_model(
    folder: Path, *, codec_fingerprint: str | None = None, device: str = "cpu"
) -> LoadedRewardModel:
    """Load a reward model after its files were checked against the manifest.

    Args:
        folder: what `save_reward_model` wrote.
        codec_fingerprint: the codec of what it will judge, where that is known.
        device: where it goes.

    Raises:
        ConfigError: the folder holds no reward model.
        CorruptArtifact: a file differs from the manifest.
        DataError: it was trained on another codec.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} holds no reward model; train one: `speechalign reward-model`")
    facts = verify_folder(folder)
    if facts.get("kind") != "reward_model":
        raise ConfigError(f"{folder} holds a {facts.get('kind')!r} artifact, not a reward model")
    found = facts["codec_fingerprint"]
    if codec_fingerprint not in (None, found):
        raise DataError(
            f"reward model {folder} was trained on codec {found}, and has to judge codes of codec "
            f"{codec_fingerprint}; train it again: `speechalign reward-model`"
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = RewardModel(AutoModelForCausalLM.from_config(config))
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return LoadedRewardModel(
        model=model.to(device).eval(),
        vocabulary=Vocabulary.load(folder / VOCABULARY),
        facts=facts,
    )
