"""Pseudo-speakers in feature space: pitch, formants, loudness and colour, moved at random.

What is moved stays put over a crop, as it does over a speaker. The words stay the same, so the
teacher's features of the original remain the target.

Shapes: B batch, F frames of 10 ms, D dims, E envelope coefficients, M points of the mel axis,
W warps.
"""

import math

import torch
from torch import Tensor

from speechalign.codec.embedded_model import LOG_F0, VOICING
from speechalign.config.codec import AugmentConfig

_MEL_SCALE, _MEL_HZ = 1127.01048, 700.0
_FLOOR_HZ, _CEILING_HZ = 40.0, 8000.0
_NUM_WARPS = 33


class SpectralBasis:
    """Between WORLD's envelope coefficients and the log power spectrum on a mel axis.

    The first coefficient is the mean of the log power spectrum.
    """

    def __init__(self, num_coefficients: int, num_points: int = 64) -> None:
        order_E = torch.arange(num_coefficients)[:, None]
        point_M = torch.arange(num_points)[None, :] + 0.5
        cosine_EM = torch.cos(math.pi * order_E * point_M / num_points)
        cosine_EM[0] /= math.sqrt(2)
        self.to_log_power_EM = cosine_EM * math.sqrt(2)
        self.from_log_power_ME = cosine_EM.T * math.sqrt(2) / num_points

    def warp_EE(self, factor: float) -> Tensor:
        """Return the matrix that moves every formant to `factor` times its frequency."""
        num_points = self.to_log_power_EM.shape[1]
        low, high = _mel(_FLOOR_HZ), _mel(_CEILING_HZ)
        mel_M = low + (torch.arange(num_points) + 0.5) / num_points * (high - low)
        source_hz_M = (_MEL_HZ * (torch.exp(mel_M / _MEL_SCALE) - 1)) / factor
        source_M = (_MEL_SCALE * torch.log1p(source_hz_M / _MEL_HZ) - low) / (high - low)
        position_M = (source_M * num_points - 0.5).clamp(0, num_points - 1)
        left_M = position_M.floor().long().clamp(max=num_points - 2)
        share_M = position_M - left_M
        interpolate_MM = torch.zeros(num_points, num_points)
        rows = torch.arange(num_points)
        interpolate_MM[rows, left_M] = 1 - share_M
        interpolate_MM[rows, left_M + 1] = share_M
        return self.to_log_power_EM @ interpolate_MM.T @ self.from_log_power_ME


class PseudoSpeakers:
    """Gives rows of a batch other voices; draws from torch's generator."""

    def __init__(self, config: AugmentConfig, num_features: int) -> None:
        self._config = config
        self._num_coefficients = num_features - 3
        self._basis = SpectralBasis(self._num_coefficients)
        limit = math.log(config.max_warp)
        factors = torch.linspace(-limit, limit, _NUM_WARPS).exp().tolist()
        self._warp_WEE = torch.stack([self._basis.warp_EE(factor) for factor in factors])

    def __call__(self, features_BFD: Tensor) -> Tensor:
        """Return the batch, some of its rows as another speaker would say them."""
        config, batch_size = self._config, len(features_BFD)
        log_f0_BF = features_BFD[..., LOG_F0]
        mean_B1 = log_f0_BF.mean(1, keepdim=True)
        scale_B1 = (_spread(batch_size) * math.log(config.max_f0_range_scale)).exp()
        shift_B1 = _spread(batch_size) * config.max_log_f0_shift
        log_f0_BF = (log_f0_BF - mean_B1) * scale_B1 + mean_B1 + shift_B1
        # Formants move with pitch in most people, loosely: half of the warp follows the shift.
        position_B = (0.5 * _spread(batch_size) + 0.5 * shift_B1 / config.max_log_f0_shift)[:, 0]
        warp_B = ((position_B + 1) / 2 * (_NUM_WARPS - 1)).round().long()
        envelope = slice(VOICING + 1, VOICING + 1 + self._num_coefficients)
        envelope_BFE = features_BFD[..., envelope] @ self._warp_WEE[warp_B]
        envelope_BFE = envelope_BFE + self._equalisers(batch_size)[:, None]
        changed_BFD = torch.cat(
            [
                log_f0_BF[..., None].clamp(math.log(55), math.log(600)),
                features_BFD[..., VOICING : VOICING + 1],
                envelope_BFE,
                features_BFD[..., envelope.stop :],
            ],
            -1,
        )
        chosen_B = torch.rand(batch_size) < config.probability
        return torch.where(chosen_B[:, None, None], changed_BFD, features_BFD)

    def _equalisers(self, batch_size: int) -> Tensor:
        order_E = torch.arange(self._num_coefficients)
        shape_BE = torch.randn(batch_size, self._num_coefficients) / (1 + order_E)
        shape_BE = shape_BE * self._config.spectral_shape
        shape_BE[:, 0] = _spread(batch_size)[:, 0] * self._config.max_gain
        return shape_BE


def _spread(batch_size: int) -> Tensor:
    return torch.rand(batch_size, 1) * 2 - 1


def _mel(hz: float) -> float:
    return _MEL_SCALE * math.log1p(hz / _MEL_HZ)
