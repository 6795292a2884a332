"""The weights of the lowest held-out loss, kept beside the checkpoint until training ends.

WORK/best/model.safetensors  manifest.json: step, heldout_loss
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from speechalign.artifacts import committed_folder, is_committed, manifest_facts, verify_folder
from speechalign.errors import Diverged
from speechalign.training.engine import Engine, barrier, global_sum, world

WEIGHTS = "model.safetensors"


class BestWeights:
    """Keeps the best weights on disk, so that a killed training has them when it resumes.

    Args:
        folder: where they are.
        is_resumed: whether the training goes on from a checkpoint; one that starts anew drops
            what it finds.
    """

    def __init__(self, folder: Path, *, is_resumed: bool) -> None:
        self._folder = folder
        self._lowest = float("inf")
        if not is_resumed and world()[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if is_committed(folder):
            self._lowest = float(manifest_facts(folder)["heldout_loss"])

    def offer(self, engine: Engine, heldout_loss: float) -> None:
        """Keep the weights if their loss is the lowest so far; every rank must call it."""
        is_writer = world()[0] == 0
        # One rank decides: all must enter `whole_weights`, and losses may differ in the last bit.
        is_lower = torch.tensor(float(is_writer and heldout_loss < self._lowest))
        if not global_sum(is_lower.to(engine.device)):
            return
        self._lowest = heldout_loss
        with engine.whole_weights() as model:
            if is_writer:
                facts = {"step": engine.step_index, "heldout_loss": heldout_loss}
                _write(self._folder, model, facts)
        barrier()

    def load_into(self, model: nn.Module) -> int:
        """Put the best weights into a model and return the step that they are of.

        Raises:
            Diverged: no held-out loss was ever finite.
            CorruptArtifact: a file differs from the manifest.
        """
        if not is_committed(self._folder):
            raise Diverged("the held-out loss was never a finite number; lower the learning rate")
        facts = verify_folder(self._folder)
        model.load_state_dict(safetensors.torch.load_file(self._folder / WEIGHTS))
        return int(facts["step"])


def _write(folder: Path, model: nn.Module, facts: Mapping[str, Any]) -> None:
    # Cloned: tied weights share their memory, and ZeRO's are parts of one buffer.
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with committed_folder(folder, facts) as partial:
        safetensors.torch.save_file(weights, partial / WEIGHTS)
