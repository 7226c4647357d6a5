"""`danlu lineage`: what made an artefact, back to the data, and whether all of it is still as it was."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.tree import Tree

from danlu.core.artefacts import DONE, RECIPE, artefacts, digest, read_lineage, stage_folder
from danlu.core.config import make_config, read_yaml
from danlu.core.errors import UserError
from danlu.core.options import PathConfig
from danlu.core.progress import clock
from danlu.core.recipe import Recipe
from danlu.core.show import console


@dataclass
class Node:
    """A stage's folder, or data from outside, and what it was made of."""

    path: str
    verb: str | None
    """None for what no stage of danlu wrote."""
    sha256: str
    """Of the artefact as it is now; empty where it is missing."""
    state: Literal["as it was", "changed", "missing", "unfinished", "data"]
    """Of this artefact, compared with what was recorded when it was made."""
    changed: list[str] = field(default_factory=list)
    """What is not as it was: files, or inputs that are not those it was made from."""
    made: dict[str, Any] = field(default_factory=dict)
    """Command, versions, time."""
    inputs: dict[str, "Node"] = field(default_factory=dict)

    def walk(self) -> list["Node"]:
        """This node and all that it was made of, each once, data first."""
        seen: dict[str, Node] = {}
        for source in self.inputs.values():
            seen |= {node.path: node for node in source.walk()}
        return [*seen.values(), self]


def lineage(config: PathConfig) -> list[Node]:
    """`danlu lineage`: of a stage or a file in it; of a run, for each result that no other stage reads.

    Reads every file. Raises UserError where no stage of danlu wrote the path.
    """
    path = config.path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", "check the path")
    if (path / RECIPE).is_file():
        known: dict[Path, Node] = {}
        return [trace(folder, known, read_all=True) for folder in results_of(path)]
    stage = stage_folder(path.absolute())
    if stage is None:
        raise UserError(
            f"{path}: no stage of danlu wrote this", "give a file or folder in a run, e.g. under runs/"
        )
    return [trace(_relative(stage), {}, read_all=True)]


def stages_of(run: Path) -> list[Path]:
    """The folders of a run's stages that have begun, in the recipe's order. Raises UserError for none."""
    path = run / RECIPE
    recipe = make_config(Recipe, read_yaml(path), str(path))
    begun = [run / stage.name for stage in recipe.stages if read_lineage(run / stage.name)]
    if not begun:
        raise UserError(f"{run}: no stage of this run has begun", f"danlu run {path}")
    return begun


def results_of(run: Path) -> list[Path]:
    """The folders of the stages that no other stage reads."""
    folders = stages_of(run)
    read = {
        _resolve(folder, source).absolute()
        for folder in folders
        for source in read_lineage(folder)["inputs"].values()
    }
    return [folder for folder in folders if folder.absolute() not in read]


def trace(folder: Path, known: dict[Path, Node], read_all: bool = False) -> Node:
    """The tree below a stage's folder; `known`: nodes that were traced already.

    `read_all`: also reads files that look untouched by their size and time.
    """
    if folder.absolute() in known:
        return known[folder.absolute()]
    recorded = read_lineage(folder)
    now = artefacts(folder, read_all)
    done = (folder / DONE).exists()
    changed = [
        f"{name} was {'changed' if name in now else 'removed'}"
        for name, facts in recorded["outputs"].items()
        if now.get(name, {}).get("sha256") != facts["sha256"]
    ]
    changed += [f"{name} was added" for name in now if done and name not in recorded["outputs"]]
    inputs = {}
    for option, source in recorded["inputs"].items():
        inputs[option] = node = _trace_input(folder, source, known, read_all)
        if node.sha256 != source["sha256"]:
            changed.append(f"{option} is not what it was made from")
    node = Node(
        path=str(folder),
        verb=recorded["verb"],
        sha256=digest(now) if now else "",
        state="changed" if changed else "as it was" if done else "unfinished",
        changed=changed,
        made={key: recorded.get(key) for key in ("command", "started", "seconds", "versions", "machine")},
        inputs=inputs,
    )
    known[folder.absolute()] = node
    return node


def _trace_input(folder: Path, source: dict[str, str], known: dict[Path, Node], read_all: bool) -> Node:
    path = _resolve(folder, source)
    if not source["sha256"]:  # a name, such as that of a data set
        return Node(source["path"], None, "", "data")
    if not path.exists():
        return Node(str(path), None, "", "missing")
    stage = stage_folder(path.absolute())
    if stage is None:
        return Node(str(path), None, digest(artefacts(path)), "data")
    node = trace(_relative(stage), known, read_all)
    if path.absolute() == stage:
        return node
    return Node(str(path), None, digest(artefacts(path, read_all)), "data", inputs={"in": node})


def _resolve(folder: Path, source: dict[str, str]) -> Path:
    """Where an input is now: beside the stage as it was then (the run may have moved), or where it was."""
    beside = Path(os.path.normpath(folder / source["relative"]))
    return beside if beside.exists() else Path(source["path"])


def _relative(path: Path) -> Path:
    """`path` from here, where it is below here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def show(nodes: list[Node]) -> None:
    """The trees, on stdout."""
    seen: set[str] = set()
    for node in nodes:
        tree = Tree(_label(node))
        _grow(tree, node, seen)
        console(markup=True).print(tree, highlight=False)


def _grow(tree: Tree, node: Node, seen: set[str]) -> None:
    seen.add(node.path)
    for option, source in node.inputs.items():
        if source.path in seen and source.inputs:
            tree.add(f"[dim]{option}[/] [bold]{escape(source.path)}[/]  [dim]as above[/]")
        else:
            _grow(tree.add(f"[dim]{option}[/] {_label(source)}"), source, seen)


_MARKS = {"as it was": "[green]✓ as it was[/]", "data": "", "unfinished": "[yellow]unfinished[/]"}


def _label(node: Node) -> str:
    state = _MARKS.get(node.state, f"[red]✗ {node.state}[/]")
    words = [f"[bold]{escape(node.path)}[/]", node.verb or "", f"[cyan]{node.sha256[:12]}[/]", state]
    if node.made.get("seconds"):
        words.insert(2, f"{node.made['started'][:16].replace('T', ' ')}, took {clock(node.made['seconds'])}")
    text = "  ".join(word for word in words if word)
    return "\n".join([text, *(f"[red]{escape(line)}[/]" for line in node.changed)])
