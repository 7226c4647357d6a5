"""Replies that the policy draws, their rewards, and the packed batches that it learns from."""

import base64
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.align.config import Drawing, RLConfig
from danlu.align.rewards import Reply, SummedReward
from danlu.core.errors import UserError
from danlu.data.conversations import Messages, check_messages
from danlu.data.documents import read_rows
from danlu.data.prepare import PARTS
from danlu.generate.engine import Completion, Engine
from danlu.generate.sampling import SamplingParams
from danlu.model import parallel
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render_prompt
from danlu.tokens.loader import Batch, BestFit, PackedLoader
from danlu.tokens.tokenizer import Tokenizer


@dataclass
class RolloutBatch(Batch):
    """A batch whose targets that count are the tokens of replies; all further fields (B, T) float32."""

    advantages: Tensor
    engine: Tensor
    """Log-probabilities as the engine computed them that drew the replies"""
    old: Tensor
    """The same as the trainer computes them; the engine's where they are those of the only update"""
    reference: Tensor
    """Log-probabilities under the reference; 0 without one"""
    values: Tensor
    """What a value head expected of each token's state; 0 without one"""
    returns: Tensor
    """What came of it"""
    text: Tensor
    """Of text that is learnt beside the replies: each target's share of all of it in an update"""

    def beside(self, text: Batch) -> "RolloutBatch":
        """This batch with rows of text below it. All processes ask together."""
        n = parallel.sum_over_ranks([float(text.weights.sum())])[0]
        zeros = torch.zeros_like(text.weights)
        below = RolloutBatch(
            **vars(text) | {"weights": zeros, "text": text.weights / n}, **dict.fromkeys(OF_REPLIES, zeros)
        )
        return RolloutBatch(
            **{name: torch.cat((value, vars(below)[name])) for name, value in vars(self).items()}
        )


OF_REPLIES = ("advantages", "engine", "old", "reference", "values", "returns")


Places = list[list[tuple[int, int, int]]]
"""Of each packed row (number of the reply, begin, end): where the targets stand that are its tokens."""


@dataclass(frozen=True)
class Drawn:
    """One reply: ids of its prompt and of itself, with the token that ends it, and its reward."""

    prompt: list[int]
    ids: list[int]
    reply: Reply
    reward: float
    log_probs: list[float]
    """Under the engine that drew it"""
    parts: tuple[float, ...] = ()
    """What the parts of its reward are"""

    @property
    def pair(self) -> tuple[list[int], list[int]]:
        return self.prompt, self.ids


class Prompts:
    """The prompts that a policy learns from, and those held out.

    From the output folder of `danlu data prepare`, with its two parts, or from a JSONL file, which is split.
    A conversation is a prompt up to its last reply, and that reply the answer. Rows of a folder in which
    nobody asks, such as texts, are left out, and so is what leaves no room for a reply.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, config: Drawing) -> None:
        """Raises UserError for a row without a prompt."""
        self.held_out: list[int] = []
        self.train: list[int] = []
        self.rows: list[tuple[Messages, dict[str, Any], list[int]]] = []
        self.unasked = self.left_out = 0
        digest, room = hashlib.sha256(), config.sequence_length - config.max_tokens
        for part, messages, row in read_prompts(path, config):
            if not messages:
                self.unasked += 1
                continue
            ids = render_prompt(messages, tokenizer)
            if len(ids) > room:
                self.left_out += 1
                continue
            digest.update(f"{part}{messages!r}{row!r}".encode())
            (self.train if part == "train" else self.held_out).append(len(self.rows))
            self.rows.append((messages, row, ids))
        if not self.train:
            said = f"; {self.left_out} are longer than {room} tokens" if self.left_out else ""
            said += f"; in {self.unasked} nobody asks" if self.unasked else ""
            raise UserError(
                f"{path}: no prompt to learn from{said}", "give more prompts, or raise sequence_length"
            )
        self.held_out = self.held_out[: config.held_out_prompts]
        self.sha256 = digest.hexdigest()

    @property
    def note(self) -> str:
        """How many were left out; nothing where none was."""
        every, said = self.unasked + self.left_out + len(self.rows), []
        if self.left_out:
            said.append(
                f"{self.left_out:,} of {every:,} prompts leave no room for a reply within sequence_length"
            )
        if self.unasked:
            said.append(f"in {self.unasked:,} of {every:,} rows nobody asks")
        return f"{', '.join(said)}: left out" if said else ""

    def order(self, seed: int, epoch: int) -> list[int]:
        """The training prompts of one pass."""
        return np.random.default_rng([seed, epoch]).permutation(self.train).tolist()


def read_prompts(path: Path, config: Drawing) -> Iterator[tuple[str, Messages, dict[str, Any]]]:
    """(part, prompt, row) of each prompt; an empty prompt where in a folder nobody asks. Raises UserError."""
    if path.is_dir():
        for part in PARTS:
            file = path / f"{part}.jsonl.zst"
            for number, row in read_rows(file):
                where = f"{file}, line {number}"
                is_text = isinstance(row, dict) and "text" in row and not row.keys() & {"messages", "prompt"}
                messages, row = ([], row) if is_text else _prompt(row, where)
                yield part, messages if _asks(messages) else [], row
        return
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        messages, row = _prompt(row, where)
        if not _asks(messages):
            raise UserError(f"{where}: nobody asks in it", "end a prompt with the user's turn")
        key = hashlib.blake2b(repr(messages).encode(), digest_size=8, key=str(config.seed).encode()).digest()
        yield (
            "held_out" if int.from_bytes(key, "big") / 2**64 < config.held_out else "train",
            messages,
            row,
        )


def _prompt(row: Any, where: str) -> tuple[Messages, dict[str, Any]]:
    """The prompt, and the row with the answer in it where the conversation has one."""
    prompt = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}], row
    if not isinstance(prompt, list):
        raise UserError(f'{where}: no "prompt" in it', "a text, or a list of messages")
    messages = check_messages(prompt, where)
    if messages[-1]["role"] == "assistant" and "messages" in row:
        *messages, last = messages
        row = {"answer": last["content"], **row}
    return messages, row


def _asks(messages: Messages) -> bool:
    return bool(messages) and messages[-1]["role"] in ("user", "tool")


class Drawer:
    """Draws replies from the policy as it is now, by one engine that keeps up with it."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, config: Drawing, reward: SummedReward
    ) -> None:
        self.engine, self.tokenizer = Engine(model, tokenizer, dtype=config.rollout_dtype), tokenizer
        self.config, self.reward = config, reward
        self.seconds: dict[str, float] = {}
        """What the last draw took here."""

    def draw(
        self, rows: Sequence[tuple[Messages, dict[str, Any], list[int]]], n: int, seed: int
    ) -> list[Drawn]:
        """`n` replies to each prompt, one prompt's after the other's.

        Each process draws those to its part of the prompts; all get them all.
        """
        rank, size = parallel.rank(), parallel.world_size()
        first = list(range(0, len(rows) * n, n))  # a reply's draws hang on its place only
        shares = parallel.gather(self._draw(rows[rank::size], n, seed, first[rank::size]))
        return [
            one
            for number in range(len(rows))
            for one in shares[number % size][number // size * n : (number // size + 1) * n]
        ]

    def _draw(
        self,
        rows: Sequence[tuple[Messages, dict[str, Any], list[int]]],
        n: int,
        seed: int,
        first: Sequence[int],
    ) -> list[Drawn]:
        begin = time.monotonic()
        config = self.config
        prompts = [ids for _, _, ids in rows for _ in range(n)]
        params = [
            SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=seed * 1_000_003 + place + number,
            )
            for place in first
            for number in range(n)
        ]
        found = self.engine.generate(prompts, params)
        middle = time.monotonic()
        replies = [
            self._reply(messages, row, completion)
            for (messages, row, _), completion in zip(
                [row for row in rows for _ in range(n)], found, strict=True
            )
        ]
        parts = self.reward.parts(replies)
        self.seconds = {
            "generation_seconds": middle - begin,
            "reward_seconds": time.monotonic() - middle,
        }
        return [
            Drawn(prompt, completion.ids, reply, self.reward.total(own), completion.logprobs, own)
            for prompt, completion, reply, own in zip(prompts, found, replies, parts, strict=True)
        ]

    def _reply(self, messages: Messages, row: dict[str, Any], completion: Completion) -> Reply:
        text = self.engine.text(messages, [i for i in completion.ids if i not in self.tokenizer.stop_ids])
        return Reply(messages, text, row, completion.finish_reason == "stop")


def pack(pairs: Sequence[tuple[list[int], list[int]]], length: int) -> tuple[Batch, Places]:
    """Pairs of a prompt and a reply packed, best fit; the tokens of the replies count."""
    fit = BestFit(length)
    rows: Places = []
    used: list[int] = []
    for number, (prompt, reply) in enumerate(pairs):
        size = len(prompt) + len(reply) - 1
        row = fit.add(size)
        if row == len(rows):
            rows.append([])
            used.append(0)
        begin = used[row] + len(prompt) - 1
        rows[row].append((number, begin, begin + len(reply)))
        used[row] += size
    shape = (len(rows), length)
    ids, targets, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    weights, segments = torch.zeros(shape), torch.full(shape, -1, dtype=torch.int32)
    for row, places in enumerate(rows):
        at = 0
        for segment, (number, begin, end) in enumerate(places):
            whole = torch.tensor([token for part in pairs[number] for token in part])
            here = slice(at, at + len(whole) - 1)
            ids[row, here], targets[row, here] = whole[:-1], whole[1:]
            positions[row, here], segments[row, here] = torch.arange(len(whole) - 1), segment
            weights[row, begin:end] = 1
            at = here.stop
        positions[row, at:] = torch.arange(length - at)
    return Batch(ids, targets, weights, positions, segments), rows


Finish = Callable[[Sequence[Drawn]], tuple[list[RolloutBatch], dict[str, float]]]
"""From the replies of one rollout to the batches of its updates, and what is to be said of the rollout."""


class RolloutLoader:
    """Endless batches, as `PackedLoader`'s: when those of a rollout are used up, the policy draws again."""

    def __init__(
        self,
        prompts: Prompts,
        drawer: Drawer,
        finish: Finish,
        config: RLConfig,
        text: PackedLoader | None = None,
    ) -> None:
        self.prompts, self.drawer, self.finish, self.config = prompts, drawer, finish, config
        self.text = text
        self.epoch = self._begin = self.rollouts = 0
        self._left: list[RolloutBatch] = []
        self.last: list[Drawn] = []
        self.figures: dict[str, float] = {}

    @property
    def note(self) -> str:
        """What is said when a run begins."""
        return self.prompts.note

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._left:
            self.last = self.drawer.draw(self._next_prompts(), self.config.group_size, self.rollouts + 1)
            self.rollouts += 1
            self._left, figures = self.finish(self.last)
            self.figures = {**figures, **self.drawer.seconds}
        batch = self._left.pop(0)
        return batch if self.text is None else batch.beside(next(self.text).to(batch.ids.device))

    def _next_prompts(self) -> list[Any]:
        found: list[int] = []
        while len(found) < self.config.batch_size:
            order = self.prompts.order(self.config.seed, self.epoch)
            some = order[self._begin : self._begin + self.config.batch_size - len(found)]
            found += some
            self._begin += len(some)
            if self._begin >= len(order):
                self.epoch, self._begin = self.epoch + 1, 0
        return [self.prompts.rows[number] for number in found]

    def state_dict(self) -> dict[str, Any]:
        """With the batches that are left: the policy that drew them is no longer there."""
        file = io.BytesIO()
        torch.save([vars(batch) for batch in self._left], file)
        left = parallel.gather(base64.b64encode(file.getvalue()).decode() if self._left else "")
        return {
            "epoch": self.epoch,
            "begin": self._begin,
            "rollouts": self.rollouts,
            "left": left,
            "figures": self.figures,
            "text": None if self.text is None else self.text.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._begin, self.rollouts = state["epoch"], state["begin"], state["rollouts"]
        self._left, self.figures = [], state["figures"]
        if self.text is not None:
            self.text.load_state_dict(state["text"])
        if len(state["left"]) != parallel.world_size() and any(state["left"]):
            raise UserError(
                f"{self.config.out} was left within a rollout by {len(state['left'])} processes",
                "resume it with as many",
            )
        if any(state["left"]):
            file = io.BytesIO(base64.b64decode(state["left"][parallel.rank()]))
            self._left = [RolloutBatch(**fields) for fields in torch.load(file, weights_only=True)]
