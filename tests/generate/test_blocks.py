"""The bookkeeping of the cache, against sequences that are kept whole."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from danlu.generate.blocks import Blocks, Full, Tables

SIZE = 4
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=11)


class Machine(RuleBasedStateMachine):
    """A cache whose slots hold, for each token, all the tokens up to it: what keys and values hang on."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables(Blocks(24, SIZE))
        self.whole: dict[int, list[int]] = {}
        self.roots: dict[int, int] = {}
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(target=sequences, root=st.integers(0, 1))
    def open(self, root: int) -> int:
        number = self.tables.open(root)
        self.whole[number], self.roots[number] = [], root
        return number

    @rule(target=sequences, old=sequences)
    def fork(self, old: int) -> int:
        number = self.tables.fork(old)
        self.whole[number], self.roots[number] = [*self.whole[old]], self.roots[old]
        return number

    @rule(sequence=sequences, length=st.integers(0, 30))
    def cut(self, sequence: int, length: int) -> None:
        length = min(length, len(self.whole[sequence]))
        self.tables.cut(sequence, length)
        del self.whole[sequence][length:]

    @rule(sequence=consumes(sequences))
    def free(self, sequence: int) -> None:
        self.tables.free(sequence)
        del self.whole[sequence], self.roots[sequence]

    @rule(sequence=sequences)
    def drop(self, sequence: int) -> None:
        self.tables.drop(sequence)

    @rule(sequence=sequences, new=tokens, wanted=st.integers(1, 3), at_once=st.integers(1, 9))
    def feed(self, sequence: int, new: list[int], wanted: int, at_once: int) -> None:
        self.whole[sequence] += new
        self.tables.tables[sequence].tokens += new
        table = self.tables.tables[sequence]
        while table.pending:
            self.tables.match(sequence, wanted)
            n = min(at_once, table.pending)
            try:
                self.tables.make_room(sequence, n)
            except Full:
                assert self.tables.blocks.available < self.tables.blocks_needed(sequence, n)
                return
            for old, copy in self.tables.copies:
                for slot in range(SIZE):
                    self.cache[copy, slot] = self.cache.get((old, slot), ())
            self.tables.copies.clear()
            piece = self.tables.piece(sequence, n)
            assert list(piece.tokens) == self.whole[sequence][piece.begin : piece.begin + n]
            for position in range(piece.begin, piece.begin + n):
                block = piece.blocks[position // SIZE]
                assert self.tables.blocks.is_writable(block)
                seen = (self.roots[sequence], *self.whole[sequence][: position + 1])
                self.cache[block, position % SIZE] = seen
            self.tables.wrote(sequence, n)

    @invariant()
    def every_slot_holds_its_prefix(self) -> None:
        for number, whole in self.whole.items():
            table = self.tables.tables[number]
            assert table.tokens == whole
            for position in range(table.computed):
                expected = (self.roots[number], *whole[: position + 1])
                assert self.cache[table.blocks[position // SIZE], position % SIZE] == expected

    @invariant()
    def owners_are_counted(self) -> None:
        blocks = self.tables.blocks
        held = [block for table in self.tables.tables.values() for block in table.blocks]
        assert all(blocks.owners[block] == held.count(block) for block in range(blocks.n_blocks))
        assert blocks.in_use == len(set(held))
        assert sorted([*blocks.free, *blocks.idle, *set(held)]) == list(range(blocks.n_blocks))


TestBlocks = Machine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_window_leaves_blocks_behind() -> None:
    tables = Tables(Blocks(5, SIZE), window=6)
    number = tables.open()
    for token in range(60):
        tables.tables[number].tokens.append(token)
        tables.make_room(number, 1)
        tables.wrote(number, 1)
        held = [block for block in tables.tables[number].blocks if block >= 0]
        first_seen = max(0, token + 2 - 6)
        assert len(held) == token // SIZE - first_seen // SIZE + 1
    tables.free(number)
    assert tables.blocks.in_use == 0


def test_what_is_remembered_longest_ago_goes_first() -> None:
    tables = Tables(Blocks(4, SIZE))
    for start in (0, 10, 20):
        number = tables.open()
        tables.tables[number].tokens += [start] * SIZE + [1]
        tables.make_room(number, SIZE + 1)
        tables.wrote(number, SIZE + 1)
        tables.free(number)
    found = []
    for start in (0, 10, 20):
        number = tables.open()
        tables.tables[number].tokens += [start] * SIZE + [1]
        tables.match(number)
        found.append(tables.tables[number].computed)
    assert found == [SIZE, SIZE, SIZE]
    other = tables.open()
    tables.tables[other].tokens += [7] * (2 * SIZE)
    with pytest.raises(Full):
        tables.make_room(other, 2 * SIZE)
