"""From what a run was told to the engine that answers."""

from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from speechalign.config.sampling import GenerationEngineConfig, TransformersConfig, VllmConfig

if TYPE_CHECKING:
    from speechalign.generation.hf import TransformersEngine
    from speechalign.generation.vllm import VllmEngine


def build_generation_engine(
    folder: Path, config: GenerationEngineConfig
) -> "VllmEngine | TransformersEngine":
    """Return the engine that a config names, with the AR policy of `folder`.

    It is an `Engine` for whole batches and a `SteppingEngine` for `AnswerStreams`.

    Weights are loaded here, in the actor; so is the engine's library.

    Raises:
        ConfigError: the folder holds no AR policy, or the library is not installed.
        CorruptArtifact: a file differs from the manifest.
    """
    match config:
        case VllmConfig():
            from speechalign.generation.vllm import VllmEngine

            return VllmEngine(folder, config)
        case TransformersConfig():
            from speechalign.generation.hf import TransformersEngine

            return TransformersEngine(folder, config)
        case _:
            assert_never(config)
