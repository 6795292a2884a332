"""The two phases in which the embedded codec learns.

Content comes first and is then frozen: a policy can be trained on level 1 while the acoustics
are still being learned.

Shapes: B batch, F frames of 10 ms, T frames of 20 ms, D dims.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from speechalign.codec.crops import CropBatch
from speechalign.codec.embedded_model import (
    FRAMES_PER_CODE,
    EmbeddedModel,
    FrameConv,
    conv_stack,
    stack_frames,
    unstack_frames,
)
from speechalign.codec.losses import ReconstructionLoss, distillation_loss
from speechalign.codec.quantise import quantise, revive_dead_codes
from speechalign.config.codec import EmbeddedModelConfig

_DEPTH_WEIGHTS = (1.0, 3.0, 2.0, 1.5)
"""How often 0, 1, 2, 3 acoustic levels are kept; each further level once, all of them 6."""


class Phase(Protocol):
    """A part of the model that learns, and what it learns from."""

    def modules(self) -> nn.Module:
        """Return everything with weights to train or to save."""
        ...

    def terms(self, batch: CropBatch, *, quantised: bool) -> dict[str, Tensor]:
        """Return the terms of the loss, to be summed."""
        ...

    def revive(self) -> int:
        """Move dead codes; return how many."""
        ...


class TeacherStatistics(nn.Module):
    """Normalises what the teacher hears, dimension by dimension."""

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, teacher_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(teacher_dim))
        self.register_buffer("std_D", torch.ones(teacher_dim))

    def forward(self, teacher_BTD: Tensor) -> Tensor:
        """Return teacher features of mean 0 and deviation 1."""
        return (teacher_BTD - self.mean_D) / self.std_D


class ContentHeads(nn.Module):
    """What level 1 must know while it learns; thrown away afterwards.

    The speech is rebuilt beside the crop's own mean and spread, so that level 1 need not say
    who speaks.
    """

    def __init__(self, config: EmbeddedModelConfig, teacher_dim: int) -> None:
        super().__init__()
        latent, hidden, features = config.latent_dim, config.hidden_dim, config.num_features
        self.teacher_statistics = TeacherStatistics(teacher_dim)
        self.teacher = nn.Sequential(
            FrameConv(latent, hidden), nn.GELU(), nn.Linear(hidden, teacher_dim)
        )
        self.speech = conv_stack(
            latent + 2 * features, hidden, FRAMES_PER_CODE * features, dilations=(1, 2)
        )

    def predict_teacher(self, content_BTD: Tensor) -> Tensor:
        """Return the teacher's features as level 1 tells them."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.teacher(content_BTD).float()

    def predict_speech(self, content_BTD: Tensor, target_BFD: Tensor) -> Tensor:
        """Return normalised features_BFD as level 1 and the voice's mean and spread tell them."""
        voice_B1D = torch.cat([target_BFD.mean(1, True), target_BFD.std(1, keepdim=True)], -1)
        voice_BTD = voice_B1D.expand(-1, content_BTD.shape[1], -1)
        with torch.autocast("cpu", torch.bfloat16):
            return unstack_frames(self.speech(torch.cat([content_BTD, voice_BTD], -1)).float())


class ContentPhase:
    """Level 1: predict the teacher, and rebuild speech roughly."""

    def __init__(self, model: EmbeddedModel, heads: ContentHeads) -> None:
        self._model, self._heads = model, heads
        self._loss = ReconstructionLoss(model.std_D)
        self._latent_BTD = torch.zeros(0)

    def modules(self) -> nn.Module:
        """Return everything with weights to train or to save."""
        return nn.ModuleList([self._model.content, self._heads])

    def terms(self, batch: CropBatch, *, quantised: bool) -> dict[str, Tensor]:
        """Return the terms of the loss, to be summed."""
        target_BFD = self._model.normalise(batch.features_BFD)
        latent_BTD = self._model.content(stack_frames(target_BFD))
        self._latent_BTD = latent_BTD.detach()
        content_BTD, commitment = latent_BTD, latent_BTD.new_zeros(())
        if quantised:
            result = quantise(self._model.content.quantiser, latent_BTD)
            content_BTD, commitment = result.values_BTD, result.commitment
        teacher_BTD = self._heads.teacher_statistics(batch.teacher_BTD)
        speech_BFD = self._heads.predict_speech(content_BTD, target_BFD)
        rebuilt = self._loss(speech_BFD, target_BFD)
        return {
            "distillation": distillation_loss(
                self._heads.predict_teacher(content_BTD), teacher_BTD
            ),
            "speech": 0.2 * torch.stack(list(rebuilt.values())).sum(),
            "commitment": 0.5 * commitment,
        }

    def revive(self) -> int:
        """Move dead codes; return how many."""
        return revive_dead_codes(self._model.content.quantiser, self._latent_BTD)


class AcousticsPhase:
    """The other levels and the decoder, beside a level 1 that no longer changes."""

    def __init__(self, model: EmbeddedModel) -> None:
        self._model = model
        self._loss = ReconstructionLoss(model.std_D)
        self._latent_BTD = torch.zeros(0)
        num_levels = model.config.num_acoustic_codebooks
        weights = [*_DEPTH_WEIGHTS, *[1.0] * num_levels][: num_levels + 1]
        self._depth_weights = torch.tensor([*weights[:-1], 6.0])

    def modules(self) -> nn.Module:
        """Return everything with weights to train or to save."""
        return nn.ModuleList([self._model.acoustics, self._model.decoder])

    def terms(self, batch: CropBatch, *, quantised: bool) -> dict[str, Tensor]:
        """Return the terms of the loss, to be summed."""
        target_BFD = self._model.normalise(batch.features_BFD)
        content_BTD = self._content(batch.features_BFD)
        latent_BTD = self._model.acoustics(stack_frames(target_BFD), content_BTD)
        self._latent_BTD = latent_BTD.detach()
        acoustics_BTD, commitment = latent_BTD, latent_BTD.new_zeros(())
        if quantised:
            depth_B = torch.multinomial(self._depth_weights, len(target_BFD), replacement=True)
            result = quantise(self._model.acoustics.quantiser, latent_BTD, depth_B)
            acoustics_BTD, commitment = result.values_BTD, result.commitment
        out_BFD = self._model.decoder(content_BTD, acoustics_BTD)
        return self._loss(out_BFD, target_BFD) | {"commitment": 0.25 * commitment}

    def revive(self) -> int:
        """Move dead codes; return how many."""
        return revive_dead_codes(self._model.acoustics.quantiser, self._latent_BTD)

    @torch.no_grad()
    def _content(self, features_BFD: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            codes_BT = self._model.encode_content(features_BFD)
        return self._model.content.quantiser.vq.decode(codes_BT[None]).transpose(1, 2)
