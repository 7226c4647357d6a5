"""One stage in its folder: what makes it is written first, `DONE` last, and what is done is not run again.

`identity.py` says when a stage is done. Under torchrun the first process keeps the books; the others run what
is distributed, and wait for `DONE` otherwise.
"""

import contextlib
import fcntl
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pydantic_core

from danlu import __version__
from danlu.core import host
from danlu.core.allocator import give_back_freed_memory
from danlu.core.artefacts import DONE, LINEAGE, artefacts, digest, read_lineage
from danlu.core.config import write_config
from danlu.core.errors import UserError
from danlu.core.files import DISK_ERRORS, atomic_write, make_folder, os_errors
from danlu.core.identity import Identity, Job, examine, has_checkpoints, identify, require_ours

_PACKAGES = ("torch", "numpy", "numba", "tokenizers", "safetensors", "pyarrow", "zstandard")


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    verb: str
    outcome: Literal["ran", "skipped", "resumed"]
    seconds: float
    result: dict[str, Any]


def run_stage(job: Job) -> Outcome:
    """Runs the stage unless its folder is done. Raises UserError; then nothing half-written stays."""
    if not is_main_process():
        return _follow(job)
    identity = identify(job)
    with locked(job.folder):
        state = examine(job, identity)
        if state.kind == "done":
            return Outcome(job.folder.name, job.verb.name, "skipped", 0.0, read_result(job.folder))
        print(f"{job.folder.name} · {job.verb.name} · {state.why}", file=sys.stderr, flush=True)
        if state.kind == "stale":
            clear(job.folder)
        started = time.monotonic()
        try:
            result = _run(job, identity)
        except UserError:
            if state.kind != "unfinished" and not has_checkpoints(job.folder):
                with contextlib.suppress(UserError):  # the first error is the one to show
                    clear(job.folder)
            raise
    outcome: Literal["ran", "resumed"] = "resumed" if state.kind == "unfinished" else "ran"
    return Outcome(job.folder.name, job.verb.name, outcome, time.monotonic() - started, result)


def _run(job: Job, identity: Identity) -> dict[str, Any]:
    folder, started = job.folder, time.monotonic()
    before = read_lineage(folder)  # of a run that was interrupted: its cost counts too
    lineage = _begin(job, identity)
    give_back_freed_memory()  # so that the peak is this stage's own
    host.reset_peak_rss()
    try:
        with os_errors(folder, DISK_ERRORS):
            result = _mapping(job.verb.load_function()(job.config))
    except KeyboardInterrupt:
        write_json(lineage | _cost(before, started), folder / LINEAGE)
        raise
    gc.collect()
    write_json(result, folder / "result.json")
    lineage["finished"] = _now()
    lineage |= _cost(before, started)
    lineage["outputs"] = artefacts(folder)
    lineage["sha256"] = digest(lineage["outputs"])
    write_json(lineage, folder / LINEAGE)
    with atomic_write(folder / DONE) as file:
        file.write(identity.fingerprint() + "\n")
    return result


def _cost(before: dict[str, Any], started: float) -> dict[str, Any]:
    """Time and memory of a stage, over all resumes."""
    return {
        "seconds": before.get("seconds", 0.0) + time.monotonic() - started,
        "peak_memory_bytes": max(before.get("peak_memory_bytes", 0), host.peak_rss_bytes()),
    }


def _begin(job: Job, identity: Identity) -> dict[str, Any]:
    """Writes what is known before the stage runs; the lineage first, for it marks the folder as ours."""
    inputs = {
        option: {**source, "relative": os.path.relpath(source["path"], job.folder)}
        for option, source in identity.inputs.items()
    }
    lineage: dict[str, Any] = {
        "verb": job.verb.name,
        "command": job.command,
        "started": read_lineage(job.folder).get("started", _now()),
        "inputs": inputs,
        "config": identity.config,
        "versions": versions(),
        "machine": {"system": platform.platform(), "processor": host.cpu_name(), "cores": host.cores()},
        "outputs": {},
    }
    write_json(lineage, job.folder / LINEAGE)
    write_config(job.config, job.folder / "config.yaml")
    return lineage


def _follow(job: Job) -> Outcome:
    """What a process other than torchrun's first does with a stage."""
    fingerprint = identify(job).fingerprint()
    if not _is_done(job.folder, fingerprint):
        if job.verb.distributed:
            job.verb.load_function()(job.config)
        while not _is_done(job.folder, fingerprint):
            time.sleep(0.2)
    return Outcome(job.folder.name, job.verb.name, "ran", 0.0, read_result(job.folder))


def _is_done(folder: Path, fingerprint: str) -> bool:
    done = folder / DONE
    return done.is_file() and done.read_text("utf-8").strip() == fingerprint


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against a second danlu; leaves no folder behind that stayed empty."""
    made = [path for path in [folder, *folder.parents] if not path.exists()]
    handle = os.open(make_folder(folder), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another danlu is at work in it", "wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)
        for path in made:
            with contextlib.suppress(OSError):  # not empty: it stays
                path.rmdir()


def clear(folder: Path) -> None:
    """Empties a stage's folder: `DONE` first, the lineage last, so that it is still ours if killed."""
    order = {DONE: 0, LINEAGE: 2}
    with os_errors(folder):
        for entry in sorted(folder.iterdir(), key=lambda entry: order.get(entry.name, 1)):
            if entry.is_dir() and not entry.is_symlink():
                doomed = entry.with_name(f".{entry.name}.old")  # never a checkpoint with half its files
                os.replace(entry, doomed)
                shutil.rmtree(doomed)
            else:
                entry.unlink()


def reset(folder: Path) -> None:
    """Forgets a stage, so that it runs from scratch. Raises UserError where the folder isn't a stage's."""
    if folder.exists():
        require_ours(folder)
        with locked(folder):
            clear(folder)


def read_result(folder: Path) -> dict[str, Any]:
    """The `result.json` of a stage; empty where there is none."""
    path = folder / "result.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def as_json(result: Any) -> Any:
    """Anything that a verb returns, as JSON values; what is not a finite number is null."""
    raw = pydantic_core.to_json(result, inf_nan_mode="null", fallback=_plain)
    return json.loads(raw)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)  # numpy's and torch's scalars


def _mapping(result: Any) -> dict[str, Any]:
    values = {} if result is None else as_json(result)
    return values if isinstance(values, dict) else {"result": values}


def write_json(values: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")


def versions() -> dict[str, str]:
    """Of danlu, Python, and the packages that results hang on."""
    found = {"danlu": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that started this process, as it can be typed again; or one with other arguments."""
    program = sys.argv[0]
    if "WORLD_SIZE" in os.environ:
        processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        words = ["torchrun", "--nproc-per-node", processes, "-m", "danlu.cli"]
    elif Path(program).name == "cli.py":
        words = ["python", "-m", "danlu.cli"]
    else:
        words = ["danlu" if shutil.which("danlu") == program else program]
    return shlex.join([*words, *(sys.argv[1:] if arguments is None else arguments)])


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
