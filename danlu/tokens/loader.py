"""Documents packed into sequences: block-diagonal segments, restarted positions, exact state.

A document of n tokens is n - 1 pairs (input, target). Text fills sequences as a stream: a document that is
cut at a sequence's end goes on in the next one as a segment of its own, and no pair is lost. Conversations
are packed whole, best fit; one that is longer than a sequence is truncated, and left out where nothing to
learn is left of it; both are counted. The replies of a preference are packed together, each behind its
prompt; those that don't fit in a sequence are left out.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.tokens.shards import Shards


@dataclass
class Batch:
    """What one forward pass reads; all (B, T)."""

    ids: Tensor
    """int64"""
    targets: Tensor
    """int64, the token after each of `ids`"""
    weights: Tensor
    """float32; 0 = the target isn't learnt"""
    positions: Tensor
    """int64, from 0 in each segment"""
    segments: Tensor
    """int32, one number a segment, -1 = padding; of preferences RANKS · number of the prompt + rank"""

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, f.name).to(device) for f in fields(self)))

    def split(self, n: int) -> list[Self]:
        """n batches of B / n sequences each."""
        parts = zip(*(getattr(self, f.name).chunk(n) for f in fields(self)), strict=True)
        return [type(self)(*part) for part in parts]

    @property
    def n_tokens(self) -> int:
        """Tokens that aren't padding."""
        return int((self.segments >= 0).sum())

    @property
    def n_supervised(self) -> int:
        return int((self.weights > 0).sum())


Piece = tuple[int, int, int, int]
"""(document, first pair, pairs, segment)."""
RANKS = 64
"""Most replies to one prompt; see `Batch.segments`."""


class PackedLoader:
    """Endless batches over the shards, one shuffled pass after another.

    With `world_size` processes each gets `batch_size` sequences of every batch; together they are what one
    process with `world_size · batch_size` would get. The last batch of a pass may be padded.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.shards, self.batch_size, self.sequence_length = shards, batch_size, sequence_length
        self.seed, self.rank, self.world_size, self.shuffle = seed, rank, world_size, shuffle
        self.epoch = 0
        self._batch = 0
        self._plan: _Plan | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    @property
    def plan(self) -> "_Plan":
        """The rows of this pass."""
        if self._plan is None:
            preferences = self.shards.kind == "preferences"
            order = np.arange(len(self.shards.groups) - 1 if preferences else len(self.shards))
            if self.shuffle:
                order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
            self._plan = PLANS[self.shards.kind](self.shards, order, self.sequence_length)
        return self._plan

    @property
    def note(self) -> str:
        """What a run should be told about this pass."""
        plan, longer = self.plan, f"longer than sequence_length {self.sequence_length}"
        parts = []
        if plan.truncated:
            parts.append(f"{plan.truncated:,} lose their end")
        if plan.left_out and self.shards.kind == "preferences":
            return f"replies to one prompt that are together {longer}: {plan.left_out:,} prompts are left out"
        if plan.left_out:
            parts.append(f"{plan.left_out:,} are left out, since no reply begins before that")
        return f"conversations {longer}: {', '.join(parts)}" if parts else ""

    def __next__(self) -> Batch:
        plan = self.plan
        first = (self._batch * self.world_size + self.rank) * self.batch_size
        rows = [plan.row(number) for number in range(first, first + self.batch_size)]
        self._batch += 1
        if self._batch * self.world_size * self.batch_size >= plan.n_rows:
            self.epoch, self._batch, self._plan = self.epoch + 1, 0, None
        return _assemble(self.shards, rows, self.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from. Small, and JSON."""
        return {
            "data": self.shards.fingerprint(),
            "epoch": self.epoch,
            "batch": self._batch,
            "seed": self.seed,
            "sequences": self.batch_size * self.world_size,
            "sequence_length": self.sequence_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues there, to the batch. Raises UserError where data or packing differ."""
        ours = self.state_dict()
        for key in ("data", "seed", "sequences", "sequence_length"):
            if state[key] != ours[key]:
                what = "other data" if key == "data" else f"{key} {state[key]}, now {ours[key]}"
                raise UserError(
                    f"{self.shards.folder}: the loader's state comes from {what}",
                    "resume with the same data and settings, or start a new run",
                )
        self.epoch, self._batch, self._plan = state["epoch"], state["batch"], None


def held_out_batches(shards: Shards, batch_size: int, sequence_length: int) -> Iterator[Batch]:
    """One pass in order; every pair once (whole conversations: up to the sequence's length)."""
    loader = PackedLoader(shards, batch_size, sequence_length, shuffle=False)
    while loader.epoch == 0:
        yield next(loader)


class _Plan(ABC):
    """The rows of one pass."""

    n_rows: int
    truncated: int = 0
    """Conversations that lose their end …"""
    left_out: int = 0
    """… and those of which nothing to learn is left, so that they are not in it."""

    @abstractmethod
    def row(self, number: int) -> list[Piece]:
        """Empty beyond the last row."""


class _StreamPlan(_Plan):
    """Row r is the pairs r·T … (r+1)·T of all documents one after another."""

    def __init__(self, shards: Shards, order: np.ndarray, length: int) -> None:
        self.order, self.length = order, length
        pairs = np.maximum(np.diff(shards.offsets)[order] - 1, 0)
        self.starts = np.concatenate(([0], np.cumsum(pairs)))
        self.n_rows = -(-int(self.starts[-1]) // length)

    def row(self, number: int) -> list[Piece]:
        position, end = number * self.length, min((number + 1) * self.length, int(self.starts[-1]))
        index = int(np.searchsorted(self.starts, position, side="right")) - 1
        pieces: list[Piece] = []
        while position < end:
            stop = min(int(self.starts[index + 1]), end)
            if stop > position:
                first = position - int(self.starts[index])
                pieces.append((int(self.order[index]), first, stop - position, len(pieces)))
            position, index = max(stop, position), index + 1
        return pieces


class BestFit:
    """Rows of so many places; what is added goes into the fullest one that still has room for it."""

    def __init__(self, length: int) -> None:
        self.length, self.n_rows = length, 0
        self._room: list[tuple[int, int]] = []  # (places left, row), sorted

    def add(self, size: int) -> int:
        """The number of its row, which may be the next one."""
        slot = bisect_left(self._room, (size, -1))
        if slot < len(self._room):
            left, row = self._room.pop(slot)
        else:
            left, row = self.length, self.n_rows
            self.n_rows += 1
        if left > size:
            insort(self._room, (left - size, row))
        return row


class _FitPlan(_Plan):
    """Documents that are not cut."""

    def __init__(self, length: int) -> None:
        self.fit = BestFit(length)
        self.rows: list[list[Piece]] = []

    def add(self, pairs: int) -> list[Piece]:
        """The row with room for so many pairs."""
        row = self.fit.add(pairs)
        if row == len(self.rows):
            self.rows.append([])
        return self.rows[row]

    @property
    def n_rows(self) -> int:  # type: ignore[override]
        return len(self.rows)

    def row(self, number: int) -> list[Piece]:
        return self.rows[number] if number < self.n_rows else []


class _WholePlan(_FitPlan):
    """Conversations."""

    def __init__(self, shards: Shards, order: np.ndarray, length: int) -> None:
        super().__init__(length)
        lengths = np.diff(shards.offsets)
        for document in order.tolist():
            pairs = int(lengths[document]) - 1
            if pairs > length:
                pairs = length
                if not shards[document][1][1 : pairs + 1].any():
                    self.left_out += 1
                    continue
                self.truncated += 1
            if pairs <= 0:
                continue
            row = self.add(pairs)
            row.append((document, 0, pairs, len(row)))


class _GroupPlan(_FitPlan):
    """Preferences: the replies to one prompt stand in one row."""

    def __init__(self, shards: Shards, order: np.ndarray, length: int) -> None:
        super().__init__(length)
        pairs = np.diff(shards.offsets) - 1
        for group in order.tolist():
            documents = range(int(shards.groups[group]), int(shards.groups[group + 1]))
            total = int(pairs[documents.start : documents.stop].sum())
            if total > length:
                self.left_out += 1
                continue
            row = self.add(total)
            first = RANKS * (row[-1][3] // RANKS + 1) if row else 0
            row += [
                (document, 0, int(pairs[document]), first + rank) for rank, document in enumerate(documents)
            ]


PLANS: dict[str, type[_StreamPlan] | type[_WholePlan] | type[_GroupPlan]] = {
    "text": _StreamPlan,
    "chat": _WholePlan,
    "preferences": _GroupPlan,
}


def _assemble(shards: Shards, rows: list[list[Piece]], length: int) -> Batch:
    shape = (len(rows), length)
    ids, targets, positions = (np.zeros(shape, np.int64) for _ in range(3))
    weights, segments = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    for r, pieces in enumerate(rows):
        at = 0
        for document, first, pairs, segment in pieces:
            tokens, mask = shards[document]
            here = slice(at, at + pairs)
            ids[r, here] = tokens[first : first + pairs]
            targets[r, here] = tokens[first + 1 : first + pairs + 1]
            weights[r, here] = mask[first + 1 : first + pairs + 1]
            positions[r, here] = np.arange(pairs)
            segments[r, here] = segment
            at += pairs
        positions[r, at:] = np.arange(length - at)
    return Batch(*(torch.from_numpy(a) for a in (ids, targets, weights, positions, segments)))
