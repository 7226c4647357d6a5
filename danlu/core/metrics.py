"""A run's numbers over time: one JSON object a line, and TensorBoard where it is installed."""

import json
import time
from pathlib import Path
from typing import Any

from danlu.core.files import atomic_write, make_folder, os_errors, read_jsonl


class Metrics:
    """Appends rows to `metrics.jsonl`; each has `step` and `time` (Unix seconds).

    `resume_step`: rows after that step are dropped, since a resumed run writes them again.
    """

    def __init__(self, folder: Path, tensorboard: bool = False, resume_step: int | None = None) -> None:
        self.path = make_folder(folder) / "metrics.jsonl"
        rows = [] if resume_step is None else [r for r in read_metrics(folder) if r["step"] <= resume_step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self._board = _summary_writer(folder, resume_step) if tensorboard else None

    def log(self, step: int, **values: Any) -> None:
        """Writes one row; numbers also go to TensorBoard."""
        with os_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        if self._board:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board:
            self._board.close()


def _summary_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return read_jsonl(folder / "metrics.jsonl")
