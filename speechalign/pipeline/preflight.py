"""What would make a run fail later, found before anything is started."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import soundfile as sf

from speechalign.artifacts import verify_folder
from speechalign.codec.build import build_codec
from speechalign.config.align import AlignConfig
from speechalign.config.judges import (
    TRUNCATED,
    HttpJudgeConfig,
    JudgeConfig,
    PythonJudgeConfig,
    RecogniserConfig,
    RewardModelJudgeConfig,
    judge_measures,
    judge_name,
)
from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.errors import ConfigError, DataError
from speechalign.judges.http import headers_of
from speechalign.judges.user_code import load_user_class
from speechalign.judges.whisper import model_folder
from speechalign.pipeline.cluster import connected
from speechalign.pipeline.sample import rollout_judging_stages, sampling_stage, speaking_stages
from speechalign.policy.ar import check_ar
from speechalign.policy.nar import load_nar
from speechalign.policy.reward_model import load_reward_model
from speechalign.resources import possible_resources
from speechalign.rows import GOLDEN, NOT_RENDERED, RENDERED, waveform_from_pcm
from speechalign.sampling import heldout, rollouts
from speechalign.sampling.pipeline import SECONDS, errors_of_actors, stream
from speechalign.sampling.pipeline import check_resources as check_pools
from speechalign.sampling.prompts import admit_prompts, build_prompts
from speechalign.sampling.stages import RENDER_SECONDS, SAMPLE_SECONDS

ROLLOUT_FIELDS = (
    rollouts.STEP,
    rollouts.VERSION_STEP,
    rollouts.IS_HELDOUT,
    rollouts.SAMPLED_FROM,
    rollouts.SAMPLED_UNTIL,
    rollouts.PROBE_DIFFERENCE,
    heldout.HELDOUT_ERRORS,
)


def check_run(config: AlignConfig) -> None:
    """Raise for everything about a recipe that can be known without an actor.

    Raises:
        ConfigError: an artifact, a package or a resource is not there.
        DataError: artifacts of different codecs meet.
    """
    check_artifacts(config)
    in_training, evaluating = (*config.judges, *config.heldout_judges), config.evaluation.judges
    check_judge_names(in_training)
    check_judge_names(evaluating)
    for judge in (*in_training, *evaluating):
        if isinstance(judge, RecogniserConfig):
            model_folder(judge.model)
        if isinstance(judge, PythonJudgeConfig):
            load_user_class(judge)
        if isinstance(judge, HttpJudgeConfig):
            headers_of(judge)
        if isinstance(judge, RewardModelJudgeConfig):
            fingerprint = build_codec(config.codec).fingerprint
            load_reward_model(judge.path, codec_fingerprint=fingerprint)


def check_judge_names(judges: Sequence[JudgeConfig]) -> None:
    """Refuse judges that would write a column which something else writes.

    Raises:
        ConfigError: a user's own judge has a name that is taken.
    """
    fields = (SAMPLE_SECONDS, RENDER_SECONDS, *ROLLOUT_FIELDS)
    taken = {*RENDERED.names, *(field.name for field in fields), TRUNCATED}
    taken.add(NOT_RENDERED.partition(":")[0])  # an error that begins so is the renderer's
    for judge in judges:
        columns = {*judge_measures(judge), judge_name(judge) + SECONDS}
        if columns & taken:
            raise ConfigError(
                f"judge {judge_name(judge)!r} would write {', '.join(sorted(columns & taken))}, "
                "which is taken; give it another name"
            )
        taken |= columns


def check_artifacts(config: AlignConfig) -> str:
    """Verify codec, policy, NAR model and golden tokens, and that they are of one codec."""
    codec = build_codec(config.codec)
    for name, folder in (("policy", config.policy), ("nar", config.nar)):
        if not folder.is_dir():
            raise ConfigError(f"{name} {folder} does not exist; train it with `speechalign sft`")
    policy_facts, nar = check_ar(config.policy), load_nar(config.nar)
    for name, folder, facts in (
        ("policy", config.policy, policy_facts),
        ("nar", config.nar, nar.facts),
    ):
        found = facts["codec_fingerprint"]
        if found != codec.fingerprint:
            raise DataError(
                f"{name} {folder} was trained on codec {found}, this run's codec is "
                f"{codec.fingerprint}; their codes mean different sounds"
            )
    known = nar.model.config.num_levels
    if config.rendering.num_levels > known:
        raise ConfigError(
            f"rendering.num_levels is {config.rendering.num_levels}, the NAR model {config.nar} "
            f"knows {known} levels"
        )
    _check_context(config.policy, config.engine.max_model_len)
    num_clips = _check_golden(config.golden, codec.fingerprint)
    return f"codec {codec.fingerprint}, policy, NAR model, {num_clips} golden clips"


def check_resources(config: AlignConfig) -> str:
    """Start or join Ray and compare what the pools want with what there is."""
    with connected():
        available = possible_resources()
        judging = rollout_judging_stages(config, config.policy)
        stages = [sampling_stage(config, config.policy), *judging]
        check_pools(stages, available)
        check_pools(speaking_stages(config, config.policy, config.evaluation.judges), available)
        workers = config.training.workers
        for kind, per_worker, per_actor in (
            ("CPU", workers.cpus_per_worker, "num_cpus"),
            ("GPU", workers.gpus_per_worker, "num_gpus"),
        ):
            wanted, beside = workers.num_workers * per_worker, ""
            if isinstance(config.training, OnlineTrainingConfig):
                pools = sum(s.pool.num_actors * getattr(s.pool, per_actor) for s in stages)
                wanted, beside = wanted + pools, f" and {pools:g} for the pools beside them"
            if wanted > available.get(kind, 0.0):
                raise ConfigError(
                    f"training wants {wanted:g} {kind}s for {workers.num_workers} workers{beside}, "
                    f"the cluster has {available.get(kind, 0.0):g}; lower "
                    f"training.workers.num_workers, their {kind.lower()}s_per_worker, or "
                    f"{per_actor} of the pools"
                )
        return f"{available.get('CPU', 0):g} CPUs, {available.get('GPU', 0):g} GPUs are enough"


def say_something(config: AlignConfig, path: Path) -> str:
    """Let the policy say one held-out sentence and write it to a file."""
    golden = ds.dataset(config.golden, schema=GOLDEN).to_table()
    one = config.evaluation.prompts.model_copy(update={"num_prompts": 1})
    prompts = build_prompts(golden, one, seed=config.seed)
    from speechalign.policy.ar import VOCABULARY
    from speechalign.policy.vocabulary import Vocabulary

    facts = verify_folder(config.policy)
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    admitted = admit_prompts(prompts, vocabulary, facts, max_prompt_tokens=10_000)
    with connected():
        stages = speaking_stages(config, config.policy, ())
        with errors_of_actors(stages):
            (row, *_) = stream(admitted.prompts, stages).take_all()
    wave_N = waveform_from_pcm(row["waveform_pcm"])
    sf.write(path, wave_N, row["sample_rate_hz"])
    loudness = float(np.abs(wave_N).max()) if len(wave_N) else 0.0
    if not loudness:
        raise DataError("the policy said nothing; is it trained?")
    return f"said {prompts[0].text!r} in {len(wave_N) / row['sample_rate_hz']:.1f} s: {path}"


def _check_context(policy: Path, max_model_len: int) -> None:
    known = json.loads((policy / "config.json").read_text()).get("max_position_embeddings")
    if known is not None and max_model_len > known:
        raise ConfigError(
            f"engine.max_model_len is {max_model_len}, the policy {policy} was built for {known} "
            "positions; lower it"
        )


def _check_golden(path: Path, fingerprint: str) -> int:
    if not path.exists():
        raise ConfigError(f"golden tokens {path} do not exist; make them: `speechalign prepare`")
    try:
        column = ds.dataset(path).to_table(columns=["codec_fingerprint"])[0]
    except (pa.ArrowInvalid, KeyError) as error:
        raise ConfigError(f"{path} does not hold golden tokens: {error}") from None
    others = [value for value in pc.unique(column).to_pylist() if value != fingerprint]
    if others:
        raise DataError(
            f"{path} has clips of codec {others[0]}, this run's codec is {fingerprint}; prepare "
            "the data again with this codec, or set codec to the one it was prepared with"
        )
    return len(column)
