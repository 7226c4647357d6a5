"""One renderer from a conversation to ids and loss mask, for training and for serving.

The template writes the turns with each content between two marks, which no text holds; the marks say
where contents are, and are taken out again. So special tokens are found in the template's own text only,
whatever a content spells, and the mask is known, not guessed.

The text is cut at special tokens, and where the prompt for a reply ends, and each part is encoded by
itself: the ids of a training example begin with exactly the ids that serving would prompt with. Everything
from there to the stop token is learnt, the blanks that the template writes around a reply included.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.tokens.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

Tools = list[dict[str, Any]] | None
"""Functions that a model may call, as OpenAI's API describes them."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Unicode noncharacters: reserved for a program's own use, never part of a text."""

_CONTENT = re.compile(f"{_OPEN}([0-9]+);(.*?){_CLOSE}", re.DOTALL)


@dataclass
class Rendered:
    """A conversation as the model sees it: ids, and for each whether it is learnt."""

    ids: list[int]
    mask: list[bool]


Span = tuple[int, int]
"""Begin and end in a rendered text."""


@dataclass
class _Turns:
    """A rendered text, and where things are in it.

    contents: of each message that has one, by its number; special: the frame's special tokens; replies:
    for each of the assistant's turns where its prompt ends (there it begins) and where its content ends.
    """

    text: str
    contents: dict[int, Span]
    special: dict[Span, str]
    replies: list[Span]


def render(messages: Messages, tokenizer: Tokenizer, longest_reply: int = 0) -> Rendered:
    """Ids and loss mask: what the assistant says, and the token that ends its turn, are learnt.

    Replies of more than `longest_reply` tokens are not learnt (0 = all are). Raises UserError for a template
    without a stop token behind a reply: a model would not learn to stop.
    """
    turns = _turns(messages, tokenizer)
    parts = list(_parts(turns, tokenizer))
    begins = [begin for (begin, _), _ in parts]
    learnt: set[int] = set()
    for begin, end in turns.replies:
        stop = _stop_behind(end, turns, tokenizer)
        *reply, last = range(bisect_left(begins, begin), bisect_left(begins, stop[1]))  # last: the stop token
        if not longest_reply or sum(len(parts[number][1]) for number in reply) <= longest_reply:
            learnt.update([*reply, last])
    out = Rendered([], [])
    for number, (_, ids) in enumerate(parts):
        out.ids += ids
        out.mask += [number in learnt] * len(ids)
    return out


def render_reply(prompt: Messages, reply: str, tokenizer: Tokenizer) -> Rendered:
    """As `render`, but of all that the assistant says only `reply` is learnt, which answers the prompt."""
    rendered = render([*prompt, {"role": "assistant", "content": reply}], tokenizer)
    n_prompt = len(render_prompt(prompt, tokenizer))
    rendered.mask[:n_prompt] = [False] * n_prompt
    return rendered


def render_prompt(messages: Messages, tokenizer: Tokenizer, tools: Tools = None) -> list[int]:
    """Ids up to where the assistant's next turn begins: what serving hands to the model.

    `tools`: what it may call, for templates that list them. Raises UserError where anything but a message's
    content spells a special token.
    """
    turns = _turns(messages, tokenizer, add_generation_prompt=True, tools=tools)
    return [number for _, ids in _parts(turns, tokenizer) for number in ids]


def render_text(
    messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = False, tools: Tools = None
) -> str:
    """The same as text."""
    return _run_template(tokenizer, messages, add_generation_prompt, tools)


def _turns(
    messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = False, tools: Tools = None
) -> _Turns:
    for message in messages:
        _check_spelt({**message, "role": None, "content": None}, tokenizer)
    _check_spelt(tools, tokenizer)
    text, found = _unmark(_run_template(tokenizer, _mark(messages), add_generation_prompt, tools))
    kept = all(text[slice(*span)] == messages[number]["content"].strip() for number, span in found)
    if not kept or text != _run_template(tokenizer, messages, add_generation_prompt, tools):
        raise UserError(
            "the chat template changes the messages' content", "use one that inserts it as it is, or trimmed"
        )
    contents = dict(found)
    if left_out := [n for n, message in enumerate(messages) if n not in contents and _says(message)]:
        raise UserError(
            f"the chat template leaves out message {left_out[0] + 1} ({messages[left_out[0]]['role']})",
            "take it out of the conversation, or use another template",
        )
    turns = _Turns(text, contents, {}, [])
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number in contents:
            begin, end = contents[number]
            turns.replies.append((_prompt_end(messages[:number], turns.text, begin, tokenizer), end))
    frames = _frames(text, sorted(span for _, span in found), {begin for begin, _ in turns.replies})
    turns.special = {span: name for frame in frames for span, name in _special_in(text, frame, tokenizer)}
    return turns


def _mark(messages: Messages) -> Messages:
    """The messages, each content between marks. Blanks stay outside: a template may trim them."""
    marked = []
    for number, message in enumerate(messages):
        if not _says(message):
            marked.append(message)
            continue
        content = message["content"]
        if _OPEN in content or _CLOSE in content:
            raise UserError("a message holds a Unicode noncharacter (U+FDD0 or U+FDD1)", "remove it")
        core = content.strip()
        lead, trail = content.split(core, 1) if core else (content, "")
        marked.append({**message, "content": f"{lead}{_OPEN}{number};{core}{_CLOSE}{trail}"})
    return marked


def _says(message: dict[str, Any]) -> bool:
    """Whether there is a content: beside calls of tools there may be none."""
    return bool(message["content"]) or not message.get("tool_calls")


def _check_spelt(value: Any, tokenizer: Tokenizer) -> None:
    """A template writes tools and their calls itself: a special token in them would be one."""
    if isinstance(value, str):
        if spelt := [name for name in tokenizer.special_ids if name in value]:
            raise UserError(f"a tool, or a call of one, spells the special token {spelt[0]}", "remove it")
    elif isinstance(value, dict):
        _check_spelt([*value.keys(), *value.values()], tokenizer)
    elif isinstance(value, list):
        for item in value:
            _check_spelt(item, tokenizer)


def _unmark(text: str) -> tuple[str, list[tuple[int, Span]]]:
    """The text without its marks, and (number of the message, place of its content) for each pair of them."""
    plain, found, end = "", [], 0
    for match in _CONTENT.finditer(text):
        plain += text[end : match.start()]
        found.append((int(match[1]), (len(plain), len(plain) + len(match[2]))))
        plain += match[2]
        end = match.end()
    return plain + text[end:], found


def _frames(text: str, contents: list[Span], cuts: set[int]) -> list[Span]:
    """The template's own text, cut where replies begin; here, and only here, special tokens are special."""
    inside = [place for span in contents for place in span]
    edges = sorted([0, len(text), *inside])
    frames = list(zip(edges[::2], edges[1::2], strict=True))
    return [
        part
        for begin, end in frames
        for part in pairwise(sorted({begin, end, *(cut for cut in cuts if begin < cut < end)}))
    ]


def _special_in(text: str, frame: Span, tokenizer: Tokenizer) -> Iterator[tuple[Span, str]]:
    """The special tokens in a part of the frame, with the blanks that they take in."""
    if not tokenizer.special_ids:
        return
    free = frame[0]
    for match in _any_of(frozenset(tokenizer.special_ids)).finditer(text, *frame):
        begin, end = match.span()
        before, behind = tokenizer.swallows[match[0]]
        while before and begin > free and text[begin - 1].isspace():
            begin -= 1
        while behind and end < frame[1] and text[end].isspace():
            end += 1
        free = end
        yield (begin, end), match[0]


@lru_cache
def _any_of(texts: frozenset[str]) -> re.Pattern[str]:
    """Finds each of them, of several that begin alike the longest."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _prompt_end(before: Messages, text: str, begin: int, tokenizer: Tokenizer) -> int:
    """Where the prompt for a reply ends, whose content begins at `begin`.

    At the content itself where serving would not prompt with this text: a template may write earlier turns
    another way, or none before the assistant's first.
    """
    try:
        prompt = _run_template(tokenizer, before, add_generation_prompt=True)
    except UserError:
        return begin
    return len(prompt) if len(prompt) <= begin and text.startswith(prompt) else begin


def _stop_behind(end: int, turns: _Turns, tokenizer: Tokenizer) -> Span:
    """The stop token behind a reply; only blanks stand between."""
    behind = next((span for span in turns.special if span[0] >= end), (end, end))
    if turns.special.get(behind) not in tokenizer.stops or turns.text[end : behind[0]].strip():
        raise UserError(
            "the chat template writes no stop token behind a reply: a model would not learn to stop",
            f"use one that does; the model's stop tokens: {', '.join(tokenizer.stops) or 'none'}",
        )
    return behind


def _parts(turns: _Turns, tokenizer: Tokenizer) -> Iterator[tuple[Span, list[int]]]:
    """The text cut at special tokens and where replies begin, each part with its ids."""
    ends = {end for _, end in turns.special}
    cuts = {0, len(turns.text), *(place for span in turns.special for place in span)}
    cuts |= {begin for begin, _ in turns.replies}
    for begin, end in pairwise(sorted(cuts)):
        if name := turns.special.get((begin, end)):
            yield (begin, end), [tokenizer.special_ids[name]]
        else:
            mid_text = begin > 0 and not (begin in ends and tokenizer.prefixes_segments)
            yield (begin, end), tokenizer.encode(turns.text[begin:end], mid_text)


def _run_template(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool, tools: Tools = None
) -> str:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", "use a model that was made for chat")
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    named = {name: token for name, token in named.items() if token is not None}
    try:
        template = _compile(tokenizer.chat_template)
        return template.render(
            messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt, **named
        )
    except Exception as error:  # a template is a foreign program: it can raise anything
        raise UserError(f"the chat template fails on this conversation: {error}") from None


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


class _Generation(Extension):
    """{% generation %}, from which transformers takes the loss mask: its content is written as it is."""

    tags = {"generation"}  # noqa: RUF012 so jinja2 has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    """As transformers does it: characters as they are, none escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
