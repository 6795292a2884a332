"""What the embedded codec is trained to minimise.

Shapes: B batch, F frames of 10 ms, T frames of 20 ms, D dims, E envelope coefficients.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from speechalign.codec.augment import SpectralBasis
from speechalign.codec.embedded_model import APERIODICITY, LOG_F0, VOICING

_ENVELOPE = slice(VOICING + 1, APERIODICITY)


class ReconstructionLoss:
    """How far decoded features are from the vocoder's, about as an ear would weigh it.

    The envelope counts as a log spectrum, where loud frames count more; its movement counts
    too. Pitch counts where there is voice.
    """

    def __init__(self, std_D: Tensor) -> None:
        self._std_E = std_D[_ENVELOPE]
        self._basis = SpectralBasis(len(self._std_E))
        self._weight_E = (self._std_E / self._std_E.mean()).sqrt()

    def __call__(self, out_BFD: Tensor, target_BFD: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, to be summed; both inputs are normalised features."""
        loudness_BF = target_BFD[..., VOICING + 1]
        weight_BF = 0.2 + 0.8 * torch.sigmoid(1.5 * (loudness_BF + 0.5))
        weight_BF = weight_BF / weight_BF.mean()
        voiced_BF = target_BFD[..., VOICING]
        error_BFE = out_BFD[..., _ENVELOPE] - target_BFD[..., _ENVELOPE]
        spectral_BFM = (error_BFE * self._std_E) @ self._basis.to_log_power_EM
        moving_BFM = spectral_BFM[:, 1:] - spectral_BFM[:, :-1]
        pitch_BF = (out_BFD[..., LOG_F0] - target_BFD[..., LOG_F0]).abs()
        breath_BF = (out_BFD[..., APERIODICITY] - target_BFD[..., APERIODICITY]).abs()
        return {
            "spectrum": ((spectral_BFM.abs().mean(-1)) * weight_BF).mean(),
            "movement": 0.5 * (moving_BFM.abs().mean(-1) * weight_BF[:, 1:]).mean(),
            "envelope": 0.5 * ((error_BFE.abs() * self._weight_E).mean(-1) * weight_BF).mean(),
            "pitch": 1.5 * (pitch_BF * (0.05 + voiced_BF)).mean(),
            "voicing": 0.5 * F.binary_cross_entropy_with_logits(out_BFD[..., VOICING], voiced_BF),
            "breath": 0.1 * breath_BF.mean(),
        }


def distillation_loss(predicted_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Return how far a prediction is from what the teacher heard, in direction and in size."""
    cosine_BT = F.cosine_similarity(predicted_BTD, teacher_BTD, dim=-1)
    return (1 - cosine_BT).mean() + 0.3 * F.l1_loss(predicted_BTD, teacher_BTD)
