"""The AR model: any causal language model of transformers, with the vocabulary it learned.

    FOLDER/config.json  model.safetensors  vocabulary.json  manifest.json

Facts in the manifest: kind "ar", codec_fingerprint, policy_version, prefix_frames.

transformers takes 5 s of a core to import: only who builds or loads a model waits for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from speechalign.artifacts import committed_folder, verify_folder
from speechalign.config.policy import ArConfig
from speechalign.errors import ConfigError, DataError
from speechalign.policy.vocabulary import EOS_ID, PAD_ID, SPEAKER_ID, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = "vocabulary.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPolicy:
    """A policy ready to compute with."""

    model: "PreTrainedModel"
    vocabulary: Vocabulary
    facts: Mapping[str, Any]


def build_ar(config: ArConfig, vocabulary: Vocabulary) -> "PreTrainedModel":
    """Return a fresh Llama-shaped model; weights come from torch's current seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = config.hidden_size
    make_config: Any = LlamaConfig  # its signature hides what PretrainedConfig takes
    return LlamaForCausalLM(
        make_config(
            vocab_size=vocabulary.size,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 64 * 64 or 64,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            bos_token_id=SPEAKER_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            attn_implementation="sdpa",
        )
    )


def save_ar(
    folder: Path, model: "PreTrainedModel", vocabulary: Vocabulary, facts: Mapping[str, Any]
) -> None:
    """Commit a policy: whole or not at all."""
    missing = {"codec_fingerprint", "policy_version", "prefix_frames"} - facts.keys()
    if missing:
        raise DataError(f"a policy needs the facts {sorted(missing)} to be saved to {folder}")
    with committed_folder(folder, {"kind": "ar"} | dict(facts)) as partial:
        model.save_pretrained(partial)
        vocabulary.save(partial / VOCABULARY)


def check_ar(folder: Path) -> dict[str, Any]:
    """Check the files of a policy against its manifest and return its facts.

    Raises:
        ConfigError: the folder holds no AR policy.
        CorruptArtifact: a file differs from the manifest.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} holds no policy; train one with `speechalign sft`")
    facts = verify_folder(folder)
    if facts.get("kind") != "ar":
        raise ConfigError(f"{folder} holds a {facts.get('kind')!r} artifact, not an AR policy")
    return facts


def load_ar(folder: Path, *, device: str = "cpu", dtype: str = "fp32") -> LoadedPolicy:
    """Load a policy after its files were checked against the manifest.

    Raises:
        ConfigError: the folder holds no AR policy.
        CorruptArtifact: a file differs from the manifest.
    """
    from transformers import AutoModelForCausalLM

    facts = check_ar(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)
    moved: Any = model  # to() is decorated beyond what a type checker follows
    return LoadedPolicy(
        model=moved.to(device).eval(),
        vocabulary=Vocabulary.load(folder / VOCABULARY),
        facts=facts,
    )
