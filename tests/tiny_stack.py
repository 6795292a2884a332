"""A whole speech stack of random weights, in seconds: what pipelines are tested on.

Nothing it says is speech. Only judges without a model can listen to it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from speechalign.codec.embedded import EmbeddedCodec, save_embedded
from speechalign.codec.embedded_model import EmbeddedModel
from speechalign.config.align import AlignConfig
from speechalign.config.codec import EmbeddedModelConfig
from speechalign.config.policy import ArConfig, NarConfig
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.nar import NarModel, save_nar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rows import GOLDEN

CODEBOOK_SIZE, NUM_CODEBOOKS, PREFIX_FRAMES = 16, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyStack:
    """Where the parts are."""

    codec: Path
    ar: Path
    nar: Path
    golden: Path


def build_tiny_stack(folder: Path, *, num_clips: int = 48) -> TinyStack:
    """Write a codec, an AR model, a NAR model and golden tokens of one fingerprint."""
    torch.manual_seed(0)
    codec_config = EmbeddedModelConfig(
        hidden_dim=16,
        latent_dim=8,
        post_dim=8,
        num_acoustic_codebooks=NUM_CODEBOOKS - 1,
        codebook_size=CODEBOOK_SIZE,
    )
    save_embedded(EmbeddedModel(codec_config), folder / "codec")
    fingerprint = EmbeddedCodec.load(folder / "codec").fingerprint
    vocabulary = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=CODEBOOK_SIZE)
    ar = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), vocabulary)
    facts = {"codec_fingerprint": fingerprint, "policy_version": 0, "prefix_frames": PREFIX_FRAMES}
    save_ar(folder / "ar", ar, vocabulary, facts)
    nar_config = NarConfig(hidden_size=16, dilations=(1,), num_levels=2, speaker_frames=8)
    nar = NarModel(nar_config, num_codebooks=NUM_CODEBOOKS, codebook_size=CODEBOOK_SIZE)
    save_nar(folder / "nar", nar, {"codec_fingerprint": fingerprint})
    pq.write_table(_golden(num_clips, fingerprint), folder / "golden.parquet")
    return TinyStack(
        codec=folder / "codec",
        ar=folder / "ar",
        nar=folder / "nar",
        golden=folder / "golden.parquet",
    )


def tiny_recipe(stack: TinyStack, run_dir: Path, **changes: object) -> AlignConfig:
    """Return a recipe that runs on the stack in half a minute."""
    small = {"speaker_frames": 8, "max_golden_frames": 100}
    values: dict[str, object] = {
        "run_dir": run_dir,
        "codec": {"kind": "embedded", "path": stack.codec},
        "golden": stack.golden,
        "policy": stack.ar,
        "nar": stack.nar,
        "prompts": {"split": "train", "num_prompts": 12, **small},
        "engine": {"kind": "transformers", "max_model_len": 64},
        "sampling": {"samples_per_prompt": 3, "max_new_tokens": 24},
        "rendering": {"num_levels": 2},
        "judges": [{"kind": "signal", "pool": {"num_cpus": 0.1}}],
        "reward": {"terms": [{"measure": "duration_ratio", "weight": -1.0}]},
        "pairing": {"kinds": ["golden", "ranked"], "min_margin": 0.01},
        "training": {"num_epochs": 1, "pairs_per_step": 4, "heldout_share": 0.2,
                     "max_logprob_difference": 1e-4,
                     "early_stop": {"every": 2}, "engine": {"learning_rate": 1e-3}},
        "evaluation": {"prompts": {"split": "heldout", "num_prompts": 6, **small},
                       "judges": [{"kind": "signal", "pool": {"num_cpus": 0.1}}],
                       "num_resamples": 50, "num_players": 2},
    }  # fmt: skip
    return AlignConfig.model_validate(values | changes)


def _golden(num_clips: int, fingerprint: str) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num_clips):
        num_frames = int(rng.integers(12, 24))
        text = " ".join("ab"[bit] for bit in rng.integers(0, 2, 5)) + f" {index}"
        rows.append(
            {
                "clip_id": f"c{index:03d}",
                "text": text,
                "phonemes": "".join(" ab"[i] for i in rng.integers(1, 3, 6)),
                "speaker_id": f"s{index % 2}" if index % 3 else f"h{index % 2}",
                "source": "random",
                "kind": "synthetic",
                "split": "train" if index % 3 else "heldout",
                "num_frames": num_frames,
                "codes": rng.integers(0, CODEBOOK_SIZE, NUM_CODEBOOKS * num_frames),
                "codec_fingerprint": fingerprint,
            }
        )
    return pa.Table.from_pylist(rows, schema=GOLDEN)
