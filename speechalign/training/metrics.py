"""What a training says of itself: JSON lines always, TensorBoard beside them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class MetricsWriter:
    """Appends to `metrics.jsonl`; only rank 0 writes.

    Args:
        folder: gets the file and the folder of TensorBoard.
        is_writer: whether this rank writes.
        resumed_at: the step that a training goes on from; what a killed one wrote of later steps
            is dropped, because they come again.
    """

    def __init__(
        self, folder: Path, *, is_writer: bool = True, resumed_at: int | None = None
    ) -> None:
        self._file = None
        if is_writer:
            from torch.utils.tensorboard.writer import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            if resumed_at is not None:
                _drop_after(path, resumed_at)
            self._file = path.open("a")
            purge_step = None if resumed_at is None else resumed_at + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Record the values of one step; what is not a number was not measured and is left out."""
        if self._file is None:
            return
        known = {k: v for k, v in values.items() if isinstance(v, str) or not math.isnan(v)}
        self._file.write(json.dumps({"step": step} | known) + "\n")
        self._file.flush()
        for name, value in known.items():
            if isinstance(value, float | int):
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the recorded lines, oldest first; a half-written last line is left out."""
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
