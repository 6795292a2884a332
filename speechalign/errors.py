"""Everything speechalign raises on purpose.

    SpeechalignError
      ConfigError          a run that could never have worked; raised before any actor starts
        RunLocked          another run holds the directory
      DataError            a record that breaks the contract of its type
        MalformedCodes     token ids that are not whole codec frames
        UnspeakableText    a text with characters the policy has no symbol for
        CorruptArtifact    a file that differs from its manifest
      BudgetExceeded       more rows failed than the run allows
      LogprobMismatch      sampler and trainer disagree about the same tokens
      StaleRollouts        answers of another policy version than the step is for
      Diverged             training went where no policy comes back from
      EngineDead           an engine that will not answer again; the actor must be replaced
      ClusterUnreachable   nobody answers at the address of a cluster
    Stopped                no error: a process that was asked to end, on its way out

Arguments are plain values, so every error survives the pickling that Ray does to it.
A message says what is wrong, where, and what to do.
"""

from typing import ClassVar


class SpeechalignError(Exception):
    """The base of every error raised on purpose."""

    exit_code: ClassVar[int] = 1
    """Of the command; it tells a job system what kind of failure this was."""


class ConfigError(SpeechalignError, ValueError):
    """A run that could never have worked."""

    exit_code = 2


class RunLocked(ConfigError):
    """Another run holds the directory."""


class DataError(SpeechalignError, ValueError):
    """A record that breaks the contract of its type."""

    exit_code = 3


class MalformedCodes(DataError):
    """Token ids that are not whole codec frames."""


class UnspeakableText(DataError):
    """A text with characters the policy has no symbol for."""


class CorruptArtifact(DataError):
    """A file that differs from its manifest."""


class BudgetExceeded(SpeechalignError, RuntimeError):
    """More rows failed than the run allows."""


class LogprobMismatch(SpeechalignError, RuntimeError):
    """Sampler and trainer disagree about the same tokens."""


class StaleRollouts(SpeechalignError, RuntimeError):
    """Answers of another policy version than the step is for."""


class Diverged(SpeechalignError, RuntimeError):
    """Training went where no policy comes back from."""

    exit_code = 4


class EngineDead(SpeechalignError, RuntimeError):
    """An engine that will not answer again."""


class ClusterUnreachable(SpeechalignError, RuntimeError):
    """Nobody answers at the address of a cluster."""


class Stopped(BaseException):
    """A process that was asked to end. No `except Exception` on the way out may hold it up."""
