"""Whether a stage has to be run: what decides it, what its folder holds, and why they differ.

A folder is in one of four states:

- *new*: nothing of a stage is there. A folder with somebody's files in it is refused.
- *done*: `DONE` is there, and verb, config, inputs, danlu's version and the files written are as recorded.
- *stale*: something of that has changed. In a recipe the stage is emptied and run again, with the reason
  printed; a verb run alone refuses, since a wrong option must not cost a trained model.
- *unfinished*: no `DONE`: the stage was killed. It is run again in its folder as it stands, so that training
  goes on from its last checkpoint. With other inputs, checkpoints are refused; with other options the
  training loop decides, since it knows which of them change the weights. Without checkpoints there is
  nothing to lose, and what has changed makes the folder stale.

Inputs are compared by content (`artefacts.digest`): where a stage came out the same again, what reads it is
not run again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from danlu import __version__
from danlu.core.artefacts import DONE, artefacts, digest, read_lineage
from danlu.core.config import StageConfig, flatten, inputs_of
from danlu.core.errors import UserError
from danlu.core.files import os_errors
from danlu.core.verbs import Verb


@dataclass(frozen=True)
class Job:
    """A stage with everything settled, ready to be run."""

    verb: Verb
    config: StageConfig
    command: str
    """As typed; recorded."""
    rebuild: bool
    """Whether a stale folder is emptied and made again, or refused."""

    @property
    def folder(self) -> Path:
        return self.config.out


@dataclass(frozen=True)
class Identity:
    """What decides whether a stage has to be run."""

    verb: str
    danlu: str
    config: dict[str, Any]
    """Effective, without `out` and inputs."""
    inputs: dict[str, dict[str, str]]
    """{option: {"path", "sha256"}}; of a name, such as that of a data set, the hash is empty."""

    def fingerprint(self) -> str:
        values = dataclasses.asdict(self)
        values["inputs"] = {option: source["sha256"] for option, source in self.inputs.items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """Of a stage's folder; `why` is said to the user."""

    kind: Literal["new", "done", "stale", "unfinished"]
    why: str


def identify(job: Job) -> Identity:
    """Hashes the inputs. Raises UserError for one that is missing."""
    config = job.config.model_dump(mode="json", exclude={"out"})
    paths = input_paths(job.config)
    inputs = {}
    for option, value in inputs_of(job.config).items():
        if option in paths:
            inputs[option] = {"path": str(paths[option]), "sha256": digest(artefacts(paths[option]))}
            _take(config, option)
        elif value:
            inputs[option] = {"path": str(value), "sha256": ""}
    return Identity(job.verb.name, __version__, config, inputs)


def _take(config: Any, option: str) -> None:
    """Removes the value at such a place as "data" or "rewards.0.model"; of a list the place stays."""
    outer, _, name = option.rpartition(".")
    for part in outer.split(".") if outer else []:
        config = config[int(part)] if isinstance(config, list) else config[part]
    if isinstance(config, list):
        config[int(name)] = None
    else:
        del config[name]


def input_paths(config: StageConfig, made: Container[Path] = ()) -> dict[str, Path]:
    """{option: path} of the inputs that are given.

    An input that may also be a name, such as that of a data set, counts only where such a file exists.
    Raises UserError for a missing one, but for those in `made`, which an earlier stage will write.
    """
    paths = {}
    for option, value in inputs_of(config).items():
        if isinstance(value, Path) and not value.exists() and value not in made:
            raise UserError(f"{option}: {value}: no such file or folder", "check the path")
        if value and Path(value).exists():
            paths[option] = Path(value)
    return paths


def require_ours(folder: Path) -> None:
    """Raises UserError where a folder holds files and no stage of danlu wrote it."""
    if folder.exists() and _visible(folder) and not read_lineage(folder):
        raise UserError(f"{folder} holds files that no stage of danlu wrote", "choose another folder")


def examine(job: Job, now: Identity) -> State:
    """The state of the job's folder. Raises UserError where it must not be touched."""
    folder = job.folder
    require_ours(folder)
    before = read_lineage(folder)
    if not before:
        return State("new", "not run yet")
    changed = _changes(before, now)
    if (folder / DONE).exists():
        changed += _changed_outputs(folder, before)
        if not changed:
            return State("done", "done, nothing changed")
        if job.rebuild:
            return State("stale", "; ".join(changed))
        raise UserError(
            f"{folder} holds a finished run, and {'; '.join(changed)}",
            f"choose another folder with --out, or remove {folder}",
        )
    if not has_checkpoints(folder):
        return State("stale" if changed else "unfinished", "; ".join(["was interrupted", *changed]))
    other_inputs = [option for option in now.inputs if _input_changed(before, now, option)]
    if other_inputs:
        afresh = f"danlu run RECIPE --from {folder.name}" if job.rebuild else f"remove {folder}"
        raise UserError(
            f"{folder} holds an unfinished run on other data: {'; '.join(changed)}",
            f"undo the change to resume it, or start it afresh: {afresh}",
        )
    return State("unfinished", "; ".join(["was interrupted and goes on", *changed]))


def _changes(before: dict[str, Any], now: Identity) -> list[str]:
    """What differs from the recorded run, in words."""
    changed = []
    if before["verb"] != now.verb:
        changed.append(f"verb {before['verb']} → {now.verb}")
    if before["versions"]["danlu"] != now.danlu:
        changed.append(f"danlu {before['versions']['danlu']} → {now.danlu}")
    old, new = flatten(before["config"]), flatten(now.config)
    changed += [
        f"{key} {old.get(key, 'unset')} → {new.get(key, 'unset')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for option in sorted(before["inputs"].keys() | now.inputs.keys()):
        if _input_changed(before, now, option):
            changed.append(f"{option} has other content than before")
    return changed


def _input_changed(before: dict[str, Any], now: Identity, option: str) -> bool:
    recorded, current = before["inputs"].get(option, {}), now.inputs.get(option, {})
    return recorded.get("sha256") != current.get("sha256")


def _changed_outputs(folder: Path, before: dict[str, Any]) -> list[str]:
    current = artefacts(folder)
    return [
        f"{name} was {'changed' if name in current else 'removed'} since"
        for name, facts in before["outputs"].items()
        if current.get(name, {}).get("sha256") != facts["sha256"]
    ]


def has_checkpoints(folder: Path) -> bool:
    """Whether a training run has left something to go on from."""
    return (folder / "checkpoints").is_dir() and bool(_visible(folder / "checkpoints"))


def _visible(folder: Path) -> list[Path]:
    with os_errors(folder):
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
