"""Strict, typed config: a wrong key, type or value is one clear message, never a silent default.

Each room keeps its config classes in its own torch-free `config.py`, so that `--help` stays quick.
Precedence: defaults < recipe < `key.sub=value` on the command line.
"""

import difflib
import json
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from danlu.core.errors import UserError
from danlu.core.files import atomic_write, read_text


class Config(BaseModel):
    """Base of every config class: immutable, no unknown keys, every field described."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class InputMark:
    """Marks a config field as an input file or folder: hashed into the lineage."""


InputPath = Annotated[Path, InputMark()]


class StageConfig(Config):
    """Base of the config of every verb that can be a stage of a recipe."""

    out: Path = Field(description="folder that the result is written to")
    seed: int = Field(0, ge=0, description="seed of every random choice in this stage")


C = TypeVar("C", bound=Config)


def input_fields(cls: type[Config]) -> list[str]:
    """Names of the fields of `cls` that are declared as `InputPath` (or optional ones)."""
    return [
        name
        for name, field in cls.model_fields.items()
        if any(isinstance(m, InputMark) for m in [*field.metadata, *_nested(field.annotation)])
    ]


def inputs_of(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every input by its place, also in lists and nested parts: {"data": …, "rewards.0.model": …}."""
    found: dict[str, Any] = {}
    marked = input_fields(type(config))
    for name in type(config).model_fields:
        value, key = getattr(config, name), prefix + name
        several = isinstance(value, tuple)
        parts = {f"{key}.{i}": part for i, part in enumerate(value)} if several else {key: value}
        for place, part in parts.items():
            if isinstance(part, Config):
                found |= inputs_of(part, f"{place}.")
            elif name in marked:
                found[place] = part
    return found


def _nested(annotation: Any) -> Iterable[Any]:
    for arg in get_args(annotation):
        yield arg
        yield from _nested(arg)


def make_config(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Builds a config from plain YAML or JSON values; every fault at once, with the nearest name.

    `where` names the file, and the stage in it, for the message. Raises UserError.
    """
    try:
        return cls.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, cls, where)) from None


def explain(error: ValidationError, cls: type[Config], where: str = "") -> str:
    """One line per fault: place, key, what is wrong, nearest known name."""
    lines = []
    for fault in error.errors():
        key = _key(fault["loc"])
        place = ": ".join(part for part in (where, key) if part)
        if fault["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key{_did_you_mean(cls, fault['loc'])}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: is required and missing")
        elif fault["type"] == "value_error":
            lines.append(f"{place}: {fault['ctx']['error']}")
        else:
            message = fault["msg"][0].lower() + fault["msg"][1:]
            lines.append(f"{place}: {message}, not {reprlib.repr(fault['input'])}")
    return "\n".join(lines)


def _key(loc: tuple[int | str, ...]) -> str:
    """`optim.lr`; of the second of a list, `stages, number 2, reads`."""
    key = "".join(f", number {part + 1}, " if isinstance(part, int) else f".{part}" for part in loc)
    return key.replace(", .", ", ").strip("., ")


def _did_you_mean(cls: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    owner: Any = cls
    for part in loc[:-1]:
        if isinstance(part, int):  # an item of a list, of the class that was found for the list
            continue
        field = owner.model_fields.get(part) if hasattr(owner, "model_fields") else None
        candidates = [] if field is None else [field.annotation, *_nested(field.annotation)]
        owner = next((c for c in candidates if hasattr(c, "model_fields")), None)
    if owner is None:
        return ""
    return nearest(str(loc[-1]), owner.model_fields)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean "lr"?', or the list of what there is when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=1e-3", "steps=10"]` as a nested mapping; values are read as YAML."""
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f'"{item}" is not an override', "write key.sub=value")
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = parse_value(text)
    return values


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: also for a day that no month has, and for brackets a thousand deep."""


def parse_value(text: str) -> Any:
    """A value as it would stand in a recipe. Raises UserError."""
    try:
        return yaml.load(text, _Loader)
    except _NOT_YAML:
        raise UserError(f"{text}: not a value in YAML", "put it in quotes") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, on and off are words, a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or has keys itself", key_node.start_mark
                )
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f'"{key}" is given twice, line {line}')
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError naming file and line."""
    try:
        values = yaml.load(read_text(path), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(
            f"{place}: not valid YAML: {error.problem}", "mend this line, or the one above it"
        ) from None
    except _NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {error}", "look for the character or the value") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values", "see recipes/quickstart.yaml")
    return values


def write_config(config: Config, path: Path) -> None:
    """Saves the effective config, every default spelt out."""
    with atomic_write(path) as file:
        yaml.safe_dump(config.model_dump(mode="json"), file, sort_keys=False, allow_unicode=True)
