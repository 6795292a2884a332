"""When a preference training has gone far enough, or too far. Pure."""

from dataclasses import asdict, dataclass
from typing import Any

from speechalign.config.preference_training import EarlyStopConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the held-out pairs say after some updates."""

    step: int
    loss: float
    accuracy: float
    chosen_drop: float
    """Nats per token that the chosen answers lost since the training began."""


class EarlyStop:
    """Remembers the best look and says when to stop."""

    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self.best: Look | None = None
        self._looks_since_best = 0

    def state(self) -> dict[str, Any]:
        """Return what a resumed training has to know."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "looks_since_best": self._looks_since_best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.best = None if state["best"] is None else Look(**state["best"])
        self._looks_since_best = state["looks_since_best"]

    def see(self, look: Look) -> str | None:
        """Return why training must stop, or nothing.

        A look at which the chosen answers have fallen too far is never the best one: the loss
        of DPO can fall while both answers become unlikely (Pal et al. 2024).
        """
        if look.chosen_drop > self._config.max_chosen_drop:
            return (
                f"step {look.step}: held-out chosen answers lost {look.chosen_drop:.2f} nats a "
                f"token since the start, more than {self._config.max_chosen_drop}"
            )
        if self.best is None or look.loss < self.best.loss:
            self.best, self._looks_since_best = look, 0
            return None
        self._looks_since_best += 1
        if self._looks_since_best >= self._config.patience:
            return (
                f"step {look.step}: held-out loss {look.loss:.4f} was not better than "
                f"{self.best.loss:.4f} of step {self.best.step} for {self._looks_since_best} looks"
            )
        return None
