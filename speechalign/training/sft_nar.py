"""Supervised training of the NAR model: cross entropy of one level, given the levels before.

Each step trains one level, drawn by weight, on crops beside the prompt of the same speaker.

Shapes: B rows, K levels, T frames.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from speechalign.config.training import SftNarConfig
from speechalign.errors import ConfigError
from speechalign.policy.nar import NarModel, save_nar
from speechalign.seeds import derive_seed
from speechalign.training.batches import BatchPlan
from speechalign.training.golden import CODEBOOK_SIZE, GoldenSet, read_golden


class NarTask:
    """What the NAR model learns from, batch by batch."""

    unit: Literal["tokens", "codes", "pairs"] = "codes"
    keeps_best = False

    def __init__(self, config: SftNarConfig) -> None:
        self._config = config
        frames = max(config.crop_frames, config.model.speaker_frames)
        self._train = read_golden(config.golden, "train", min_frames=frames)
        self._heldout = read_golden(config.golden, "heldout", min_frames=frames)
        num_codebooks = len(self._train.clips[0].codes_KT)
        if config.model.num_levels > num_codebooks:
            raise ConfigError(
                f"model.num_levels is {config.model.num_levels}, but {config.golden} has "
                f"{num_codebooks} codebooks"
            )
        if len(config.level_weights) != config.model.num_levels - 1:
            raise ConfigError(
                f"level_weights needs {config.model.num_levels - 1} weights, one for each level "
                f"after the first; it has {len(config.level_weights)}"
            )
        self.model: nn.Module = NarModel(
            config.model, num_codebooks=num_codebooks, codebook_size=CODEBOOK_SIZE
        )
        self._plan = BatchPlan([frames] * len(self._train.clips), config.rows_per_step, config.seed)

    def rows(self, step: int) -> list[int]:
        """Return the training rows of a micro-batch, over all ranks."""
        return self._plan.batch(step)

    def loss(self, model: nn.Module, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Return (summed negative log-likelihood, number of codes) of one level."""
        rng = np.random.default_rng(derive_seed(self._config.seed, "level", step))
        weights = np.asarray(self._config.level_weights)
        level = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
        codes_BKT, speaker_BKT = self._crops(self._train, rows, step)
        total, count, _ = level_nll(model, codes_BKT, speaker_BKT, level)
        return total, count

    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Return loss and accuracy of each level on held-out speakers."""
        rows = self._heldout.spread(self._config.num_heldout)
        codes_BKT, speaker_BKT = self._crops(self._heldout, rows, 0)
        values: dict[str, float] = {}
        for level in range(1, self._config.model.num_levels):
            total, tokens, right = level_nll(model, codes_BKT, speaker_BKT, level)
            values[f"heldout_loss_level{level + 1}"] = float(total / tokens)
            values[f"heldout_accuracy_level{level + 1}"] = float(right / tokens)
        return values

    def save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        """Commit the model."""
        assert isinstance(model, NarModel)  # noqa: S101 - __init__ made it
        save_nar(folder, model, facts | {"codec_fingerprint": self._train.codec_fingerprint})

    def _crops(self, golden: GoldenSet, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        codes: list[NDArray[np.int16]] = []
        speakers: list[NDArray[np.int16]] = []
        for row in rows:
            rng = np.random.default_rng(derive_seed(self._config.seed, "crop", row, step))
            voice = golden.companion(row, self._config.model.speaker_frames, step)
            codes.append(_crop(golden.clips[row].codes_KT, self._config.crop_frames, rng))
            speakers.append(_crop(voice.codes_KT, self._config.model.speaker_frames, rng))
        return _stack(codes), _stack(speakers)


def level_nll(
    model: nn.Module, codes_BKT: Tensor, speaker_BKT: Tensor, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (summed negative log-likelihood, number of codes, number right by argmax)."""
    device = next(model.parameters()).device
    codes_BKT, speaker_BKT = codes_BKT.to(device), speaker_BKT.to(device)
    bare: Any = getattr(model, "module", model)
    voice_BD = bare.embed_voice(speaker_BKT)
    mask_BT = torch.ones(len(codes_BKT), codes_BKT.shape[2], dtype=torch.bool, device=device)
    logits_BTN = model(codes_BKT, voice_BD, level, mask_BT).float()
    target_BT = codes_BKT[:, level]
    total = F.cross_entropy(logits_BTN.flatten(0, 1), target_BT.flatten(), reduction="sum")
    right = (logits_BTN.argmax(-1) == target_BT).sum()
    return total, torch.tensor(float(target_BT.numel()), device=device), right


def _crop(codes_KT: NDArray[np.int16], frames: int, rng: np.random.Generator) -> NDArray[np.int16]:
    first = int(rng.integers(0, codes_KT.shape[1] - frames + 1))
    return codes_KT[:, first : first + frames]


def _stack(codes: list[NDArray[np.int16]]) -> Tensor:
    return torch.from_numpy(np.stack(codes).astype(np.int64))
