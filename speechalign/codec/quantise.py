"""Quantising while training: straight-through gradients, random depth, dead codes revived.

Shapes: B batch, T frames, K codebooks, D dims, C codes of a codebook, N = B * T.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from speechalign.codec.encodec_import import ResidualVectorQuantizer


class _Codebook(Protocol):
    """The package's codebook, with the types that it does not state."""

    inited: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor
    codebook_size: int
    decay: float
    epsilon: float

    def init_embed_(self, data: Tensor) -> None: ...
    def quantize(self, x: Tensor) -> Tensor: ...
    def dequantize(self, embed_ind: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Quantised:
    """Latents after quantisation."""

    values_BTD: Tensor
    """Gradients pass through to the latents."""
    commitment: Tensor
    """How far the latents lie from their codes, over all levels."""


def quantise(
    quantiser: ResidualVectorQuantizer, latent_BTD: Tensor, depth_B: Tensor | None = None
) -> Quantised:
    """Quantise with every level, keep the first `depth_B` levels of each row (none: all).

    Every codebook learns in every step, whatever depth was drawn. `depth_B` may be 0.
    """
    residual_BTD = latent_BTD.detach()
    total_BTD = torch.zeros_like(latent_BTD)
    kept_BTD = torch.zeros_like(latent_BTD)
    commitment = latent_BTD.new_zeros(())
    for level, book in enumerate(_codebooks(quantiser)):
        with torch.no_grad():
            step_BTD = _learn(book, residual_BTD)
            residual_BTD = residual_BTD - step_BTD
            total_BTD = total_BTD + step_BTD
            keep_B = 1.0 if depth_B is None else (depth_B > level).float()[:, None, None]
            kept_BTD = kept_BTD + step_BTD * keep_B
        commitment = commitment + F.mse_loss(latent_BTD, total_BTD)
    values_BTD = latent_BTD + (kept_BTD - latent_BTD).detach()
    if depth_B is not None:
        values_BTD = torch.where((depth_B > 0)[:, None, None], values_BTD, kept_BTD)
    return Quantised(values_BTD, commitment / len(quantiser.vq.layers))


def _codebooks(quantiser: ResidualVectorQuantizer) -> list[_Codebook]:
    return [cast("Any", layer)._codebook for layer in quantiser.vq.layers]


def _learn(book: _Codebook, residual_BTD: Tensor) -> Tensor:
    """Return the codes' values, and move the codebook toward what it coded.

    This is the package's own rule (an exponential moving average), without its matrix of one
    row a frame and one column a code: four times as fast on a CPU.
    """
    residual_ND = residual_BTD.reshape(-1, residual_BTD.shape[-1])
    if not book.inited:
        book.init_embed_(residual_ND)
        # The package leaves the average unscaled, which would shrink every code it starts from.
        book.cluster_size.clamp_(min=1.0)
        book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
    codes_N = book.quantize(residual_ND)
    values_ND = book.dequantize(codes_N)
    counts_C = torch.bincount(codes_N, minlength=book.codebook_size).float()
    sums_CD = torch.zeros_like(book.embed_avg).index_add_(0, codes_N, residual_ND)
    book.cluster_size.lerp_(counts_C, 1 - book.decay)
    book.embed_avg.lerp_(sums_CD, 1 - book.decay)
    total = book.cluster_size.sum()
    smoothed_C = (book.cluster_size + book.epsilon) / (total + book.codebook_size * book.epsilon)
    book.embed.copy_(book.embed_avg / (smoothed_C * total)[:, None])
    return values_ND.view_as(residual_BTD)


@torch.no_grad()
def revive_dead_codes(
    quantiser: ResidualVectorQuantizer, latent_BTD: Tensor, *, min_share: float = 0.08
) -> int:
    """Move the codes that nobody uses onto residuals that somebody has.

    Args:
        quantiser: changed in place.
        latent_BTD: of a recent batch.
        min_share: a code is dead below this share of the mean use of a code.

    Returns:
        How many codes were moved, over all levels.
    """
    residual_ND = latent_BTD.reshape(-1, latent_BTD.shape[-1])
    num_revived = 0
    for book in _codebooks(quantiser):
        dead_C = book.cluster_size < min_share * book.cluster_size.mean()
        num_dead = int(dead_C.sum())
        if num_dead:
            drawn_N = torch.randint(len(residual_ND), (num_dead,))
            use = book.cluster_size.mean().clamp(min=1e-3)
            book.embed[dead_C] = residual_ND[drawn_N]
            book.embed_avg[dead_C] = residual_ND[drawn_N] * use
            book.cluster_size[dead_C] = use
        num_revived += num_dead
        residual_ND = residual_ND - book.dequantize(book.quantize(residual_ND))
    return num_revived
