"""POST /v1/chat/completions."""

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any, Literal

from danlu.serve import params, schema
from danlu.serve.answers import Batch, Choice, Kitchen, Order, new_id, token_text
from danlu.serve.served import Served
from danlu.tokens.tokenizer import Tokenizer
from danlu.tokens.tools import Call, ToolFormat, call_schema, read_calls


@dataclass(frozen=True)
class Asked:
    """A request, understood: what is handed to the engine, and how its answers are read."""

    request: schema.ChatRequest
    served: Served
    orders: list[Order]
    form: ToolFormat | None
    """How calls are written; None = no tool is offered."""
    forced: bool
    """Whether the answer is one call, whatever the model wants."""

    @property
    def tool_names(self) -> set[str]:
        tools = self.request.tools or [] if self.form else []
        return {tool.function.name for tool in tools}


def understand(request: schema.ChatRequest, served: Served, kitchen: Kitchen) -> Asked:
    """Renders and tokenises. Raises UserError, HttpError."""
    tools = params.plain_tools(params.offered_tools(request))
    ids, form = params.render(request.messages, tools, served.tokenizer)
    forced = bool(tools) and request.tool_choice not in (None, "auto")
    if forced:
        assert form is not None
        params.refuse_constraint(request, form)
        ids = [*ids, *_begin_of_call(form, served.tokenizer)]
    asked = request.max_completion_tokens or request.max_tokens
    max_tokens = params.check_room(asked, len(ids), served, kitchen.default_tokens)
    logprobs = (request.top_logprobs or 0) if request.logprobs else 0
    each = params.sampling(request, served, max_tokens, logprobs, request.n or 1)
    if forced:
        assert form is not None
        called = replace(each[0], schema=params.bounded(call_schema(tools, form)))
        params.prepare(called, served)
        each = [replace(called, seed=own.seed) for own in each]
    elif tools:
        each = [replace(own, shows_special=True) for own in each]
    return Asked(request, served, [Order(ids, own) for own in each], form if tools else None, forced)


def _begin_of_call(form: ToolFormat, tokenizer: Tokenizer) -> list[int]:
    """The sign that a call begins with: special where it is a token of that kind."""
    if form.begin in tokenizer.special_ids:
        return [tokenizer.special_ids[form.begin]]
    return tokenizer.encode(form.begin, mid_text=True) if form.begin else []


def batch_of(asked: Asked, kitchen: Kitchen, salt: str) -> Batch:
    return Batch(kitchen, asked.served, asked.orders, is_reply=True, salt=salt)


async def whole(asked: Asked, batch: Batch) -> schema.ChatResponse:
    """The answer, once it is there."""
    async with batch:
        choices = [_choice(number, choice, asked) for number, choice in enumerate(await batch.whole())]
    return schema.ChatResponse(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=asked.served.name,
        choices=choices,
        usage=batch.usage(),
    )


def _choice(number: int, choice: Choice, asked: Asked) -> schema.ChatChoice:
    text, calls, finish = _read(choice, asked)
    message = schema.AnswerMessage(content=None if calls and not text.strip() else text)
    if calls:
        message.tool_calls = [
            schema.AnswerToolCall(id=new_id("call"), function=_function(call)) for call in calls
        ]
    return schema.ChatChoice(
        index=number,
        message=message,
        logprobs=_logprobs(choice, asked, 0, choice.n_tokens),
        finish_reason=finish,
    )


def _read(choice: Choice, asked: Asked) -> tuple[str, list[Call], Literal["stop", "length", "tool_calls"]]:
    """What is said, what is called, and why it ended."""
    ended: Any = choice.completion.finish_reason
    if asked.form is None:
        return choice.text, [], ended
    if asked.forced:
        bare = replace(asked.form, begin="", end="")
        text, calls = read_calls(choice.text, bare, asked.tool_names)
    else:
        text, calls = read_calls(choice.text, asked.form, asked.tool_names)
    if asked.request.parallel_tool_calls is False:
        calls = calls[:1]
    return text, calls, "tool_calls" if calls else ended


def _function(call: Call) -> schema.AnswerFunction:
    return schema.AnswerFunction(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False))


def _logprobs(choice: Choice, asked: Asked, begin: int, end: int) -> schema.ChatLogprobs | None:
    """Of the tokens that the text is made of: none of the stop token."""
    if not asked.request.logprobs:
        return None
    tokenizer, completion = asked.served.tokenizer, choice.completion
    stops = choice.order.params.stop_ids or ()
    content = []
    for token, logprob, top in zip(
        completion.ids[begin:end], completion.logprobs[begin:end], completion.top[begin:end], strict=True
    ):
        if token not in stops:
            tops = [_top(tokenizer, *pair) for pair in top]
            content.append(
                schema.TokenLogprob(**_top(tokenizer, token, logprob).model_dump(), top_logprobs=tops)
            )
    return schema.ChatLogprobs(content=content)


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> schema.TopLogprob:
    return schema.TopLogprob(
        token=token_text(tokenizer, token),
        logprob=logprob,
        bytes=list(tokenizer.token_bytes[token]) if token < len(tokenizer.token_bytes) else None,
    )


async def pieces(asked: Asked, batch: Batch) -> AsyncGenerator[schema.ChatChunk, None]:
    """The same as chunks. Text that may be a call is kept back until it is known."""
    base: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "created": int(time.time()),
        "model": asked.served.name,
    }
    options = asked.request.stream_options

    def chunk(number: int, delta: schema.Delta, **more: Any) -> schema.ChatChunk:
        return schema.ChatChunk(**base, choices=[schema.ChunkChoice(index=number, delta=delta, **more)])

    progress = [_Progress() for _ in batch.choices]
    async with batch:
        async for number, update in batch.updates():
            choice, own = batch.choices[number], progress[number]
            if not own.begun:
                own.begun = True
                yield chunk(number, schema.Delta(role="assistant", content=""))
            if update.done:
                said, calls, finish = _read(choice, asked)
            else:
                said = "" if asked.forced else choice.text[: _certain(choice.text, asked.form)]
            logprobs = _logprobs(choice, asked, own.n_tokens, update.n_tokens)
            own.n_tokens = update.n_tokens
            if piece := said[own.n_chars :]:
                own.n_chars = len(said)
                yield chunk(number, schema.Delta(content=piece), logprobs=logprobs)
            elif logprobs and logprobs.content:
                yield chunk(number, schema.Delta(content=""), logprobs=logprobs)
            if update.done:
                for index, call in enumerate(calls):
                    told = schema.DeltaToolCall(index=index, id=new_id("call"), function=_function(call))
                    yield chunk(number, schema.Delta(tool_calls=[told]))
                yield chunk(number, schema.Delta(), finish_reason=finish)
    if options and options.include_usage:
        yield schema.ChatChunk(**base, choices=[], usage=batch.usage())


@dataclass
class _Progress:
    """What has been sent of a choice."""

    begun: bool = False
    n_tokens: int = 0
    """With their log-probabilities."""
    n_chars: int = 0


def _certain(text: str, form: ToolFormat | None) -> int:
    """Characters at the beginning that can't be part of a call."""
    if form is None:
        return len(text)
    if not form.begin:
        return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
    if (begin := text.find(form.begin)) >= 0:
        return len(text[:begin].rstrip())
    for length in range(min(len(form.begin) - 1, len(text)), 0, -1):
        if form.begin.startswith(text[-length:]):
            text = text[:-length]
            break
    return len(text.rstrip())
