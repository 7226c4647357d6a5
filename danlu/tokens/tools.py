"""Tools in a conversation: how a model's template writes a call, and how calls are read out of its reply.

Nothing here goes by a model's name. A template is asked to write one call, and what stands around that call
is how this model calls. A template that knows no tools gets them described in the system prompt.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.tokens.chat import Tools, render_text
from danlu.tokens.tokenizer import Tokenizer

_PROBE = "probe_of_danlu"
_VALUE = "value_of_danlu"


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: `begin`, one JSON value (a call, or a list of calls), `end`."""

    begin: str
    end: str
    arguments: str = "arguments"
    """Under which key the arguments stand; the name stands under "name"."""
    native: bool = True
    """Whether the template itself writes tools and calls."""


OWN = ToolFormat("<tool_call>", "</tool_call>", native=False)
"""For templates without tools: the form that Hermes and Qwen were trained with."""


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """The form that the tokenizer's template writes calls in. Raises UserError where it has no template."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", "use a model that was made for chat")
    return _learn(tokenizer)


@lru_cache(maxsize=8)
def _learn(tokenizer: Tokenizer) -> ToolFormat:
    call = {"name": _PROBE, "arguments": {_VALUE: _VALUE}}
    tools = [{"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}]
    asked: Messages = [{"role": "user", "content": "Hi"}]
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": call}],
    }
    try:
        lists_tools = _PROBE in render_text(asked, tokenizer, True, tools)
        prompt = render_text(asked, tokenizer, True)
        text = render_text([*asked, turn], tokenizer)
    except UserError:  # it wants contents, or knows no such turn
        return OWN
    # Behind the prompt, up to the stop token, stands what the model writes.
    written = text[len(prompt) :] if text.startswith(prompt) else text[text.rfind(asked[0]["content"]) + 2 :]
    ends = [place for stop in tokenizer.stops if (place := written.find(stop)) >= 0]
    written = written[: min(ends, default=len(written))]
    found = _value_with(written, f'"{_PROBE}"')
    if not lists_tools or found is None:
        return OWN
    begin, end, value = found
    call_of = value[0] if isinstance(value, list) and value else value
    keys = [key for key, part in call_of.items() if part == {_VALUE: _VALUE}] if call_of else []
    if call_of.get("name") != _PROBE or not keys:
        return OWN
    return ToolFormat(written[:begin].strip(), written[end:].strip(), keys[0])


def _value_with(text: str, needle: str) -> tuple[int, int, Any] | None:
    """The first JSON object or list that holds `needle`: begin, end, value."""
    for begin, sign in enumerate(text):
        if sign in "[{":
            try:
                value, end = json.JSONDecoder().raw_decode(text, begin)
            except ValueError:
                continue
            if needle in text[begin:end]:
                return begin, end, value
    return None


def with_tools(messages: Messages, tools: Tools, form: ToolFormat) -> Messages:
    """The conversation as the template can take it: as it is, or with tools, calls and results as text."""
    if form.native:
        return messages
    found: Messages = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            found.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            parts = [message["content"], *(_written(call["function"], form) for call in calls)]
            found.append({"role": message["role"], "content": "\n".join(part for part in parts if part)})
        else:
            found.append(message)
    if not tools:
        return found
    said = found[0]["content"] + "\n\n" if found[0]["role"] == "system" else ""
    rest = found[1:] if found[0]["role"] == "system" else found
    return [{"role": "system", "content": said + _description(tools, form)}, *rest]


def _written(call: dict[str, Any], form: ToolFormat) -> str:
    value = {"name": call["name"], form.arguments: call["arguments"]}
    return f"{form.begin}{json.dumps(value, ensure_ascii=False)}{form.end}"


def _description(tools: Tools, form: ToolFormat) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools or [])
    example = f'{form.begin}{{"name": NAME, "{form.arguments}": {{…}}}}{form.end}'
    return (
        f"These functions can be called:\n{lines}\n"
        f"To call one, answer with nothing but\n{example}\nOtherwise answer as usual."
    )


def read_calls(text: str, form: ToolFormat, known: set[str]) -> tuple[str, list[Call]]:
    """What is said beside the calls, and the calls, of functions in `known`. What isn't one stays text."""
    said, calls, at = "", [], 0
    while (begin := text.find(form.begin, at)) >= 0 and (form.begin or not said):
        found = _calls_at(text, begin + len(form.begin), form, known)
        if found is None:
            if not form.begin:
                break
            said += text[at : begin + len(form.begin)]
            at = begin + len(form.begin)
            continue
        more, end = found
        said += text[at:begin]
        calls += more
        at = end
        if not form.begin:
            break
    return (said + text[at:]).rstrip() if calls else text, calls


def _calls_at(text: str, at: int, form: ToolFormat, known: set[str]) -> tuple[list[Call], int] | None:
    """The calls that begin here, and where they end."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    calls = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or one.get("name") not in known:
            return None
        arguments = one.get(form.arguments, {})
        if not isinstance(arguments, dict):
            return None
        calls.append(Call(one["name"], arguments))
    rest = text[end:].lstrip()
    if form.end and rest.startswith(form.end):
        end = len(text) - len(rest) + len(form.end)
    return (calls, end) if calls else None


def call_schema(tools: Tools, form: ToolFormat) -> dict[str, Any]:
    """The JSON schema of one call of any of the tools. Raises UserError where two define one name twice."""
    options: list[dict[str, Any]] = []
    shared: dict[str, dict[str, Any]] = {}
    for tool in tools or []:
        arguments = dict(tool["function"].get("parameters") or {"type": "object"})
        # What "$ref" points to is looked up from the whole schema's root.
        for key in ("$defs", "definitions"):
            parts = arguments.pop(key, {})
            if not isinstance(parts, dict):
                raise UserError(f'the parameters of a tool: "{key}" is no object', "mend the schema")
            for name, part in parts.items():
                if shared.setdefault(key, {}).setdefault(name, part) != part:
                    raise UserError(f'two tools define "{name}" differently', "rename one of them")
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["function"]["name"]}, form.arguments: arguments},
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
        )
    return {**(options[0] if len(options) == 1 else {"anyOf": options}), **shared}
