"""The NAR model: each further codec level from the levels before it and the speaker prompt.

VALL-E's second stage (Wang et al. 2023, section 4.2.2) with dilated convolutions in place of
attention: a frame's acoustics depend on its neighbourhood and on who speaks, and convolutions
are several times as fast on a CPU. The speaker prompt is pooled over time and conditions the
blocks by a scale and a shift (FiLM).

Left out of VALL-E: the text (level 1 carries the words), sampling (argmax sounded better).

Shapes: B batch, K levels, T frames, D hidden, N codebook size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from speechalign.artifacts import committed_folder, verify_folder
from speechalign.config.policy import NarConfig
from speechalign.errors import ConfigError

CONFIG, WEIGHTS = "nar.json", "model.safetensors"


class Block(nn.Module):
    """A residual dilated convolution, conditioned on level and voice."""

    def __init__(self, hidden: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.film = nn.Linear(hidden, 2 * hidden)
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x_BTD: Tensor, condition_BD: Tensor, mask_BT1: Tensor) -> Tensor:
        """Add what the neighbourhood says; frames beyond the mask count as silence."""
        scale_BD, shift_BD = self.film(condition_BD).chunk(2, -1)
        h_BTD = self.norm(x_BTD) * (1 + scale_BD[:, None]) + shift_BD[:, None]
        h_BTD = self.conv((h_BTD * mask_BT1).transpose(1, 2)).transpose(1, 2)
        return x_BTD + self.out(F.gelu(h_BTD))


class NarModel(nn.Module):
    """Logits of one level, given all levels before it."""

    def __init__(self, config: NarConfig, *, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        hidden, levels = config.hidden_size, config.num_levels
        self.config = config
        self.num_codebooks = num_codebooks
        self.codes = nn.ModuleList(nn.Embedding(codebook_size, hidden) for _ in range(levels - 1))
        self.voice = nn.ModuleList(nn.Embedding(codebook_size, hidden) for _ in range(levels))
        self.voice_out = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.level = nn.Embedding(levels, hidden)
        self.blocks = nn.ModuleList(Block(hidden, dilation) for dilation in config.dilations)
        self.norm = nn.LayerNorm(hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, codebook_size) for _ in range(levels - 1))

    def embed_voice(self, speaker_BKT: Tensor) -> Tensor:
        """Return voice_BD of speaker prompts of equal length."""
        embedded_BTD = torch.stack(
            [book(speaker_BKT[:, level]) for level, book in enumerate(self.voice)]
        ).sum(0)
        return self.voice_out(embedded_BTD).mean(1)

    def forward(self, codes_BKT: Tensor, voice_BD: Tensor, level: int, mask_BT: Tensor) -> Tensor:
        """Return logits_BTN of `level` (1 is the second) from codes_BKT[:, :level]."""
        x_BTD = torch.stack([self.codes[below](codes_BKT[:, below]) for below in range(level)]).sum(
            0
        )
        condition_BD = voice_BD + self.level.weight[level]
        mask_BT1 = mask_BT[..., None].to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, condition_BD, mask_BT1)
        return self.heads[level - 1](self.norm(x_BTD))


class LevelFiller(Protocol):
    """What rendering asks of a NAR model; `Nar` is one."""

    def fill(
        self,
        level1s: Sequence[NDArray[np.integer]],
        speakers_KT: Sequence[NDArray[np.integer]],
        num_levels: int,
    ) -> list[NDArray[np.int64]]:
        """Return codes_kT for each row: level 1 as given, the others predicted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Nar:
    """A NAR model ready to fill levels."""

    model: NarModel
    facts: Mapping[str, Any]

    @torch.no_grad()
    def fill(
        self,
        level1s: Sequence[NDArray[np.integer]],
        speakers_KT: Sequence[NDArray[np.integer]],
        num_levels: int,
    ) -> list[NDArray[np.int64]]:
        """Return codes_kT for each row: level 1 as given, the others by argmax.

        Args:
            level1s: codes_T of each row; lengths may differ.
            speakers_KT: the speaker prompt of each row; beyond `speaker_frames` it is not read.
            num_levels: levels to return, level 1 included.

        Raises:
            ConfigError: the model knows fewer levels.
        """
        if num_levels > self.model.config.num_levels:
            raise ConfigError(
                f"the NAR model knows {self.model.config.num_levels} levels, rendering wants "
                f"{num_levels}; lower rendering.num_levels"
            )
        lengths = [len(codes) for codes in level1s]
        codes_BKT = torch.zeros(len(level1s), num_levels, max(lengths, default=0), dtype=torch.long)
        for row, codes in enumerate(level1s):
            codes_BKT[row, 0, : len(codes)] = torch.from_numpy(np.asarray(codes, np.int64))
        mask_BT = torch.arange(codes_BKT.shape[2])[None] < torch.tensor(lengths)[:, None]
        voice_BD = torch.cat([self._voice(speaker_KT) for speaker_KT in speakers_KT])
        for level in range(1, num_levels):
            codes_BKT[:, level] = self.model(codes_BKT, voice_BD, level, mask_BT).argmax(-1)
        return [codes_BKT[row, :, :length].numpy() for row, length in enumerate(lengths)]

    def _voice(self, speaker_KT: NDArray[np.integer]) -> Tensor:
        frames = self.model.config.speaker_frames
        speaker_BKT = torch.from_numpy(np.asarray(speaker_KT[:, :frames], np.int64))[None]
        return self.model.embed_voice(speaker_BKT)


def save_nar(folder: Path, model: NarModel, facts: Mapping[str, Any]) -> None:
    """Commit a NAR model, weights in half precision."""
    shape = {
        "config": model.config.model_dump(mode="json"),
        "num_codebooks": model.num_codebooks,
        "codebook_size": model.heads[0].out_features,
    }
    with committed_folder(folder, {"kind": "nar"} | dict(facts)) as partial:
        (partial / CONFIG).write_text(json.dumps(shape, indent=2) + "\n")
        weights = {
            name: t.detach().cpu().half().contiguous() for name, t in model.state_dict().items()
        }
        save_file(weights, partial / WEIGHTS)


def load_nar(folder: Path) -> Nar:
    """Load a NAR model after its files were checked against the manifest.

    Raises:
        ConfigError: the folder holds no NAR model.
        CorruptArtifact: a file differs from the manifest.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} holds no NAR model; train one with `speechalign sft`")
    facts = verify_folder(folder)
    if facts.get("kind") != "nar":
        raise ConfigError(f"{folder} holds a {facts.get('kind')!r} artifact, not a NAR model")
    shape = json.loads((folder / CONFIG).read_text())
    model = NarModel(
        NarConfig.model_validate(shape["config"]),
        num_codebooks=shape["num_codebooks"],
        codebook_size=shape["codebook_size"],
    )
    model.load_state_dict({name: t.float() for name, t in load_file(folder / WEIGHTS).items()})
    return Nar(model=model.eval(), facts=facts)
