"""Sampling, rendering and judging as one streaming Ray Data pipeline.

    prompts -> SampleStage -> RenderStage -> a pool per judge -> Parquet
                                                  rows without sound -> quarantine

A stage is a plain class in a pool of actors; while one block is judged the next is rendered and
the one after it sampled. A block is one batch of the first stage: Ray Data's unit of overlap.
"""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayActorError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from speechalign.artifacts import committed_folder
from speechalign.config.codec import CodecConfig
from speechalign.config.sampling import (
    GenerationEngineConfig,
    PoolConfig,
    RenderingConfig,
    SamplingConfig,
)
from speechalign.errors import (
    BudgetExceeded,
    DataError,
    EngineDead,
    SpeechalignError,
)
from speechalign.resources import check_room, possible_resources
from speechalign.rows import NOT_RENDERED, QUARANTINE
from speechalign.sampling.actor_face import ActorFace
from speechalign.sampling.rollouts import RolloutStage, Sampler
from speechalign.sampling.stages import RenderStage, SampleStage

logger = logging.getLogger(__name__)
SCORED = "scored.parquet"
QUARANTINED = "quarantine.parquet"
MAX_NOT_RENDERED = 0.05
"""A share of the answers; long ones fail first, and the others alone would flatter a policy."""
AUDIO_COLUMNS = ("waveform_pcm", "reference_pcm")
SECONDS = "_seconds"
"""A stage adds a column NAME_seconds: its share of the actor's time."""
MAX_RESTARTS = 3
"""Of an actor whose process died, and of a batch that it held. Ray Data's own default has no end:
rows that kill every process (out of memory, a segmentation fault) would be tried for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A plain class that turns Arrow batches into Arrow batches, and the actors that run it."""

    name: str
    stage: Callable[..., Callable[[pa.Table], pa.Table]]
    """The class itself; each actor creates one."""
    arguments: Mapping[str, Any]
    """Of its constructor."""
    pool: PoolConfig
    takes_whole_blocks: bool = False
    """Whether a block is a batch, whatever `pool.batch_size` says."""


def sample_stage(
    ar_folder: Path,
    engine: GenerationEngineConfig,
    sampling: SamplingConfig,
    *,
    run_seed: int,
    pool: PoolConfig,
) -> Stage:
    """Return the stage that samples."""
    arguments = {
        "ar_folder": ar_folder,
        "engine": engine,
        "sampling": sampling,
        "run_seed": run_seed,
    }
    return Stage(name="sample", stage=SampleStage, arguments=arguments, pool=pool)


def rollout_stage(sampler: Sampler, *, pool: PoolConfig) -> Stage:
    """Return the stage that samples from a policy in training."""
    return Stage(
        name="sample",
        stage=RolloutStage,
        arguments={"sampler": sampler},
        pool=pool,
        takes_whole_blocks=True,
    )


def render_stage(
    codec: CodecConfig,
    ar_folder: Path,
    nar_folder: Path,
    config: RenderingConfig,
    *,
    pool: PoolConfig,
) -> Stage:
    """Return the stage that renders."""
    arguments = {
        "codec": codec,
        "ar_folder": ar_folder,
        "nar_folder": nar_folder,
        "config": config,
    }
    return Stage(name="render", stage=RenderStage, arguments=arguments, pool=pool)


def check_resources(stages: Sequence[Stage], available: Mapping[str, float]) -> None:
    """Refuse pools that can never all start; Ray itself would wait for ever.

    Args:
        stages: of one pipeline; all their actors live at the same time.
        available: of the cluster, as `possible_resources` tells.

    Raises:
        ConfigError: naming what is missing, and which stage wants how much.
    """
    parts = {stage.name: (stage.pool.num_actors, stage.pool) for stage in stages}
    check_room("the pools want", parts, available, "num_actors")


def stream(table: pa.Table, stages: Sequence[Stage]) -> ray.data.Dataset:
    """Return the dataset that pulls the rows of `table` through the stages.

    Nothing runs before it is consumed. The order of rows is kept.

    Raises:
        ConfigError: the cluster is too small for the pools.
    """
    check_resources(stages, possible_resources())
    size = stages[0].pool.batch_size
    blocks = [table.slice(start, size) for start in range(0, table.num_rows, size)]
    return stream_blocks(blocks, stages)


def stream_blocks(blocks: Sequence[pa.Table], stages: Sequence[Stage]) -> ray.data.Dataset:
    """Return the dataset that pulls the blocks through the stages, each as a block of its own.

    Nothing runs before it is consumed. The order of rows is kept.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    dataset = ray.data.from_arrow(list[pa.Table | bytes](blocks))
    for stage in stages:
        face = type(stage.name, (ActorFace,), {})  # Ray names the actors, dead ones too, like it
        with warnings.catch_warnings():
            # Ray 2.64 will not take the two limits as arguments; 2.60 takes them no other way.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map_batches(
                face,
                fn_constructor_kwargs={"stage": stage.stage, "arguments": dict(stage.arguments)},
                compute=ray.data.ActorPoolStrategy(size=stage.pool.num_actors),
                batch_size=None if stage.takes_whole_blocks else stage.pool.batch_size,
                batch_format="pyarrow",
                num_cpus=stage.pool.num_cpus,
                num_gpus=stage.pool.num_gpus,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
                **_placed(stage.pool),
            )
    return dataset


def _placed(pool: PoolConfig) -> dict[str, Any]:
    """Return what Ray Data is told of the nodes that a pool's actors may live on."""
    return {"label_selector": pool.label_selector} if pool.label_selector else {}


def sample_and_judge(
    table: pa.Table,
    stages: Sequence[Stage],
    folder: Path,
    *,
    keep_audio: bool,
    quarantine: pa.Table | None = None,
) -> dict[str, Any]:
    """Run the stages over `table` and commit what comes out, row by row as it comes.

    Args:
        table: rows.PROMPT for the sampling stage, or rows.SAMPLE for the rendering stage.
        stages: in order; they share the cluster.
        folder: gets `scored.parquet`, `quarantine.parquet` and the manifest.
        keep_audio: whether the waveforms are stored too.
        quarantine: rows.QUARANTINE that were dropped before; they are stored beside the others.

    Returns:
        The facts of the manifest: counts, wall-clock and per-stage seconds.

    Raises:
        ConfigError: the cluster is too small for the pools.
        DataError: no row is left.
        BudgetExceeded: too many rows could not be rendered.
        EngineDead: an actor died once too often.
    """
    started = time.perf_counter()
    facts: dict[str, Any] = {"kind": "scored"}
    dataset = stream(table, stages)
    with committed_folder(folder, facts) as partial:
        tally = _Tally([] if quarantine is None else quarantine.to_pylist())
        batches: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        with errors_of_actors(stages):
            _write(map(tally.admit, batches), partial / SCORED, keep_audio=keep_audio)
        check_rendered(tally.dropped, tally.counts["rows"])
        dropped = pa.Table.from_pylist(tally.dropped, schema=QUARANTINE)
        pq.write_table(dropped, partial / QUARANTINED)
        if not tally.counts["rows"]:
            reason = tally.dropped[0]["reason"] if tally.dropped else "there was no prompt"
            raise DataError(f"every row was dropped on the way to {folder}; first: {reason}")
        facts |= tally.facts(stages) | {"wall_seconds": time.perf_counter() - started}
    logger.info("%s: %s", folder.name, time_split(facts))
    return facts


def check_rendered(dropped: Sequence[Mapping[str, str]], num_heard: int) -> None:
    """Refuse a result that says nothing of the answers that could not be heard.

    Args:
        dropped: rows.QUARANTINE.
        num_heard: how many answers are left.

    Raises:
        BudgetExceeded: too many were lost; where none is left, that is said elsewhere.
    """
    lost = [row for row in dropped if row["stage"] == "render"]
    total = len(lost) + num_heard
    if num_heard and len(lost) > MAX_NOT_RENDERED * total:
        raise BudgetExceeded(
            f"{len(lost)} of {total} answers could not be rendered, {MAX_NOT_RENDERED:.0%} may be; "
            f"the first reason: {lost[0]['reason']}"
        )


def time_split(facts: Mapping[str, Any]) -> str:
    """Return one line on where the time of a finished pipeline went."""
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in facts["stage_seconds"].items())
    return f"{facts['num_rows']} rows in {facts['wall_seconds']:.1f} s of wall clock ({parts})"


class _Tally:
    """Counts what passes, and holds back what was not rendered."""

    def __init__(self, dropped: list[dict[str, str]]) -> None:
        self.dropped = dropped
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def admit(self, batch: pa.Table) -> pa.Table:
        for name in batch.column_names:
            if name.endswith(SECONDS):
                self.seconds[name] += _sum(batch[name])
        if "waveform_pcm" in batch.column_names:
            batch = self._hold_back(batch)
            lengths: Any = pc.binary_length(batch["waveform_pcm"])
            self.counts["empty"] += _sum(pc.equal(lengths, pa.scalar(0, lengths.type)))
        self.counts["rows"] += batch.num_rows
        logger.info("%d rows so far", self.counts["rows"])
        self.counts["truncated"] += _sum(batch["is_truncated"])
        self.counts["tokens"] += _sum(pc.list_value_length(batch["token_ids"]))
        return batch

    def _hold_back(self, batch: pa.Table) -> pa.Table:
        is_failed = pc.starts_with(batch["judge_errors"], NOT_RENDERED)
        ids = ["prompt_id", "sample_index", "judge_errors"]
        self.dropped += [
            {
                "stage": "render",
                "row_id": f"{row['prompt_id']}/{row['sample_index']}",
                "reason": row["judge_errors"],
            }
            for row in batch.filter(is_failed).select(ids).to_pylist()
        ]
        return batch.filter(pc.invert(is_failed))

    def facts(self, stages: Sequence[Stage]) -> dict[str, Any]:
        return {
            "num_rows": self.counts["rows"],
            "num_dropped": len(self.dropped),
            "num_truncated": self.counts["truncated"],
            "num_empty": self.counts["empty"],
            "num_tokens": self.counts["tokens"],
            "stage_seconds": {
                stage.name: round(self.seconds[stage.name + SECONDS], 3) for stage in stages
            },
        }


@contextmanager
def errors_of_actors(stages: Sequence[Stage]) -> Generator[None]:
    """Raise what a stage raised, without Ray's wrapping and its call to report a bug of Ray.

    Args:
        stages: that run inside the block.

    Raises:
        SpeechalignError: what a stage raised.
        EngineDead: an actor of a stage died, and its replacements too.
    """
    rays_logger = logging.getLogger("ray.data.exceptions")
    level = rays_logger.level
    rays_logger.setLevel(logging.CRITICAL)
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, SpeechalignError):
            raise error.cause from None
        raise
    except RayActorError as error:
        names = [stage.name for stage in stages]
        name = next((name for name in names if f"({name})" in str(error)), " or ".join(names))
        raise EngineDead(
            f"stage {name!r}: its process died, and so did those that took its place "
            f"({MAX_RESTARTS} restarts); it may want more memory than there is (lower "
            "batch_size), or some row crashes it. Its last words are on its node, in "
            "/tmp/ray/session_latest/logs/worker-*.err"
        ) from error
    finally:
        rays_logger.setLevel(level)


def _sum(column: Any) -> Any:
    return pc.sum(column).as_py() or 0


def _write(tables: Iterator[pa.Table], path: Path, *, keep_audio: bool) -> None:
    first = next(tables, None)
    if first is None:
        return
    dropped = [] if keep_audio else [name for name in AUDIO_COLUMNS if name in first.column_names]
    schema = first.drop_columns(dropped).schema
    with pq.ParquetWriter(path, schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table.select(schema.names).cast(schema))
