"""POST /v1/completions: a text goes on."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from danlu.serve import params, schema
from danlu.serve.answers import Batch, Choice, Kitchen, Order, new_id, offsets, token_text
from danlu.serve.served import Served

DEFAULT_TOKENS = 16
"""As OpenAI's."""


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    request: schema.CompletionRequest
    served: Served
    orders: list[Order]
    """Of each prompt as many as are to be drawn, one after the other."""
    echoes: list[str]
    """Of each order what stands before its answer."""

    @property
    def n_drawn(self) -> int:
        return self.request.best_of or self.request.n or 1


def count(request: schema.CompletionRequest) -> int:
    """Answers that are to be drawn."""
    return len(_prompts(request)) * (request.best_of or request.n or 1)


def _prompts(request: schema.CompletionRequest) -> list[Any]:
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def understand(request: schema.CompletionRequest, served: Served) -> Asked:
    """Tokenises. Raises UserError, HttpError."""
    orders, echoes = [], []
    engine, tokenizer = served.engine, served.tokenizer
    for prompt in _prompts(request):
        ids = engine.prompt_ids(prompt) or [tokenizer.start_id]
        # Log-probabilities of a whole context can be asked for: the token after it isn't read.
        whole = request.echo and request.max_tokens in (0, 1) and len(ids) == served.context
        asked = request.max_tokens
        max_tokens = 0 if whole else params.check_room(asked, len(ids), served, DEFAULT_TOKENS)
        n_drawn = request.best_of or request.n or 1
        each = params.sampling(request, served, max_tokens, request.logprobs or 0, n_drawn)
        scored = request.logprobs if request.echo and request.logprobs is not None else None
        orders += [Order(ids, replace(own, prompt_logprobs=scored)) for own in each]
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        echoes += [text if request.echo else ""] * len(each)
    return Asked(request, served, orders, echoes)


def batch_of(asked: Asked, kitchen: Kitchen, salt: str) -> Batch:
    return Batch(kitchen, asked.served, asked.orders, is_reply=False, salt=salt)


async def whole(asked: Asked, batch: Batch) -> schema.CompletionResponse:
    async with batch:
        choices = await batch.whole()
    kept = _best(choices, asked)
    return schema.CompletionResponse(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=asked.served.name,
        choices=[
            schema.CompletionChoice(
                index=place,
                text=asked.echoes[number] + choices[number].text,
                logprobs=_logprobs(choices[number], asked, _Progress(asked.echoes[number]), with_prompt=True),
                finish_reason=choices[number].completion.finish_reason,
            )
            for place, number in enumerate(kept)
        ],
        usage=batch.usage(len(choices) // asked.n_drawn),
    )


def _best(choices: list[Choice], asked: Asked) -> list[int]:
    """Numbers of the choices that are answered: of each prompt the n of the highest mean log-probability."""
    n_drawn, n = asked.n_drawn, asked.request.n or 1
    kept: list[int] = []
    for begin in range(0, len(choices), n_drawn):
        own = [*range(begin, begin + n_drawn)]
        if n_drawn > n:
            own = sorted(own, key=lambda number: -_mean_logprob(choices[number]))[:n]
        kept += own
    return kept


def _mean_logprob(choice: Choice) -> float:
    return sum(choice.completion.logprobs) / max(1, len(choice.completion.logprobs))


@dataclass
class _Progress:
    """What has been sent of a choice."""

    echo: str
    begun: bool = False
    n_tokens: int = 0
    n_chars: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_chars = len(self.echo)


def _logprobs(
    choice: Choice, asked: Asked, sent: _Progress, with_prompt: bool
) -> schema.CompletionLogprobs | None:
    """Of the tokens that have not been sent; a stop token too, since it has a probability."""
    if asked.request.logprobs is None:
        return None
    tokenizer, completion = asked.served.tokenizer, choice.completion
    tokens = completion.ids[sent.n_tokens : choice.n_tokens]
    values: list[float | None] = [*completion.logprobs[sent.n_tokens : choice.n_tokens]]
    tops: list[Any] = completion.top[sent.n_tokens : choice.n_tokens]
    places = offsets(tokenizer, tokens, sent.n_chars)
    if with_prompt and asked.request.echo:
        ids = choice.order.ids
        values = [None, *completion.prompt_logprobs, *values]
        tops = [None, *completion.prompt_top, *tops]
        places = [*offsets(tokenizer, ids), *places]
        tokens = [*ids, *tokens]
    return schema.CompletionLogprobs(
        tokens=[token_text(tokenizer, token) for token in tokens],
        token_logprobs=values,
        top_logprobs=[
            None if top is None else {token_text(tokenizer, token): value for token, value in top}
            for top in tops
        ],
        text_offset=places,
    )


async def pieces(asked: Asked, batch: Batch) -> AsyncGenerator[schema.CompletionResponse, None]:
    base: dict[str, Any] = {"id": new_id("cmpl"), "created": int(time.time()), "model": asked.served.name}
    options = asked.request.stream_options
    progress = [_Progress(echo) for echo in asked.echoes]
    async with batch:
        async for number, update in batch.updates():
            choice, own = batch.choices[number], progress[number]
            logprobs = _logprobs(choice, asked, own, with_prompt=not own.begun)
            text = update.text if own.begun else own.echo + update.text
            own.begun, own.n_tokens = True, update.n_tokens
            own.n_chars += len(update.text)
            finish: Any = choice.completion.finish_reason if update.done else None
            yield schema.CompletionResponse(
                **base,
                choices=[
                    schema.CompletionChoice(index=number, text=text, logprobs=logprobs, finish_reason=finish)
                ],
            )
    if options and options.include_usage:
        yield schema.CompletionResponse(
            **base, choices=[], usage=batch.usage(len(batch.choices) // asked.n_drawn)
        )
