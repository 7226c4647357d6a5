"""What a run tells: metrics.jsonl, samples.jsonl, held_out.jsonl, logbook.md and the progress line.

Only the main process tells anything; in the others every method does nothing.
"""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from danlu.core.files import atomic_write, make_folder, os_errors, read_jsonl
from danlu.core.metrics import Metrics, read_metrics
from danlu.core.progress import Progress
from danlu.train.config import TrainConfig

HELD_OUT = "held_out.jsonl"


class Journal:
    """`resume_step`: what was told about later steps is dropped (never from the logbook)."""

    def __init__(self, config: TrainConfig, resume_step: int | None, main: bool) -> None:
        self.folder, self.main = config.out, main
        if not main:
            return
        self.metrics = Metrics(config.out, config.tensorboard, resume_step)
        self.progress = Progress(config.out.name, config.steps)
        self.progress.begin_at(resume_step or 0)
        for name in ("samples.jsonl", HELD_OUT):
            rows = read_jsonl(self.folder / name)
            self._write(name, [row for row in rows if resume_step is not None and row["step"] <= resume_step])

    def step(self, step: int, show: dict[str, Any], **values: Any) -> None:
        """One row of metrics, and the progress line with the fields of `show`."""
        if self.main:
            self.metrics.log(step, **values)
            self.progress.update(step, **show)

    def event(self, step: int, text: str, kind: str = "") -> None:
        """An entry of the logbook, said on the screen; with a `kind` also a row of metrics."""
        if self.main:
            write_logbook(self.folder, step, text)
            self.progress.say(f"step {step}: {text}")
            if kind:
                self.metrics.log(step, event=kind, text=text)

    def row(self, step: int, **values: Any) -> None:
        """One row of metrics."""
        if self.main:
            self.metrics.log(step, **values)

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Appends rows {"step", "prompt", "text"}."""
        if self.main:
            path = self.folder / "samples.jsonl"
            with os_errors(path), open(path, "a", encoding="utf-8") as file:
                for prompt, text in zip(prompts, texts, strict=True):
                    file.write(_line({"step": step, "prompt": prompt, "text": text}))

    def held_out(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """What an evaluation says besides its figures, a row for each held-out prompt."""
        if self.main and rows:
            others = [row for row in read_jsonl(self.folder / HELD_OUT) if row["step"] != step]
            self._write(HELD_OUT, [*others, *({"step": step, **row} for row in rows)])

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if rows or (self.folder / name).exists():
            with atomic_write(self.folder / name) as file:
                file.writelines(_line(row) for row in rows)

    def has(self, step: int, key: str) -> bool:
        """Whether metrics already hold `key` for this step (after a resume)."""
        return self.main and any(row["step"] == step and key in row for row in read_metrics(self.folder))

    def has_samples(self, step: int) -> bool:
        return self.main and any(row["step"] == step for row in read_samples(self.folder))

    def close(self, *exc: object) -> None:
        """`exc`: what ended the run, as `__exit__` gets it."""
        if self.main:
            self.metrics.close()
            self.progress.__exit__(*exc)


def write_logbook(folder: Path, step: int, text: str) -> None:
    """One line of `logbook.md`: "- 2026-03-01 14:05:09 · step 200 · Checkpoint …"."""
    path = make_folder(folder) / "logbook.md"
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    with os_errors(path), open(path, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(f"# Logbook of {folder.name}\n\n")
        file.write(f"- {now} · step {step} · {text}\n")
        file.flush()
        os.fsync(file.fileno())


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of `samples.jsonl`."""
    return read_jsonl(folder / "samples.jsonl")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
