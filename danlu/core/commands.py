"""The command line, made from the table of verbs: each option is a field of the verb's config.

cyclopts finds options in the tokens and prints the help; what a value may be is pydantic's to say, in the
same words as for a recipe. Only the config of the verb that was typed is imported, and it imports no torch.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter
from pydantic_core import PydanticUndefined

from danlu import __version__
from danlu.core.config import Config, parse_value
from danlu.core.errors import UserError
from danlu.core.show import console
from danlu.core.verbs import Verb

_ASSIGNMENT = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*=")
_SHORT = {"out": "-o"}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """One field of a config, or of a config within it."""

    path: tuple[str, ...]
    """E.g. ("optim", "lr")."""
    annotation: Any
    help: str
    required: bool
    default: Any

    @property
    def name(self) -> str:
        """As typed: "--optim.muon-lr"."""
        return "--" + ".".join(self.path).replace("_", "-")

    @property
    def types(self) -> list[Any]:
        """The plain types that a value may have."""
        return list(_plain_types(self.annotation))

    @property
    def is_flag(self) -> bool:
        return self.types == [bool]

    @property
    def is_list(self) -> bool:
        return any(get_origin(t) in (tuple, list) for t in self.types)

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(str(c) for t in self.types if get_origin(t) is Literal for c in get_args(t))

    @property
    def metavar(self) -> str:
        if self.choices:
            return "CHOICE"
        first = get_args(self.types[0])[0] if self.is_list else self.types[0]
        return _METAVARS.get(first, "VALUE") + "..." * self.is_list


@dataclass(frozen=True)
class Call:
    """A command line, understood but not yet checked against the config."""

    verb: Verb
    values: dict[str, Any] = field(default_factory=dict)
    """What was given, nested as in the config."""
    recipe: Path | None = None
    json: bool = False


def parse(verbs: Sequence[Verb], tokens: Sequence[str]) -> Call | None:
    """What `tokens` ask for; None where that was help or the version. Raises UserError."""
    verb = _typed_verb(verbs, tokens)
    cls = verb.load_config() if verb else None
    known = list(options(cls)) if cls else []
    if verb and verb.keeps_nothing:
        known = [replace(option, required=option.required and option.path != ("out",)) for option in known]
    takes_overrides = "overrides" in {option.path[0] for option in known}
    several = verb is not None and any(o.is_list and o.path[0] in verb.positional for o in known)
    tokens, overrides = _normalise(tokens, known, takes_overrides, several)
    app = _app(verbs, verb, known)
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        asked = " ".join(["danlu", *(verb.name.split() if verb else [])])
        raise UserError(str(error), f"{asked} --help") from None
    call: Call | None = command(**bound.arguments)
    if call and overrides:
        call.values["overrides"] = overrides
    return call


def _typed_verb(verbs: Sequence[Verb], tokens: Sequence[str]) -> Verb | None:
    """The verb whose words the tokens begin with; of two, the longer one."""
    found = [
        (len(name.split()), verb)
        for verb in verbs
        for name in verb.names
        if list(tokens[: len(name.split())]) == name.split()
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def options(cls: type[Config], prefix: tuple[str, ...] = (), defaults: Any = None) -> Iterator[Option]:
    """The fields of a config and of those within it. `defaults`: an instance that holds them."""
    for name, info in cls.model_fields.items():
        path = (*prefix, info.alias or name)
        default = getattr(defaults, name, info.get_default(call_default_factory=True))
        inner = [t for t in _plain_types(info.annotation) if isinstance(t, type) and issubclass(t, Config)]
        if inner:
            yield from options(inner[0], path, default)
            continue
        required = default is PydanticUndefined
        yield Option(path, info.annotation, info.description or "", required, None if required else default)


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The members of a union, without None and without annotations' extras."""
    if get_origin(annotation) is Annotated:
        yield from _plain_types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _plain_types(member)
    elif annotation is not NoneType:
        yield annotation


def _normalise(
    tokens: Sequence[str], known: Sequence[Option], takes_overrides: bool, several: bool = False
) -> tuple[list[str], list[str]]:
    """`key.sub=value` as `--key.sub=value`, with dashes in names; overrides of stages are set apart.

    The value of an option is left alone, whatever it looks like; so is NAME=PATH where no option has that
    name, and `several` of them are expected by position.
    """
    names = {option.name for option in known}
    flags = {"--json", "--help", "-h", "--version", *(o.name for o in known if o.is_flag)}
    flags |= {f"--no-{flag[2:]}" for flag in flags}
    result: list[str] = []
    overrides: list[str] = []
    rest = iter(tokens)
    for token in rest:
        if token == "--":
            return [*result, token, *rest], overrides
        if known and _ASSIGNMENT.match(token):
            named = f"--{token.partition('=')[0]}".replace("_", "-")
            token = token if several and named not in names else f"--{token}"
        name, equals, value = token.partition("=")
        if not token.startswith("-") or token == "-":
            result.append(token)
        elif takes_overrides and "." in name:
            overrides.append(f"{name[2:]}={value if equals else next(rest, '')}")
        else:
            name = name.replace("_", "-")
            if not equals and name not in flags and (after := next(rest, None)) is not None:
                equals, value = "=", after
            result.append(name + equals + value)
    return result, overrides


def _app(verbs: Sequence[Verb], typed: Verb | None, known: Sequence[Option]) -> App:
    """The tree of commands; only the typed verb has options."""
    root = App(
        name="danlu",
        group_commands=Group("About danlu", sort_key=len(verbs)),
        version=__version__,
        help="danlu (丹炉): from raw text to a language model that is measured and used.",
        help_epilogue="Start with `danlu quickstart`. `danlu VERB --help` explains a verb, with examples.",
        help_format="markdown",
        console=console(markup=True),
    )
    named = {name: verb for verb in verbs for name in verb.names}
    titles = dict.fromkeys(verb.group for verb in verbs)
    groups = {title: Group(title, sort_key=number) for number, title in enumerate(titles)}
    apps = {"": root}
    for number, (name, verb) in enumerate(named.items()):
        *above, last = name.split()
        for parent in above:  # one at most: "data" of "data prepare"
            if parent not in apps:
                children = [other for other in named if other.startswith(f"{parent} ")]
                told = " · ".join(children)
                apps[parent] = App(
                    name=parent,
                    help=told,
                    group=groups[verb.group],
                    group_commands="Commands",
                    sort_key=number,
                )
                root.command(apps[parent])
        group = groups[verb.group] if not above else None
        apps[name] = App(name=last, help=_help(verb), group=group, group_commands="Commands", sort_key=number)
        apps[name].default(_function(verb, known if verb is typed else []))
        apps[" ".join(above)].command(apps[name])
    return root


def _help(verb: Verb) -> str:
    """What the verb does, and examples."""
    examples = "".join(f"    danlu {example}\n" for example in verb.examples)
    return f"{verb.help}\n\nFor example\n\n{examples}" if examples else verb.help


def _function(verb: Verb, known: Sequence[Option]) -> Callable[..., Call]:
    """What cyclopts calls: its parameters are the options, and it packs what was given into a Call."""
    keys = {f"option_{number}": option for number, option in enumerate(known)}

    def command(**given: Any) -> Call:
        recipe, as_json = given.pop("recipe", None), given.pop("json", False)
        values: dict[str, Any] = {}
        for key, value in given.items():
            node = values
            for part in keys[key].path[:-1]:
                node = node.setdefault(part, {})
            node[keys[key].path[-1]] = value
        return Call(verb, values, Path(recipe) if recipe else None, as_json)

    takes_recipe = verb.stage and not verb.positional
    needed = "[required without RECIPE]" if takes_recipe else "[required]"
    at_place = [key for name in verb.positional for key, option in keys.items() if option.path == (name,)]
    parameters = [_parameter(key, keys[key], needed, positional=True) for key in at_place]
    if takes_recipe:
        told = "a recipe whose stages of this verb are run; options are laid over theirs"
        parameters.append(
            _signature("recipe", None, Any, Parameter(help=told, metavar="RECIPE"), positional=True)
        )
    for key, option in keys.items():
        if key not in at_place and option.path != ("overrides",):
            parameters.append(_parameter(key, option, needed))
    as_json = Parameter(help="print only the result, as JSON", negative=(), show_default=False)
    parameters.append(_signature("json", False, bool, as_json))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameter(key: str, option: Option, needed: str, positional: bool = False) -> inspect.Parameter:
    """An option as cyclopts sees it: a flag, one text, or several; `_reader` makes the value of it."""
    told = f"{option.help} {needed}" if option.required else option.help
    about: dict[str, Any] = {"name": option.name, "help": told}
    if len(option.path) == 1 and option.path[0] in _SHORT:
        about["alias"] = _SHORT[option.path[0]]
    if len(option.path) > 1:
        about["group"] = Group(".".join(option.path[:-1]), sort_key=1)
    if option.default is None or option.default == ():
        about["show_default"] = False
    if option.is_flag:
        about["negative"] = f"--no-{option.name[2:]}"
        return _signature(key, option.default, bool, Parameter(**about), positional)
    if option.choices:
        about["choices"] = option.choices
    hint = list[Any] if option.is_list else Any
    about |= {"metavar": option.metavar, "converter": _reader(option), "negative": (), "json_list": False}
    return _signature(key, option.default, hint, Parameter(**about), positional)


def _signature(
    key: str, default: Any, hint: Any, about: Parameter, positional: bool = False
) -> inspect.Parameter:
    kinds = inspect.Parameter
    kind = kinds.POSITIONAL_OR_KEYWORD if positional else kinds.KEYWORD_ONLY
    return kinds(key, kind, default=default, annotation=Annotated[hint, about])


def _reader(option: Option) -> Callable[[Any, Sequence[Any]], Any]:
    """Reads an option's values as a recipe's would be read; given twice, they make a list."""
    plain = all(t in (str, Path) or get_origin(t) is Literal for t in option.types)

    def read(_: Any, tokens: Sequence[Any]) -> Any:
        texts = [token.value for token in tokens]
        if option.is_list and not (len(texts) == 1 and texts[0].startswith("[")):
            return texts
        return texts[-1] if plain else parse_value(texts[-1])

    return read
