"""Which blocks of the key-value cache are taken, by whom, and what the full ones hold.

A sequence's tokens lie in blocks of equal size, in any order (Kwon et al. 2023, "PagedAttention").
A block that is full is remembered by all the tokens up to its end: another sequence that begins with them
uses it too. Nobody's blocks stay remembered until their place is needed, the longest unused one first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

RUN = 16
"""Blocks that are kept together for one sequence while there is room."""


class Full(Exception):
    """No block is free."""


@dataclass(frozen=True)
class Piece:
    """The next tokens of a sequence, of which `begin` are in the cache, and the blocks for all of them."""

    tokens: Sequence[int]
    begin: int
    blocks: Sequence[int]


@dataclass
class Table:
    """A sequence: its tokens, and the blocks that hold the first `computed` of them."""

    root: int
    """Which cache of prefixes it belongs to; content of another root (another adapter) is never shared."""
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    contents: list[int] = field(default_factory=list)
    """What identifies the tokens up to the end of each remembered block, from the first on."""
    forgotten: int = 0
    """Blocks at the front that a sliding window has left behind; their numbers are -1."""

    @property
    def pending(self) -> int:
        """Tokens that the model has yet to read."""
        return len(self.tokens) - self.computed


class Blocks:
    """Counts the owners of each block, and finds blocks by content."""

    def __init__(self, n_blocks: int, size: int) -> None:
        """`size`: tokens in a block."""
        self.n_blocks, self.size = n_blocks, size
        self.owners = [0] * n_blocks
        self.free = set(range(n_blocks))
        self.runs = dict.fromkeys(range(0, n_blocks, RUN))
        """Where `RUN` free blocks may lie in a row; some are no longer free."""
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Remembered blocks without an owner, the longest unused first."""
        self.by_content: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        """(content of the blocks before, tokens) -> (block, its own content): exact, not by a hash alone."""
        self.key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.last_content = 0

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self.free) + len(self.idle)

    @property
    def in_use(self) -> int:
        """Blocks with an owner: none, once every sequence has been freed."""
        return self.n_blocks - self.available

    def take(self, after: int = -1) -> int:
        """A block for one owner: the one that follows `after` if it is free, or one that others can follow.

        Raises Full. (A sequence whose blocks lie in a row is read up to three times as fast.)
        """
        if after >= 0 and after + 1 in self.free:
            block = after + 1
            self.free.remove(block)
        elif self.free:
            block = self._run() if self.runs else self.free.pop()
        elif self.idle:
            block, _ = self.idle.popitem(last=False)
            del self.by_content[self.key_of.pop(block)]
        else:
            raise Full
        self.owners[block] = 1
        return block

    def _run(self) -> int:
        """The first block of a free run, where there is one."""
        while self.runs:
            begin, _ = self.runs.popitem()
            if self._is_run(begin):
                self.free.remove(begin)
                return begin
        return self.free.pop()

    def _is_run(self, begin: int) -> bool:
        return all(block in self.free for block in range(begin, min(begin + RUN, self.n_blocks)))

    def _give(self, block: int) -> None:
        self.free.add(block)
        begin = block // RUN * RUN
        if self._is_run(begin):
            self.runs[begin] = None

    def share(self, block: int) -> int:
        """One more owner."""
        self.owners[block] += 1
        self.idle.pop(block, None)
        return block

    def release(self, block: int) -> None:
        """One owner less."""
        self.owners[block] -= 1
        if self.owners[block] == 0:
            if block in self.key_of:
                self.idle[block] = None
            else:
                self._give(block)

    def is_writable(self, block: int) -> bool:
        """Whether nobody else reads it, now or later."""
        return self.owners[block] == 1 and block not in self.key_of

    def find(self, content: int, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The block that holds `tokens` behind `content`, and the content with it."""
        return self.by_content.get((content, tuple(tokens)))

    def remember(self, block: int, content: int, tokens: Sequence[int]) -> int:
        """Makes a full block findable; returns the content with it. Of two equal blocks one is remembered."""
        key = (content, tuple(tokens))
        if key in self.by_content:
            return self.by_content[key][1]
        self.last_content += 1
        self.by_content[key] = block, self.last_content
        self.key_of[block] = key
        return self.last_content

    def forget(self) -> None:
        """Makes nothing findable any more: the weights have changed."""
        for block in self.idle:
            self._give(block)
        self.idle.clear()
        self.by_content.clear()
        self.key_of.clear()


class Tables:
    """The sequences of an engine, on one set of blocks."""

    def __init__(
        self, blocks: Blocks, window: int = 0, shares: bool = True, first: int = 0, step: int = 1
    ) -> None:
        """`window`: tokens that any layer's query sees, 0 = all; `shares`: whether prefixes are looked up.

        Sequences are numbered `first`, `first` + `step` …
        """
        self.blocks, self.window, self.shares = blocks, window, shares
        self.tables: dict[int, Table] = {}
        self.next, self.step = first, step
        self.copies: list[tuple[int, int]] = []
        """Blocks whose content has to be copied before the next write: from, to."""

    def open(self, root: int = 0) -> int:
        number, self.next = self.next, self.next + self.step
        self.tables[number] = Table(-root)
        return number

    def fork(self, sequence: int) -> int:
        old = self.tables[sequence]
        new = self.open(-old.root)
        blocks = [self.blocks.share(block) if block >= 0 else block for block in old.blocks]
        self.tables[new] = Table(
            old.root, [*old.tokens], blocks, old.computed, [*old.contents], old.forgotten
        )
        return new

    def cut(self, sequence: int, length: int) -> None:
        table = self.tables[sequence]
        del table.tokens[length:]
        if table.computed > length:
            self._shrink(table, length)

    def free(self, sequence: int) -> None:
        self._shrink(self.tables.pop(sequence), 0)

    def drop(self, sequence: int) -> None:
        """Gives the blocks back and keeps the tokens, which are read again later."""
        self._shrink(self.tables[sequence], 0)

    def _shrink(self, table: Table, length: int) -> None:
        size = self.blocks.size
        kept = -(-length // size)
        if kept <= table.forgotten:  # what a window has left behind is not there to go on from
            kept = length = 0
        # From the end, so that the front of a prefix stays remembered longest.
        for block in reversed(table.blocks[kept:]):
            if block >= 0:
                self.blocks.release(block)
        del table.blocks[kept:]
        del table.contents[length // size :]
        table.computed = length
        table.forgotten = min(table.forgotten, kept)

    # One step of the model

    def match(self, sequence: int, wanted: int = 1) -> None:
        """Takes over what other sequences have computed of the pending tokens, but for the last `wanted`."""
        table = self.tables[sequence]
        while (key := self.next_key(sequence, wanted)) is not None:
            found = self.blocks.find(*key)
            if found is None:
                return
            table.blocks.append(self.blocks.share(found[0]))
            table.contents.append(found[1])
            table.computed += self.blocks.size

    def next_key(self, sequence: int, wanted: int = 1) -> tuple[int, tuple[int, ...]] | None:
        """What identifies the next block, where it is whole and holds none of the last `wanted` tokens."""
        table, size = self.tables[sequence], self.blocks.size
        if not self.shares or not self._is_aligned(table) or table.pending < size + wanted:
            return None
        return self._content(table), tuple(table.tokens[table.computed : table.computed + size])

    def blocks_needed(self, sequence: int, n_tokens: int) -> int:
        """Blocks to be taken before `n_tokens` more can be written."""
        table, size = self.tables[sequence], self.blocks.size
        needed = -(-(table.computed + n_tokens) // size) - len(table.blocks)
        return needed + self._must_copy(table)

    def make_room(self, sequence: int, n_tokens: int) -> None:
        """Takes the blocks for `n_tokens` more. Raises Full, where nothing has been taken."""
        if self.blocks_needed(sequence, n_tokens) > self.blocks.available:
            raise Full
        table, size = self.tables[sequence], self.blocks.size
        if self._must_copy(table):
            shared, own = table.blocks[-1], self.blocks.take(*table.blocks[-2:-1])
            self.copies.append((shared, own))
            self.blocks.release(shared)
            table.blocks[-1] = own
        while len(table.blocks) * size < table.computed + n_tokens:
            table.blocks.append(self.blocks.take(*table.blocks[-1:]))

    def piece(self, sequence: int, n_tokens: int) -> Piece:
        """What the model reads next."""
        table = self.tables[sequence]
        tokens = table.tokens[table.computed : table.computed + n_tokens]
        return Piece(tokens, table.computed, table.blocks)

    def wrote(self, sequence: int, n_tokens: int) -> None:
        """Counts tokens that the model has read, remembers full blocks, forgets what no window reaches."""
        table, size = self.tables[sequence], self.blocks.size
        table.computed += n_tokens
        while self.shares and len(table.contents) < table.computed // size:
            number = len(table.contents)
            tokens = table.tokens[number * size : (number + 1) * size]
            before = table.contents[-1] if table.contents else table.root
            table.contents.append(self.blocks.remember(table.blocks[number], before, tokens))
        # The next query is at `computed`; it sees `window` tokens with itself.
        while self.window and (table.forgotten + 1) * size <= table.computed + 1 - self.window:
            self.blocks.release(table.blocks[table.forgotten])
            table.blocks[table.forgotten] = -1
            table.forgotten += 1

    def _is_aligned(self, table: Table) -> bool:
        return table.computed == len(table.contents) * self.blocks.size

    def _content(self, table: Table) -> int:
        return table.contents[-1] if table.contents else table.root

    def _must_copy(self, table: Table) -> bool:
        return table.computed % self.blocks.size > 0 and not self.blocks.is_writable(table.blocks[-1])
