"""Means over what all ranks saw of a step, however unevenly they saw it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speechalign.training.engine import global_max, global_sum


class RunningMeans:
    """Sums and counts under fixed names; every rank has the same names in the same order."""

    def __init__(self, means: Sequence[str], largest: Sequence[str] = ()) -> None:
        self._sums = {name: torch.zeros(2, dtype=torch.float64) for name in means}
        nothing = torch.tensor(float("-inf"), dtype=torch.float64)
        self._largest = dict.fromkeys(largest, nothing)

    def add(self, name: str, values: Tensor) -> None:
        """Count values in."""
        kept = values.detach().double().cpu()
        self._sums[name] += torch.stack([kept.sum(), torch.tensor(float(kept.numel()))])

    def see(self, name: str, values: Tensor) -> None:
        """Remember the largest of the values."""
        if values.numel():
            largest = values.detach().double().max().cpu()
            self._largest[name] = torch.maximum(self._largest[name], largest)

    def over_ranks(self, device: torch.device) -> dict[str, float]:
        """Return the means and maxima of all ranks; a mean or maximum of nothing is left out."""
        result: dict[str, float] = {}
        if self._sums:
            sums = global_sum(torch.stack(list(self._sums.values())).float().to(device)).tolist()
            found = zip(self._sums, sums, strict=True)
            result |= {name: total / count for name, (total, count) in found if count}
        if self._largest:
            largest = global_max(torch.stack(list(self._largest.values())).float().to(device))
            seen = zip(self._largest, largest.tolist(), strict=True)
            result |= {name: value for name, value in seen if value > float("-inf")}
        return result
