"""From what a request asks to what the engine is told."""

import json
import secrets
from dataclasses import replace
from typing import Any

from danlu.core.errors import UserError
from danlu.generate import constraints
from danlu.generate.sampling import SamplingParams
from danlu.serve import schema
from danlu.serve.served import Served
from danlu.tokens.chat import render_prompt
from danlu.tokens.tokenizer import Tokenizer
from danlu.tokens.tools import ToolFormat, tool_format, with_tools
from danlu.web.errors import HttpError

MOST_SCHEMA = 100_000
"""Characters; the time goes with the square of a schema's parts."""


def sampling(
    request: schema.Sampling, served: Served, max_tokens: int, logprobs: int, n_choices: int
) -> list[SamplingParams]:
    """Params of each of the choices; they differ in their seeds. Raises UserError and HttpError."""
    seed = secrets.randbits(62) if request.seed is None else request.seed
    values: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": max(0, request.top_k or 0),
        "min_p": request.min_p,
        "typical_p": request.typical_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "no_repeat_ngram": request.no_repeat_ngram_size,
        "min_tokens": request.min_tokens,
        "stop": request.stop,
        "logit_bias": _biases(request, served),
        "stop_ids": _stop_ids(request, served),
        "logprobs": logprobs,
        **_constraint(request),
    }
    given = {name: value for name, value in values.items() if value is not None}
    params = SamplingParams(**{"temperature": 1.0, **given})
    prepare(params, served)
    return [replace(params, seed=seed + number) for number in range(n_choices)]


def prepare(params: SamplingParams, served: Served) -> None:
    """Does what a schema or regex takes here: all wait for the thread that would do it otherwise."""
    if params.grammar is not None:
        constraints.prepare(served.tokenizer, params.grammar)


def bounded(found: Any) -> Any:
    """A schema as it is. Raises HttpError for one that would take too long."""
    if len(found if isinstance(found, str) else json.dumps(found)) > MOST_SCHEMA:
        raise HttpError(400, f"the schema has more than {MOST_SCHEMA:,} characters: make it smaller")
    return found


def _stop_ids(request: schema.Sampling, served: Served) -> tuple[int, ...]:
    own = () if request.ignore_eos else tuple(served.tokenizer.stop_ids)
    size = served.engine.model.config.vocab_size
    if wrong := [token for token in request.stop_token_ids or () if token >= size]:
        told = f"stop_token_ids: {wrong[0]} is no token, 0 to {size - 1}"
        raise HttpError(400, told, param="stop_token_ids")
    return (*own, *(request.stop_token_ids or ()))


def _biases(request: schema.Sampling, served: Served) -> tuple[tuple[int, float], ...]:
    found = []
    size = served.engine.model.config.vocab_size
    for name, bias in (request.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 20 and int(name) < size):
            told = f'logit_bias: "{name[:50]}" is no id of a token, 0 to {size - 1}'
            raise HttpError(400, told, param="logit_bias")
        found.append((int(name), float("-inf") if bias <= -100 else bias))
    return tuple(found)


def _constraint(request: schema.Sampling) -> dict[str, Any]:
    """A schema, a regex, or neither."""
    form = request.response_format
    if isinstance(form, schema.JsonFormat):
        return {"schema": {"type": "object"}}
    if isinstance(form, schema.SchemaFormat):
        return {"schema": bounded(form.json_schema.schema_)}
    if request.guided_json is not None:
        return {"schema": bounded(request.guided_json)}
    if request.guided_choice is not None:
        return {"regex": "|".join(_escaped(choice) for choice in request.guided_choice)}
    return {"regex": request.guided_regex}


def _escaped(text: str) -> str:
    """A text as a regular expression in Rust's syntax."""
    return "".join(f"\\x{{{ord(sign):x}}}" for sign in text)


def check_room(asked: int | None, n_prompt: int, served: Served, default: int | None) -> int:
    """Tokens that the answer may have. Raises HttpError where prompt and answer don't fit the context."""
    room = served.room(n_prompt)
    if room < 1 and asked != 0:
        raise HttpError(
            400,
            f"the prompt has {n_prompt} tokens, the model's context {served.context}: no room for an answer",
            code="context_length_exceeded",
        )
    if asked is not None and asked > room:
        raise HttpError(
            400,
            f"{n_prompt} tokens of prompt and {asked} of answer don't fit a context of {served.context}; "
            f"at most {room} of answer",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return room if default is None else min(room, default)


# Messages and tools as the renderer takes them


def plain_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages with texts as contents. Raises HttpError for a call whose arguments are no JSON object."""
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": _text(message.content)}
        if message.name is not None:
            plain["name"] = message.name
        if isinstance(message, schema.AssistantMessage) and message.tool_calls:
            plain["tool_calls"] = [_call(call, f"messages[{number}]") for call in message.tool_calls]
        if isinstance(message, schema.ToolMessage) and message.tool_call_id:
            plain["tool_call_id"] = message.tool_call_id
        found.append(plain)
    return found


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _call(call: schema.ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise HttpError(400, f"{where}: the arguments of a call are no JSON object", param="messages")
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def offered_tools(request: schema.ChatRequest) -> list[schema.Tool]:
    """The tools that the model may call now."""
    if not request.tools or request.tool_choice == "none":
        return []
    chosen = request.tool_choice
    if not isinstance(chosen, schema.NamedTool):
        return request.tools
    found = [tool for tool in request.tools if tool.function.name == chosen.function.name]
    if not found:
        raise HttpError(400, f'tool_choice: there is no tool "{chosen.function.name}"', param="tool_choice")
    return found


def plain_tools(tools: list[schema.Tool]) -> list[dict[str, Any]]:
    """Tools as templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def render(
    messages: list[Any], tools: list[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[list[int], ToolFormat | None]:
    """The prompt's tokens, and how calls are written in it: None where nothing is or was called."""
    plain = plain_messages(messages)
    calls = bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in plain)
    form = tool_format(tokenizer) if calls else None
    if form is None:
        return render_prompt(plain, tokenizer), None
    native = tools if tools and form.native else None
    return render_prompt(with_tools(plain, tools, form), tokenizer, native), form


def refuse_constraint(request: schema.ChatRequest, form: ToolFormat) -> None:
    """A call that is made by force follows its own schema."""
    if any(value is not None for value in _constraint(request).values()):
        raise UserError("response_format and a call by force are both asked for", "leave one of them out")
