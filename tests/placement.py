"""Stages and workers that say which node they are on."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import ray


class WhereAmI:
    """Adds the id of its node to every row."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        here = [ray.get_runtime_context().get_node_id()] * batch.num_rows
        return batch.append_column("node", pa.array(here))


def say_where(settings: dict[str, Any]) -> None:
    """Write the id of the worker's node into a file of its own."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    here = ray.get_runtime_context().get_node_id()
    (Path(settings["folder"]) / f"rank{rank}").write_text(here)
