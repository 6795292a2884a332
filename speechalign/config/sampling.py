"""How prompts are chosen, sampled and rendered, and how many actors do it."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from speechalign.config.base import Config

Temperature: TypeAlias = Annotated[float, Field(ge=0)]
DType: TypeAlias = Literal["fp32", "bf16", "fp16"]


class PromptsConfig(Config):
    """Which recordings become prompts."""

    split: str = "train"
    num_prompts: int = Field(default=64, gt=0)
    speaker_frames: int = Field(default=100, gt=0)
    """The length of the voice to continue; 100 frames are 2 s of the embedded codec."""
    max_golden_frames: int = Field(default=400, gt=0)
    """Longer recordings are left out, so that an answer fits under the length cap."""
    kinds: tuple[str, ...] = ()
    """Of the corpus; empty: all."""
    sources: tuple[str, ...] = ()
    """Of the corpus; empty: all."""
    speakers: tuple[str, ...] = ()
    """Empty: all."""


class SamplingConfig(Config):
    """How the policy speaks."""

    samples_per_prompt: int = Field(default=4, gt=0)
    temperatures: tuple[Temperature, ...] = Field(default=(1.0,), min_length=1)
    """Dealt out to the samples of a prompt in turn; 0 takes the likeliest token every time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0: off."""
    common_seeds: bool = False
    """All versions of a policy share their luck, so that less of a difference is chance."""
    max_new_tokens: int = Field(default=500, gt=0)
    """The length cap: an answer that reaches it is truncated, and says so."""


class VllmConfig(Config):
    """A vLLM engine inside the actor: continuous batching, prefix caching."""

    kind: Literal["vllm"] = "vllm"
    device: Literal["cpu", "cuda"] = "cpu"
    """Must be the device that the installed vLLM was built for."""
    dtype: DType = "fp32"
    max_model_len: int = Field(default=1024, gt=1)
    """Prompt and answer together, in tokens."""
    max_num_seqs: int = Field(default=64, gt=0)
    """Answers in flight."""
    kv_cache_mib: int = Field(default=512, gt=0)
    num_threads: int = Field(default=1, gt=0)
    """On a CPU; more threads than free cores make it several times slower."""
    enforce_eager: bool = True
    """False compiles the model and captures graphs: worth it on an accelerator."""


class TransformersConfig(Config):
    """A plain loop over a transformers model: needs no vLLM, and is the reference for it."""

    kind: Literal["transformers"] = "transformers"
    device: str = "cpu"
    dtype: DType = "fp32"
    max_model_len: int = Field(default=1024, gt=1)
    """Prompt and answer together, in tokens."""
    max_num_seqs: int = Field(default=64, gt=0)
    """Answers in flight."""
    num_threads: int = Field(default=1, gt=0)
    """On a CPU."""


GenerationEngineConfig: TypeAlias = Annotated[
    VllmConfig | TransformersConfig, Field(discriminator="kind")
]


class RenderingConfig(Config):
    """How an answer becomes sound."""

    num_levels: int = Field(default=8, ge=1)
    """Codec levels that are decoded; the NAR model fills those that the answer lacks."""
    source: Literal["answer", "recording"] = "answer"
    """`recording` decodes the golden codes instead: what the codec alone can do."""
    num_threads: int = Field(default=1, gt=0)
    """On a CPU."""
    speaker_cache_size: int = Field(default=256, gt=0)
    """Rendered voices that are kept; the samples of a prompt share one."""


class PoolConfig(Config):
    """The actors of one stage."""

    num_actors: int = Field(default=1, gt=0)
    num_cpus: float = Field(default=0.5, ge=0)
    """Of each actor. Ray counts them; it does not bind them."""
    num_gpus: float = Field(default=0.0, ge=0)
    label_selector: dict[str, str] = Field(default_factory=dict[str, str])
    """Labels of the nodes that the actors may live on, e.g. {speechalign-pool: sample}."""
    batch_size: int = Field(default=16, gt=0)
    """Rows that the stage gets at once; prompts for sampling, samples for the others."""


class SamplingPoolsConfig(Config):
    """The actors that sample and render; each judge has a pool of its own."""

    sample: PoolConfig = PoolConfig(batch_size=32)
    render: PoolConfig = PoolConfig()
