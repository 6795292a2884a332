"""What tests with actors share: to start it costs more than to look at it.

One Ray, one speech stack of random weights, and one finished run of two iterations. A test that
wants a run in some state takes stages of the finished one (`start_from`) and runs the rest.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from speechalign.config.align import AlignConfig
from speechalign.pipeline.align import run_align
from speechalign.pipeline.cluster import connected
from tests.ray.warm_workers import warm_workers
from tests.tiny_stack import TinyStack, build_tiny_stack, tiny_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that nobody changes."""

    config: AlignConfig
    text: str
    """What the command said."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.config.run_dir

    def start_from(self, config: AlignConfig, *stages: str) -> None:
        """Let another run have some of the stages, as if it had made them itself."""
        for stage in stages:
            shutil.copytree(self.folder / stage, config.run_dir / stage)


@pytest.fixture(scope="session")
def clusters() -> Iterator[ExitStack]:
    """Ends the cluster with the session."""
    with warm_workers(), ExitStack() as clusters:
        yield clusters


@pytest.fixture(scope="module")
def cluster(clusters: ExitStack) -> None:
    """Be connected to the cluster that all files share; who ended it has the next file start it."""
    clusters.enter_context(connected())


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TinyStack:
    """A stack whose files nobody changes."""
    return build_tiny_stack(tmp_path_factory.mktemp("stack"), num_clips=96)


@pytest.fixture(scope="session")
def finished(
    clusters: ExitStack, stack: TinyStack, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """Two iterations over the same prompts: the first is that of a run with one iteration."""
    pipeline = {"iterations": 2, "prompts": "same", "reference": "first"}
    config = tiny_recipe(stack, tmp_path_factory.mktemp("finished") / "run", pipeline=pipeline)
    clusters.enter_context(connected())
    return FinishedRun(config=config, text=run_align(config).text)
