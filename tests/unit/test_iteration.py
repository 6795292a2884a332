"""Which policy an iteration trains, and against which reference; nothing is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest

from speechalign.config.align import AlignConfig
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.pipeline import align
from speechalign.pipeline.align import Iteration
from speechalign.pipeline.run_directory import RunDirectory
from speechalign.training.online import OnlinePaths
from speechalign.training.preference import TrainingPaths
from tests.tiny_stack import TinyStack, tiny_recipe

STACK = TinyStack(codec=Path("codec"), ar=Path("start"), nar=Path("nar"), golden=Path("golden"))


class OnlyTrains(RunDirectory):
    """Asks for policies and for nothing that comes before them."""

    def stage(self, name: str, produce: Callable[[Path], object]) -> Path:
        folder = self.path / name
        if folder.name == "policy":
            produce(folder)
        return folder


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize(
    ("reference", "references"),
    [("first", ["start"] * 3), ("previous", ["start", "iteration-1/policy", "iteration-2/policy"])],
)
def test_an_iteration_goes_on_from_the_one_before_and_keeps_to_its_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    reference: str,
    references: list[str],
):
    told: list[tuple[Path, Path, Path]] = []

    def train_on_pairs(config: PreferenceTrainingConfig, paths: TrainingPaths) -> None:
        del config
        told.append((paths.policy, paths.reference, paths.output))

    def train_online(config: AlignConfig, iteration: int, paths: OnlinePaths) -> None:
        del config, iteration
        told.append((paths.policy, paths.reference, paths.output))

    monkeypatch.setattr(align, "train_on_pairs", train_on_pairs)
    monkeypatch.setattr(align, "train_online", train_online)
    config = tiny_recipe(
        STACK,
        tmp_path,
        pipeline={"iterations": 3, "reference": reference},
        training={"method": method},
    )
    run = OnlyTrains(path=tmp_path)
    for number in (1, 2, 3):
        Iteration(config, run, number).run("policy")
    outputs = [f"iteration-{number}/policy" for number in (1, 2, 3)]
    named = [
        tuple(str(path.relative_to(tmp_path) if path.is_absolute() else path) for path in paths)
        for paths in told
    ]
    assert named == list(zip(["start", *outputs[:2]], references, outputs, strict=True))
