"""The network of the embedded codec: two vocoder frames of 10 ms in, eight codes of 20 ms out.

Level 1 has a branch and a codebook of its own and learns to predict what a speech recogniser
hears (SpeechTokenizer's idea); the other levels are a residual quantiser beside it (Mimi's
split). Straight linear paths run beside both convolutional stacks, so that a voice unlike all
in training is still coded as well as a linear code can.

Shapes: B batch, F frames of 10 ms, T frames of 20 ms, K codebooks, D dims; frames come before
dims everywhere.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechalign.codec.encodec_import import ResidualVectorQuantizer
from speechalign.config.codec import EmbeddedModelConfig

LOG_F0, VOICING, APERIODICITY = 0, 1, -1
"""Columns of the features; the spectral envelope lies between voicing and aperiodicity."""
FRAMES_PER_CODE = 2


class FrameConv(nn.Module):
    """A convolution over three frames, as one matrix product."""

    def __init__(self, in_dim: int, out_dim: int, dilation: int = 1) -> None:
        super().__init__()
        self._dilation = dilation
        self.linear = nn.Linear(3 * in_dim, out_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return as many frames as came, zeros beyond both ends."""
        step, num_frames = self._dilation, x_BTD.shape[1]
        padded = F.pad(x_BTD, (0, 0, step, step))
        before, after = padded[:, :num_frames], padded[:, 2 * step : 2 * step + num_frames]
        return self.linear(torch.cat([before, x_BTD, after], -1))


class Block(nn.Module):
    """A residual block; normalised frame by frame, so padding and length do not matter to it."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = FrameConv(dim, dim, dilation)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add what the neighbourhood says."""
        return x_BTD + self.out(F.gelu(self.conv(self.norm(x_BTD))))


def conv_stack(in_dim: int, dim: int, out_dim: int, dilations: tuple[int, ...]) -> nn.Sequential:
    """Return a stack of blocks between two projections."""
    blocks = [Block(dim, dilation) for dilation in dilations]
    return nn.Sequential(
        FrameConv(in_dim, dim), *blocks, nn.LayerNorm(dim), nn.Linear(dim, out_dim)
    )


class ContentEncoder(nn.Module):
    """Features to level 1."""

    def __init__(self, config: EmbeddedModelConfig) -> None:
        super().__init__()
        self.branch = conv_stack(
            FRAMES_PER_CODE * config.num_features,
            config.hidden_dim,
            config.latent_dim,
            config.content_dilations,
        )
        self.quantiser = _quantiser(config, num_codebooks=1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return latents that are not yet quantised."""
        with _bfloat16(self.training):
            return self.branch(x_BTD).float()


class AcousticEncoder(nn.Module):
    """Features, and what level 1 already says, to the other levels."""

    def __init__(self, config: EmbeddedModelConfig) -> None:
        super().__init__()
        in_dim = FRAMES_PER_CODE * config.num_features + config.latent_dim
        self.branch = conv_stack(
            in_dim, config.hidden_dim, config.latent_dim, config.acoustic_dilations
        )
        self.straight = nn.Linear(in_dim, config.latent_dim)
        self.quantiser = _quantiser(config, num_codebooks=config.num_acoustic_codebooks)

    def forward(self, x_BTD: Tensor, content_BTD: Tensor) -> Tensor:
        """Return latents that are not yet quantised."""
        both_BTD = torch.cat([x_BTD, content_BTD], -1)
        with _bfloat16(self.training):
            branch_BTD = self.branch(both_BTD).float()
        return branch_BTD + self.straight(both_BTD)


class Decoder(nn.Module):
    """Quantised latents to features at 10 ms."""

    def __init__(self, config: EmbeddedModelConfig) -> None:
        super().__init__()
        in_dim, out_dim = 2 * config.latent_dim, FRAMES_PER_CODE * config.num_features
        self.branch = conv_stack(in_dim, config.hidden_dim, out_dim, config.decoder_dilations)
        self.straight = nn.Linear(in_dim, out_dim)
        self.post = conv_stack(
            config.num_features, config.post_dim, config.num_features, config.post_dilations
        )

    def forward(self, content_BTD: Tensor, acoustics_BTD: Tensor) -> Tensor:
        """Return normalised features_BFD, their voicing column as logits."""
        both_BTD = torch.cat([content_BTD, acoustics_BTD], -1)
        with _bfloat16(self.training):
            coarse_BTD = self.branch(both_BTD).float() + self.straight(both_BTD)
            coarse_BFD = unstack_frames(coarse_BTD)
            return coarse_BFD + self.post(coarse_BFD).float()


class EmbeddedModel(nn.Module):
    """Features to codes and back."""

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, config: EmbeddedModelConfig) -> None:
        super().__init__()
        self.config = config
        self.content = ContentEncoder(config)
        self.acoustics = AcousticEncoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("mean_D", torch.zeros(config.num_features))
        self.register_buffer("std_D", torch.ones(config.num_features))

    def set_statistics(self, mean_D: Tensor, std_D: Tensor) -> None:
        """Set what normalises the features; voicing stays 0 or 1."""
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(std_D.clamp(min=1e-3))
        self.mean_D[VOICING], self.std_D[VOICING] = 0.0, 1.0

    def normalise(self, features_BFD: Tensor) -> Tensor:
        """Return features of mean 0 and deviation 1."""
        return (features_BFD - self.mean_D) / self.std_D

    @torch.no_grad()
    def encode_content(self, features_BFD: Tensor) -> Tensor:
        """Return the codes_BT of level 1."""
        latent_BTD = self.content(stack_frames(self.normalise(features_BFD)))
        return self.content.quantiser.vq.encode(latent_BTD.transpose(1, 2))[0]

    @torch.no_grad()
    def encode(self, features_BFD: Tensor) -> Tensor:
        """Return codes_KBT of features as the vocoder gives them; F must be even."""
        codes_BT = self.encode_content(features_BFD)
        content_BTD = self.content.quantiser.vq.decode(codes_BT[None]).transpose(1, 2)
        x_BTD = stack_frames(self.normalise(features_BFD))
        latent_BTD = self.acoustics(x_BTD, content_BTD)
        rest_KBT = self.acoustics.quantiser.vq.encode(latent_BTD.transpose(1, 2))
        return torch.cat([codes_BT[None], rest_KBT])

    @torch.no_grad()
    def decode(self, codes_KBT: Tensor) -> Tensor:
        """Return features_BFD for the vocoder; voicing as a probability."""
        content_BTD = self.content.quantiser.vq.decode(codes_KBT[:1]).transpose(1, 2)
        acoustics_BTD = torch.zeros_like(content_BTD)
        if len(codes_KBT) > 1:
            acoustics_BTD = self.acoustics.quantiser.vq.decode(codes_KBT[1:]).transpose(1, 2)
        out_BFD = self.decoder(content_BTD, acoustics_BTD)
        features_BFD = out_BFD * self.std_D + self.mean_D
        features_BFD[..., VOICING] = torch.sigmoid(out_BFD[..., VOICING])
        return features_BFD


def stack_frames(x_BFD: Tensor) -> Tensor:
    """Return x_BTD, two frames of 10 ms in each of 20 ms."""
    batch_size, num_frames, num_dims = x_BFD.shape
    return x_BFD.reshape(batch_size, num_frames // FRAMES_PER_CODE, FRAMES_PER_CODE * num_dims)


def unstack_frames(x_BTD: Tensor) -> Tensor:
    """Return x_BFD; the inverse of `stack_frames`."""
    batch_size, num_frames, num_dims = x_BTD.shape
    return x_BTD.reshape(batch_size, num_frames * FRAMES_PER_CODE, num_dims // FRAMES_PER_CODE)


def _quantiser(config: EmbeddedModelConfig, *, num_codebooks: int) -> ResidualVectorQuantizer:
    # Dead codes are revived by the training: the package's own expiry is undone by its next
    # line, which writes the moving average over the codebook.
    return ResidualVectorQuantizer(
        config.latent_dim,
        n_q=num_codebooks,
        bins=config.codebook_size,
        kmeans_iters=5,
        threshold_ema_dead_code=0,
    )


def _bfloat16(enabled: bool) -> torch.autocast:
    return torch.autocast(
        "cpu", torch.bfloat16, enabled=enabled or torch.is_autocast_enabled("cpu")
    )
