"""What turns prompts into answers, in token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from speechalign.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt, and one seed for each answer that is wanted."""

    prompt_token_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The distribution to draw from."""

    temperature: float
    """0 takes the likeliest token every time."""
    top_p: float
    top_k: int
    """0: off."""
    max_new_tokens: int
    eos_id: int
    """Ends an answer, and is part of it."""
    allowed_ids: tuple[int, ...] | None = None
    """The only tokens that may be drawn; none: all of the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One answer."""

    token_ids: tuple[int, ...]
    """The stop token included."""
    logprobs: tuple[float, ...]
    """Of each token under the distribution it was drawn from (temperature, top-k, top-p)."""
    is_truncated: bool
    """Whether the answer hit the length cap, so that it has no stop token."""


class Engine(Protocol):
    """A policy that answers.

    An answer depends on the policy, its prompt, the parameters and its own seed: not on the
    requests beside it, except where rounding differs between batch shapes.
    """

    @property
    def policy_version(self) -> int:
        """Of the weights that answer now."""
        ...

    def load_policy(self, folder: Path) -> None:
        """Replace the weights in place by those of another policy of the same shape.

        Raises:
            ConfigError: the folder holds no AR policy; the old weights stay.
            CorruptArtifact: a file differs from the manifest; the old weights stay.
        """
        ...

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> list[list[Generation]]:
        """Return one list per request, with one answer per seed, in order.

        Raises:
            ConfigError: a prompt and the length cap together exceed the model's length.
            EngineDead: the engine will not answer again.
        """
        ...

    def score(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, ...]]:
        """Return the log-probs at temperature 1 of given (prompt, answer) token ids.

        One number a token of the answer.
        """
        ...


def check_lengths(
    requests: Sequence[GenerationRequest], params: SamplingParams, max_model_len: int
) -> None:
    """Refuse requests that do not fit.

    Raises:
        ConfigError: a prompt and the length cap together exceed the model's length.
    """
    longest = max((len(request.prompt_token_ids) for request in requests), default=0)
    if longest + params.max_new_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and {params.max_new_tokens} new ones exceed "
            f"max_model_len {max_model_len}; lower max_new_tokens or raise max_model_len"
        )
