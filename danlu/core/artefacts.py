"""What a file or folder is, as hashes: of its artefacts, not of the notes that a run keeps beside them.

Hashing is quick for what a stage has written: a file whose size and time are as `lineage.json` recorded
them is not read again, unless asked for.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import hash_file, os_errors, read_text

LINEAGE = "lineage.json"
DONE = "DONE"
NOTES = {
    *("config.yaml", LINEAGE, DONE, "result.json", "metrics.jsonl", "samples.jsonl", "logbook.md"),
    *("checkpoints", "tensorboard"),
}
"""What stands in a stage's folder beside its artefact: it tells of the run, and no other stage reads it."""
RECIPE = "recipe.yaml"
RUN_NOTES = {RECIPE, "report.html", "report.json"}
"""The same in a run's folder."""

_KEYS = {"verb", "versions", "config", "inputs", "outputs"}

Files = dict[str, dict[str, Any]]
"""{name within the folder: {"sha256", "bytes", "modified" (nanoseconds)}}"""


def artefacts(path: Path, read_all: bool = False) -> Files:
    """The file, or the files of a folder without notes and hidden ones. Raises UserError.

    `read_all`: reads every file, also one that looks as if nothing had touched it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", "check the path")
    stage = stage_folder(path)
    known = _known(stage, read_all) if stage else {}
    with os_errors(path):
        if not path.is_dir():
            return {path.name: _facts(path, known.get(str(path.relative_to(stage))) if stage else None)}
        found = _walk(path, stage or path, known, read_all)
        return {str(file.relative_to(path)): facts for file, facts in found}


def _walk(folder: Path, stage: Path, known: Files, read_all: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`stage`: the folder that the names in `known` are relative to."""
    notes = RUN_NOTES if (folder / RECIPE).exists() else set()
    if (folder / LINEAGE).exists():
        stage, known, notes = folder, _known(folder, read_all), NOTES
    for entry in sorted(folder.iterdir()):
        if entry.name in notes or entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, stage, known, read_all)
        else:
            yield entry, _facts(entry, known.get(str(entry.relative_to(stage))))


def _known(stage: Path, read_all: bool) -> Files:
    """What is believed of the files of a stage that look untouched."""
    return {} if read_all else recorded_outputs(stage)


def _facts(file: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    status = file.stat()
    if known and (known["bytes"], known["modified"]) == (status.st_size, status.st_mtime_ns):
        return known
    return {"sha256": hash_file(file), "bytes": status.st_size, "modified": status.st_mtime_ns}


def digest(files: Files) -> str:
    """One SHA-256 for artefacts: of the one file's bytes, or of all names and hashes."""
    if len(files) == 1:
        return next(iter(files.values()))["sha256"]
    lines = "".join(f"{name}\0{files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def stage_folder(path: Path) -> Path | None:
    """The folder of the stage that wrote `path`: the nearest one at or above it with a lineage."""
    return next((folder for folder in [path, *path.parents] if (folder / LINEAGE).is_file()), None)


def read_lineage(folder: Path) -> dict[str, Any]:
    """The `lineage.json` of a stage's folder; empty where there is none. Raises UserError when damaged."""
    path = folder / LINEAGE
    if not path.is_file():
        return {}
    damaged = UserError(f"{path}: not a lineage that danlu wrote", f"remove {folder} and run again")
    try:
        lineage = json.loads(read_text(path))
    except ValueError:
        raise damaged from None
    if not isinstance(lineage, dict) or not lineage.keys() >= _KEYS:
        raise damaged
    return lineage


def recorded_outputs(folder: Path) -> Files:
    return read_lineage(folder).get("outputs") or {}
