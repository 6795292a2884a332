"""Supervised training of the AR model: cross entropy of the golden answer, given the prompt.

Shapes: B rows, S token positions.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from speechalign.config.training import SftArConfig
from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.logprobs import answer_logprobs
from speechalign.policy.prompt_format import answer_token_ids, prompt_token_ids
from speechalign.policy.vocabulary import Vocabulary
from speechalign.training.batches import BatchPlan
from speechalign.training.golden import CODEBOOK_SIZE, GoldenSet, read_golden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ArTask:
    """What the AR model learns from, batch by batch."""

    unit: Literal["tokens", "codes", "pairs"] = "tokens"
    keeps_best = False

    def __init__(self, config: SftArConfig) -> None:
        self._config = config
        minimum = max(1, config.model.prefix_frames)
        self._train = read_golden(config.golden, "train", min_frames=minimum)
        self._heldout = read_golden(config.golden, "heldout", min_frames=minimum)
        clips = [*self._train.clips, *self._heldout.clips]
        self.vocabulary = Vocabulary(
            symbols="".join(sorted({symbol for clip in clips for symbol in clip.phonemes})),
            num_codebooks=config.model.num_codebooks,
            codebook_size=CODEBOOK_SIZE,
        )
        self.model: nn.Module = build_ar(config.model, self.vocabulary)
        lengths = [clip.codes_KT.shape[1] for clip in self._train.clips]
        self._plan = BatchPlan(lengths, config.rows_per_step, config.seed)

    def rows(self, step: int) -> list[int]:
        """Return the training rows of a micro-batch, over all ranks."""
        return self._plan.batch(step)

    def loss(self, model: nn.Module, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Return (summed negative log-likelihood, number of answer tokens) of training rows."""
        epoch = step // self._plan.batches_per_epoch
        return answer_nll(model, self._batch(self._train, rows, epoch))

    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss of held-out speakers saying held-out texts."""
        rows = self._heldout.spread(self._config.num_heldout)
        total, tokens = answer_nll(model, self._batch(self._heldout, rows, 0))
        return {"heldout_loss": float(total / tokens)}

    def save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        """Commit the policy as version 0."""
        policy = cast("PreTrainedModel", model)  # build_ar made it
        own = {
            "codec_fingerprint": self._train.codec_fingerprint,
            "policy_version": 0,
            "prefix_frames": self._config.model.prefix_frames,
        }
        save_ar(folder, policy, self.vocabulary, facts | own)

    def _batch(self, golden: GoldenSet, rows: list[int], epoch: int) -> AnswerBatch:
        prefix_frames = self._config.model.prefix_frames
        pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for row in rows:
            clip = golden.clips[row]
            voice = golden.companion(row, prefix_frames, self._config.seed, epoch)
            prompt = prompt_token_ids(
                self.vocabulary, clip.phonemes, voice.codes_KT, prefix_frames=prefix_frames
            )
            pairs.append((prompt, answer_token_ids(self.vocabulary, clip.codes_KT)))
        return collate_answers(pairs)


def answer_nll(model: nn.Module, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """Return (summed negative log-likelihood of the answers, number of answer tokens)."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    logits_BSV = model(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).logits
    logprobs_BS = answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS)
    return -logprobs_BS.sum(), batch.answer_mask_BS.sum().to(torch.float32)
