"""Continuous batching: what is read in each step of the model, for whom, and where it is kept.

Jobs come and go at any step (Yu et al. 2022, "Orca"). In a step, jobs that need one token each go first; what
is left of the step's tokens goes to prompts, in pieces (Agrawal et al. 2023, "Sarathi"). Where two jobs need
the same block computed, one computes it and the other waits a step. Where the cache is full, the youngest job
gives its blocks back and reads its tokens again later.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.blocks import Full, Table, Tables
from danlu.generate.draw import draw
from danlu.generate.program import Feed, Output
from danlu.generate.runner import Runner

NOT_NUMBERS = "the model's logits are not numbers"


@dataclass(eq=False)
class Job:
    """One request on its way. Its program is advanced whenever all that it asked for has been computed."""

    program: Generator[list[Feed], Output, Any]
    root: int = 0
    """Which adapter it is computed with; prefixes are shared among equal ones."""
    owned: set[int] = field(default_factory=set)
    """Its open sequences: those of its `Owned`."""
    feeds: list[Feed] = field(default_factory=list)
    found: dict[int, list[Output]] = field(default_factory=dict)
    """Of each feed, what has been computed of the rows asked for."""
    result: Any = None
    error: UserError | None = None
    done: bool = False
    started: bool = False


@dataclass(frozen=True)
class Lane:
    """One of the models, and the sequences that it reads: those whose number is its own, modulo all."""

    runner: Runner
    tables: Tables


class Owned:
    """The sequences of one job (a `program.Sequences`)."""

    def __init__(self, lanes: Sequence[Lane], root: int = 0) -> None:
        self.lanes, self.root = lanes, root
        self.owned: set[int] = set()

    def open(self, model: int = 0) -> int:
        if model >= len(self.lanes):
            raise UserError(f"there is no model {model}", "give the engine the models that it asks: helpers")
        return self._own(self.lanes[model].tables.open(self.root))

    def fork(self, sequence: int) -> int:
        return self._own(self._tables(sequence).fork(sequence))

    def cut(self, sequence: int, length: int) -> None:
        self._tables(sequence).cut(sequence, length)

    def free(self, sequence: int) -> None:
        self.owned.discard(sequence)
        self._tables(sequence).free(sequence)

    def _tables(self, sequence: int) -> Tables:
        return self.lanes[sequence % len(self.lanes)].tables

    def _own(self, sequence: int) -> int:
        self.owned.add(sequence)
        return sequence


@dataclass
class _Chosen:
    """A piece of a feed that is read in this step."""

    job: Job
    number: int
    feed: Feed
    n_tokens: int
    wanted: int
    """Of its last tokens."""
    left: int
    """Tokens of the feed that come later."""

    @property
    def targets(self) -> Sequence[int]:
        """Those that belong to the tokens wanted here."""
        end = len(self.feed.targets) - min(self.left, len(self.feed.targets))
        return self.feed.targets[end - self.wanted : end]


class Scheduler:
    """Runs jobs; nearly all of them on the first of the models."""

    def __init__(self, lanes: Sequence[Lane], step_tokens: int = 512, most_jobs: int = 256) -> None:
        """`step_tokens`: most tokens of prompts read in a step; `most_jobs`: most jobs that run at once."""
        self.lanes = lanes
        self.step_tokens, self.most_jobs = step_tokens, most_jobs
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.computed = 0
        """Tokens that models have read, of prompts and of answers."""

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, job: Job) -> None:
        if self.idle:
            for lane in self.lanes:
                lane.runner.look_again()
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Ends a job where it is; its blocks are free at once."""
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.running:
            self.running.remove(job)
        self._end(job)

    def step(self) -> None:
        """One pass of the model, and every program that has what it asked for goes on."""
        changed = [lane.runner.refresh() for lane in self.lanes]
        if any(changed):
            for job in self.running:  # the weights have changed: what was computed with the old ones is void
                self._drop(job)
            for lane in self.lanes:
                lane.tables.blocks.forget()
        self._admit()
        idle = True
        for lane in self.lanes:
            if chosen := self._choose(lane):
                self._compute(lane, chosen)
                idle = False
        ready = [job for job in self.running if self._is_ready(job)]
        if self.running and idle and not ready:
            self._too_small(self.running[0])
        for job in ready:
            self._advance(job)

    def _admit(self) -> None:
        """Starts waiting jobs while there is room for what they ask first."""
        while self.waiting and len(self.running) < self.most_jobs:
            job = self.waiting[0]
            if not job.started:
                job.started = True
                self._advance(job, first=True)
                if job.done:
                    continue
            for feed in job.feeds:
                self._match(job, feed)
            if self.running and not self._has_room(job):
                self._drop(job)  # who waits holds nothing: others may need it, and the weights may change
                return
            self.running.append(self.waiting.popleft())

    def _has_room(self, job: Job) -> bool:
        """Whether what it asks fits, and a block for each job that runs."""
        needed = dict.fromkeys(self.lanes, len(self.running))
        for feed in job.feeds:
            lane = self._lane(feed.sequence)
            pending = lane.tables.tables[feed.sequence].pending
            needed[lane] += lane.tables.blocks_needed(feed.sequence, pending)
        return all(blocks <= lane.tables.blocks.available for lane, blocks in needed.items())

    def _lane(self, sequence: int) -> Lane:
        return self.lanes[sequence % len(self.lanes)]

    def _table(self, sequence: int) -> Table:
        return self._lane(sequence).tables.tables[sequence]

    def _match(self, job: Job, feed: Feed) -> None:
        self._lane(feed.sequence).tables.match(feed.sequence, feed.wanted)

    def _choose(self, lane: Lane) -> list[_Chosen]:
        """What a model reads in this step; its blocks are taken."""
        chosen: list[_Chosen] = []
        computing: set[Any] = set()
        budget = self.step_tokens
        for single in (True, False):
            for job in [*self.running]:
                if job not in self.running:  # it has given its place to an older one
                    continue
                for number, feed in enumerate(job.feeds):
                    if self._lane(feed.sequence) is not lane:
                        continue
                    table = lane.tables.tables[feed.sequence]
                    if table.pending == 0 or (table.pending == 1) != single:
                        continue
                    n_tokens = 1
                    if not single:
                        self._match(job, feed)
                        key = lane.tables.next_key(feed.sequence, feed.wanted)
                        if key in computing:
                            continue
                        n_tokens = table.pending if lane.runner.whole else min(table.pending, budget)
                        if n_tokens <= 0 or (lane.runner.whole and chosen):
                            continue
                        if key is not None:
                            computing.add(key)
                    if self._make_room(job, feed, n_tokens, chosen):
                        left = table.pending - n_tokens
                        wanted = max(0, min(n_tokens, feed.wanted - left))
                        chosen.append(_Chosen(job, number, feed, n_tokens, wanted, left))
                        budget -= n_tokens
                        if lane.runner.whole:
                            return chosen
        return chosen

    def _make_room(self, job: Job, feed: Feed, n_tokens: int, chosen: list[_Chosen]) -> bool:
        """Takes the blocks, if need be those of younger jobs; False where the job has to wait."""
        while True:
            try:
                self._lane(feed.sequence).tables.make_room(feed.sequence, n_tokens)
            except Full:
                busy = {choice.job for choice in chosen}
                younger = [
                    other for other in self.running[self.running.index(job) + 1 :] if other not in busy
                ]
                if not younger:
                    return False
                self._drop(younger[-1])
                self.running.remove(younger[-1])
                self.waiting.appendleft(younger[-1])
            else:
                return True

    def _drop(self, job: Job) -> None:
        """Forgets what was computed for a job; what it has asked for is computed again."""
        for sequence in job.owned:
            self._lane(sequence).tables.drop(sequence)
        job.found.clear()

    def _too_small(self, job: Job) -> None:
        """The only job left can't go on: it alone needs more than there is."""
        blocks = self._lane(job.feeds[0].sequence).tables.blocks
        total = blocks.n_blocks * blocks.size
        tokens = sum(len(self._table(sequence).tokens) for sequence in job.owned)
        job.error = UserError(
            f"{tokens} tokens in {len(job.owned)} sequences don't fit a cache of {total} tokens",
            "give the engine more memory, or use fewer or shorter sequences",
        )
        self.cancel(job)

    def _compute(self, lane: Lane, chosen: list[_Chosen]) -> None:
        """Runs a model on the pieces, and gives each job what it asked about."""
        tables = lane.tables
        copies, tables.copies = tables.copies, []
        pieces = [tables.piece(choice.feed.sequence, choice.n_tokens) for choice in chosen]
        hidden = lane.runner.run(pieces, [choice.job.root for choice in chosen], copies, _wanted(chosen))
        for choice in chosen:
            tables.wrote(choice.feed.sequence, choice.n_tokens)
            self.computed += choice.n_tokens
        asking = [choice for choice in chosen if choice.wanted]
        ends = accumulate(choice.wanted for choice in asking)
        parts = [hidden[end - choice.wanted : end] for choice, end in zip(asking, ends, strict=True)]
        for choice, output in zip(asking, self._outputs(lane.runner, asking, parts), strict=True):
            choice.job.found.setdefault(choice.number, []).append(output)
            if output.is_nan and not choice.job.done:
                choice.job.error = UserError(
                    "the model's logits are not numbers", "take an earlier checkpoint"
                )
                self.cancel(choice.job)

    def _outputs(self, runner: Runner, asking: list[_Chosen], hidden: Sequence[Tensor]) -> list[Output]:
        """Logits, a sampled token, or log-probabilities of targets: as each feed says."""
        outputs = [Output(rows) for rows in hidden]
        scored = [i for i, choice in enumerate(asking) if choice.feed.targets]
        sampled = [i for i, choice in enumerate(asking) if choice.feed.row is not None]
        others = (i for i in range(len(asking)) if i not in scored and i not in sampled)
        plain = [i for i in others if not asking[i].feed.hidden_only]
        if plain:
            logits = runner.logits(torch.cat([hidden[i] for i in plain]))
            for i, rows in zip(plain, logits.split([len(hidden[i]) for i in plain]), strict=True):
                outputs[i].logits = rows
        if sampled:
            logits = runner.logits(torch.cat([hidden[i] for i in sampled]))
            rows_of = [row for i in sampled if (row := asking[i].feed.row) is not None]
            for i, drawn in zip(sampled, draw(logits, rows_of), strict=True):
                outputs[i].draw = drawn
        if scored:
            targets = [target for i in scored for target in asking[i].targets]
            n_top = [asking[i].feed.top for i in scored for _ in hidden[i]]
            logprobs, greedy, tops = runner.score(torch.cat([hidden[i] for i in scored]), targets, n_top)
            begin = 0
            for i in scored:
                rows_of_i = slice(begin, begin := begin + len(hidden[i]))
                outputs[i].logprobs, outputs[i].greedy = logprobs[rows_of_i], greedy[rows_of_i]
                outputs[i].tops = tops[rows_of_i]
        return outputs

    def _is_ready(self, job: Job) -> bool:
        return all(self._table(feed.sequence).pending == 0 for feed in job.feeds)

    def _advance(self, job: Job, first: bool = False) -> None:
        """Hands a program what it asked for, and takes its next feeds."""
        try:
            if first:
                feeds = next(job.program)
            else:
                found = [rows for number in range(len(job.feeds)) for rows in job.found.get(number, [])]
                job.found = {}
                feeds = job.program.send(Output.join(found))
        except StopIteration as end:
            job.result = end.value
        except UserError as error:
            job.error = error
        except BaseException:
            self.cancel(job)
            raise
        else:
            job.feeds = feeds
            for feed in feeds:
                self._table(feed.sequence).tokens += feed.tokens
            return
        self.cancel(job)

    def _end(self, job: Job) -> None:
        job.done = True
        job.program.close()
        for sequence in [*job.owned]:
            self._lane(sequence).tables.free(sequence)
        job.owned.clear()


def _wanted(chosen: list[_Chosen]) -> list[int]:
    """Indices, among all tokens of the step, of those that are asked about."""
    found: list[int] = []
    end = 0
    for choice in chosen:
        end += choice.n_tokens
        found += range(end - choice.wanted, end)
    return found
