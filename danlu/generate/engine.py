"""The engine: prompts in, completions out. Every token in danlu comes from here, and every likelihood."""

import codecs
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from danlu.core.errors import UserError
from danlu.core.host import memory_bytes
from danlu.core.progress import Progress
from danlu.data.conversations import Messages
from danlu.generate.blocks import Blocks, Tables
from danlu.generate.fast import FastRunner, runs_fast
from danlu.generate.graphs import GraphRunner, runs_in_graphs
from danlu.generate.kernels import POSITIONS
from danlu.generate.packed import Kind
from danlu.generate.paged import PagedCache, bytes_per_block
from danlu.generate.program import Feed, Program, Sequences
from danlu.generate.runner import Runner
from danlu.generate.sampling import Row, SamplingParams
from danlu.generate.scheduler import NOT_NUMBERS, Job, Lane, Owned, Scheduler
from danlu.model.lora import adapted_layers
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render_prompt
from danlu.tokens.tokenizer import Tokenizer

Prompt = str | list[int] | Messages

SHARE = 0.25
"""Of the device's memory, for the cache, where nothing else is said."""
MOST_SEQUENCES = 64
"""At full length; a cache is no larger."""


class PromptTooLong(UserError):
    """It doesn't fit the model's context."""


@dataclass
class Completion:
    """One answer. `logprobs`: of each of `ids`, from the model's own distribution, before any warping."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    """stop (a stop token, which is the last of `ids`, or a stop string, which isn't in `text`), length or
    cancelled."""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each token the most probable ones with their log-probabilities, where asked for."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of the prompt's tokens from the second on, where asked for."""
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Packing:
    """The copies of the weights that an engine computes with."""

    n_bytes: int
    seconds: float
    """What it took to write them, the last time that the weights had changed."""


@dataclass(frozen=True)
class Likelihood:
    """What a model says of a continuation."""

    logprob: float
    """Nats, of all its tokens together."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""
    n_tokens: int


class Engine:
    """Generates from a live model: packed copies of its weights follow each change before the next token.

    Requests run together and share the keys and values of common beginnings; `run` takes any program.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        dtype: Kind | None = None,
        deterministic: bool = False,
        adapters: Sequence[str] = (),
        helpers: Sequence[Transformer] = (),
        cache_bytes: int | None = None,
        step_tokens: int | None = None,
    ) -> None:
        """`dtype`: of the weights that are computed with, default as the model computes; int8 and int4 are
        rounded copies. `cache_bytes`: of keys and values, default a quarter of the device's memory.

        `adapters`: names of the model's LoRA adapters that requests may ask for, several in one batch;
        without them all are answered with the active one. `helpers`: further models that a program may ask,
        of the same vocabulary: a draft, an amateur. `deterministic`: a request's tokens and
        log-probabilities are the same to the bit, whatever else the engine does in the meantime.
        `step_tokens`: of prompts that are read in one step, default 512, on a GPU 8192.
        Raises UserError where the cache can't hold anything, and for `deterministic` on a GPU.
        """
        self.model, self.tokenizer, self.deterministic = model, tokenizer, deterministic
        self._kind, self._helpers, self.adapters = dtype, helpers, list(adapters)
        if model.config.scores:
            raise UserError("this model gives rewards, and no words", "name a language model")
        self._check_adapters()
        self._cache_bytes, self._step_tokens = cache_bytes, step_tokens
        self._scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """Made when it is first needed."""
        if self._scheduler is None:
            models = [self.model, *self._helpers]
            lanes = [self._lane(model, number, len(models)) for number, model in enumerate(models)]
            on_cpu = self.model.head_weight.device.type == "cpu"
            self._scheduler = Scheduler(lanes, self._step_tokens or (512 if on_cpu else 8192))
        return self._scheduler

    def _lane(self, model: Transformer, number: int, of: int) -> Lane:
        """Where one of the models runs."""
        config, device = model.config, model.head_weight.device
        kind = self._kind or _kind_of(model.compute_dtype or model.head_weight.dtype)
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        size = bytes_per_block(config, dtype)
        most = MOST_SEQUENCES * -(-config.max_positions // POSITIONS)
        limit = self._cache_bytes if self._cache_bytes is not None else _free_bytes(device) // of
        n_blocks = min(most, limit // size)
        if n_blocks < 2:
            raise UserError(
                f"{limit:,} bytes for keys and values: {POSITIONS} tokens take {size:,}",
                "give the engine more memory",
            )
        shares = config.rope_scaling is None or config.rope_scaling.kind not in ("dynamic", "longrope")
        window = 0 if not all(config.window_of(n) for n in range(config.n_layers)) else config.window
        tables = Tables(Blocks(n_blocks, POSITIONS), window, shares, number, of)
        cache = PagedCache(config, n_blocks, dtype, device)
        named = self.adapters if number == 0 else []
        if device.type == "cpu" and runs_fast(config) and not named:
            return Lane(FastRunner(model, cache, self.deterministic, kind), tables)
        if device.type != "cpu" and self.deterministic:
            raise UserError("deterministic mode computes on a processor only", "move the model there")
        # The live weights serve where they already are what is computed with.
        lives = kind == _kind_of(model.compute_dtype or model.head_weight.dtype)
        lives &= kind == _kind_of(model.head_weight.dtype) and (kind == "float32" or device.type != "cpu")
        packed = None if lives and not self.deterministic else kind
        if device.type == "cuda" and not named and runs_in_graphs(config):
            return Lane(GraphRunner(model, cache, packed), tables)
        if named and packed is None:
            packed = kind  # the live adapters stay as they are
        return Lane(Runner(model, cache, self.deterministic, packed, named), tables)

    def _check_adapters(self) -> None:
        known = {name for layer in adapted_layers(self.model).values() for name in layer.adapters}
        if missing := [name for name in self.adapters if name not in known]:
            raise UserError(
                f'the model has no adapter "{missing[0]}"', f"it has {', '.join(sorted(known)) or 'none'}"
            )
        if self.adapters and self.deterministic:
            raise UserError(
                "several adapters in one batch are not deterministic", "merge one, or leave deterministic off"
            )

    @property
    def packing(self) -> Packing:
        runners = [lane.runner for lane in self.scheduler.lanes]
        return Packing(
            sum(runner.packed_bytes for runner in runners), sum(runner.packing_seconds for runner in runners)
        )

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self.scheduler.lanes[0].tables.blocks.n_blocks * POSITIONS

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A text begins like a document; messages are rendered up to the assistant's turn."""
        if isinstance(prompt, str):
            return [*self.tokenizer.document_start, *self.tokenizer.encode(prompt)]
        parts: list[Any] = list(prompt)
        return render_prompt(parts, self.tokenizer) if _is_chat(parts) else [int(token) for token in parts]

    def text(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """The text of an answer: behind a text it begins with a blank where a word does; a reply does not."""
        text = codecs.decode(self.tokenizer.decode_bytes(list(ids)), "utf-8", "replace")
        drops = _is_chat(prompt) and self.tokenizer.drops_first_blank
        return text.removeprefix(" ") if drops else text

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        adapter: str | None = None,
        *,
        is_reply: bool | None = None,
        salt: str = "",
    ) -> "Request":
        """Puts a request into the batch; `step` moves it on. `adapter`: None = the model without any.

        `is_reply`: whether ids are a conversation whose next turn is wanted; of text and messages it is
        known. `salt`: only requests with the same one use each other's prefixes, so that nobody can tell by
        the time it takes what others have asked. Raises UserError for what can never fit, and for an adapter
        that the engine wasn't given.
        """
        if adapter is not None and adapter not in self.adapters:
            raise UserError(
                f'the engine has no adapter "{adapter}"', f"it has {', '.join(self.adapters) or 'none'}"
            )
        ids = self.prompt_ids(prompt)
        self.check_prompt(ids, room=min(1, params.max_tokens))
        n_tokens = min(len(ids) + params.max_tokens, self.model.config.max_positions)
        if n_tokens > self.capacity and not self.scheduler.lanes[0].tables.window:
            raise UserError(
                f"{len(ids)} tokens of prompt, {params.max_tokens} of answer: a cache of {self.capacity}",
                "give the engine more memory, shorten the prompt or generate fewer tokens",
            )
        request = Request(self, ids, params, _is_chat(prompt) if is_reply is None else is_reply)
        request.begin(self.adapters.index(adapter) + 1 if adapter else 0, salt)
        return request

    def step(self) -> None:
        """Moves all requests on: one token of each answer, or a part of a prompt."""
        self.scheduler.step()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        progress: str = "",
        found: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """One completion a prompt. `progress`: under which name it is reported, "" = not.

        `found` is told each as soon as it is whole, with the prompt's number. Raises UserError for a prompt
        beyond the context.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        requests: list[Request] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                requests.append(self.submit(prompt, own))
            tell = None if found is None else lambda number: found(number, requests[number].completion)
            self._work([request.job for request in requests], progress, tell)
        finally:
            for request in requests:
                request.cancel()
        return [request.completion for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The answer piece by piece, each piece whole characters; together they are `generate`'s text."""
        request = self.submit(prompt, params)
        try:
            yield from request.pieces()
        finally:
            request.cancel()

    def chat(self, messages: Messages, params: SamplingParams) -> Completion:
        """The assistant's next turn."""
        return self.generate([messages], params)[0]

    def run(
        self, *programs: Any, progress: str = "", found: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """What each program returns, run together: functions of `Sequences`, see `program.py`.

        `progress`, `found`: as in `generate`.
        """
        jobs = []
        for program in programs:
            sequences = Owned(self.scheduler.lanes)
            jobs.append(Job(program(sequences), owned=sequences.owned))
        try:
            for job in jobs:
                self.scheduler.submit(job)
            self._work(jobs, progress, None if found is None else lambda n: found(n, jobs[n].result))
        finally:
            for job in jobs:
                self.scheduler.cancel(job)
        return [job.result for job in jobs]

    def _work(self, jobs: Sequence[Job], label: str, done: Callable[[int], None] | None = None) -> None:
        """Steps until all are done, or one has failed: its error is raised."""
        left = list(range(len(jobs)))
        with Progress(label, len(jobs), "requests") if label else nullcontext() as progress:
            while left:
                self.step()
                for number in left:
                    if (error := jobs[number].error) is not None:
                        raise error
                    if jobs[number].done and done is not None:
                        done(number)
                left = [number for number in left if not jobs[number].done]
                if progress is not None:
                    progress.update(len(jobs) - len(left))

    def likelihood(self, prefix: str | list[int], continuations: Sequence[list[int]]) -> list[Likelihood]:
        """Of each continuation of one beginning, which is read once."""
        ids = self.prompt_ids(prefix)
        return self.likelihoods([(ids, continuation) for continuation in continuations])

    def likelihoods(
        self,
        requests: Sequence[tuple[list[int], list[int]]],
        progress: str = "",
        found: Callable[[int, Likelihood], None] | None = None,
    ) -> list[Likelihood]:
        """Of (prefix, continuation) pairs in tokens. What prefixes have in common is read once.

        `progress`, `found`: as in `generate`. Raises UserError for an empty prefix or continuation, and for a
        pair beyond the context.
        """
        for prefix, continuation in requests:
            self._check_pair(prefix, continuation)
        # Neighbours share most: sorted by their tokens, a prefix is still in the cache when it comes again.
        order = sorted(range(len(requests)), key=lambda number: requests[number][0])
        groups = [[*group] for _, group in groupby(order, key=lambda number: requests[number][0])]
        programs = [
            _Scoring(requests[group[0]][0], [requests[number][1] for number in group]).program
            for group in groups
        ]
        answers: dict[int, Likelihood] = {}

        def take(group: int, own: list[Likelihood]) -> None:
            for number, answer in zip(groups[group], own, strict=True):
                answers[number] = answer
                if found is not None:
                    found(number, answer)

        self.run(*programs, progress=progress, found=take)
        return [answers[number] for number in range(len(requests))]

    def embed(self, texts: Sequence[str | list[int]]) -> torch.Tensor:
        """(texts, D) float32: the mean of the last layer's vectors over a text's tokens."""
        ids = [self.prompt_ids(text) for text in texts]
        for tokens in ids:
            self.check_prompt(tokens, room=0)

        return torch.stack(self.run(*map(embedding, ids)))

    def _check_pair(self, prefix: list[int], continuation: list[int]) -> None:
        if not continuation:
            raise UserError("a continuation is empty", "give at least one token to be scored")
        self.check_prompt([*prefix, *continuation[:-1]], room=0)
        if not prefix:
            raise UserError("a prefix is empty", "begin with the start token, or any other")

    def check_prompt(self, ids: list[int], room: int = 1) -> None:
        """Raises UserError for ids that can't be read. `room`: positions that must be left."""
        config = self.model.config
        if not ids:
            raise UserError("the prompt is empty", "give at least one token")
        if len(ids) + room > config.max_positions:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, the model's context {config.max_positions}",
                "shorten the prompt",
            )
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < config.vocab_size)
            raise UserError(
                f"the prompt holds the id {wrong}, the model's vocabulary has {config.vocab_size} entries",
                "use the tokenizer that belongs to the model",
            )


class Request:
    """An answer in the making."""

    job: Job

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams, is_reply: bool) -> None:
        self.engine, self.ids, self.params = engine, ids, params
        self.completion = Completion()
        tokenizer = engine.tokenizer
        self.row = Row(ids, params, tokenizer)
        self.room = min(params.max_tokens, engine.model.config.max_positions - len(ids) + 1)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = is_reply and tokenizer.drops_first_blank
        self._taken = 0
        names = {number: name for name, number in tokenizer.special_ids.items()}
        self._shown = names if params.shows_special else {}

    def begin(self, root: int = 0, salt: str = "") -> None:
        """Joins the others, with one of the adapters."""
        own = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=16).digest()) if salt else 0
        sequences = Owned(self.engine.scheduler.lanes, root + own * (len(self.engine.adapters) + 1))
        self.job = Job(self.program(sequences), root, owned=sequences.owned)
        self.engine.scheduler.submit(self.job)

    @property
    def done(self) -> bool:
        return self.job.done

    def cancel(self) -> None:
        """Ends it here; its memory is free at once. Nothing happens where it has ended."""
        if not self.job.done:
            self.engine.scheduler.cancel(self.job)
            self.completion.finish_reason = "cancelled"

    def wait(self) -> Completion:
        """Raises what went wrong."""
        for _ in self.pieces():
            pass
        return self.completion

    def pieces(self) -> Iterator[str]:
        """The text as it comes."""
        while True:
            if piece := self.take():
                yield piece
            if self.job.done:
                break
            self.engine.step()
        if self.job.error is not None:
            raise self.job.error

    def take(self) -> str:
        """What is certain of the text and has not been taken yet."""
        text, begin = self.completion.text, self._taken
        self._taken = max(begin, len(text) if self.job.done else len(text) - self._withheld())
        return text[begin : self._taken]

    def program(self, sequences: Sequences) -> Program[Completion]:
        """Token by token until a stop, or until there is no room."""
        completion, params = self.completion, self.params
        sequence = sequences.open()
        fed: Sequence[int] = self.ids
        if params.prompt_logprobs is not None:
            fed = yield from self._score_prompt(sequence)
        for _ in range(self.room):
            output = yield [Feed(sequence, fed, row=self.row)]
            drawn = output.draw
            assert drawn is not None
            if drawn.error is not None:
                raise drawn.error
            if math.isnan(drawn.logprob):
                raise UserError(NOT_NUMBERS, "take an earlier checkpoint")
            self.row.accept(drawn.token)
            completion.ids.append(drawn.token)
            completion.logprobs.append(drawn.logprob)
            completion.top.append(drawn.top)
            if drawn.token in self.row.stop_ids:
                completion.finish_reason = "stop"
                break
            shown = self._shown.get(drawn.token)
            self._append(shown.encode() if shown else self.engine.tokenizer.decode_bytes([drawn.token]))
            if self._stopped() or self.row.complete:
                completion.finish_reason = "stop"
                break
            fed = [drawn.token]
        self._append(b"", final=True)
        return completion

    def _score_prompt(self, sequence: int) -> Program[list[int]]:
        """Log-probabilities of the prompt's tokens but the first; returns what is still to be read."""
        *before, last = self.ids
        if before:
            n = self.params.prompt_logprobs or 0
            output = yield [Feed(sequence, before, targets=self.ids[1:], top=n)]
            self.completion.prompt_logprobs = output.logprobs.tolist()
            self.completion.prompt_top = output.tops
        return [last]

    def _append(self, data: bytes, final: bool = False) -> None:
        """More bytes of the answer; see `Engine.text`."""
        if piece := self._decoder.decode(data, final):
            self.completion.text += piece.removeprefix(" ") if self._begins else piece
            self._begins = False

    def _stopped(self) -> bool:
        """Cuts the text at the first stop string, once min_tokens are there."""
        if len(self.completion.ids) < self.params.min_tokens:
            return False
        places = [place for stop in self.params.stop if (place := self.completion.text.find(stop)) >= 0]
        if not places:
            return False
        self.completion.text = self.completion.text[: min(places)]
        self._decoder.reset()
        return True

    def _withheld(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        text = self.completion.text
        longest = max(map(len, self.params.stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.params.stop):
                return length
        return 0


def embedding(tokens: list[int]) -> Callable[[Sequences], Program[torch.Tensor]]:
    """A program that finds (D,) float32: the mean of the last layer's vectors."""

    def program(sequences: Sequences) -> Program[torch.Tensor]:
        sequence = sequences.open()
        output = yield [Feed(sequence, tokens, every=True, hidden_only=True)]
        sequences.free(sequence)
        return output.hidden.float().mean(0)

    return program


@dataclass(frozen=True)
class _Scoring:
    """The continuations of one prefix."""

    prefix: list[int]
    continuations: list[list[int]]

    def program(self, sequences: Sequences) -> Program[list[Likelihood]]:
        """Reads all of the prefix but its last token once, and forks."""
        base = sequences.open()
        if len(self.prefix) > 1 and len(self.continuations) > 1:
            yield [Feed(base, self.prefix[:-1], silent=True)]
            tail = self.prefix[-1:]
        else:
            tail = self.prefix
        forks = [base, *(sequences.fork(base) for _ in self.continuations[1:])]
        output = yield [
            Feed(fork, [*tail, *continuation[:-1]], targets=continuation)
            for fork, continuation in zip(forks, self.continuations, strict=True)
        ]
        for fork in forks:
            sequences.free(fork)
        sizes = [len(continuation) for continuation in self.continuations]
        return [
            Likelihood(float(logprobs.double().sum()), bool(greedy.all()), len(logprobs))
            for logprobs, greedy in zip(output.logprobs.split(sizes), output.greedy.split(sizes), strict=True)
        ]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    return int(memory_bytes() * SHARE)


def _kind_of(dtype: torch.dtype) -> Kind:
    return "float32" if dtype == torch.float32 else "bf16"


def _is_chat(prompt: Prompt) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], dict)
