"""Packing, by brute force: every pair once, documents apart, exact states, ranks that make one batch."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.loader import RANKS, Batch, PackedLoader, held_out_batches
from danlu.tokens.shards import Shards, ShardWriter

Document = tuple[list[int], list[bool]]

DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(1, 299), st.booleans()), min_size=2, max_size=40), min_size=1, max_size=25
)


def write(folder: Path, documents: list[Document], kind: str = "text") -> Shards:
    with atomic_folder(folder) as temporary:
        writer = ShardWriter(temporary, kind, 300, "t")
        for ids, mask in documents:
            writer.add(ids, mask if kind == "chat" else None, len(ids))
        writer.close()
    return Shards(folder)


def random_documents(count: int, longest: int, seed: int = 0) -> list[Document]:
    chance = np.random.default_rng(seed)
    sizes = chance.integers(2, longest + 1, count)
    return [(chance.integers(1, 300, n).tolist(), (chance.random(n) < 0.5).tolist()) for n in sizes]


def one_pass(loader: PackedLoader) -> list[Batch]:
    batches = []
    while loader.epoch == 0:
        batches.append(next(loader))
    return batches


def pairs(documents: list[Document], longest: int, kind: str) -> Counter[tuple[int, int, bool]]:
    """(input, target, learnt) of every document, straight from the definition.

    What loses its end and with it all that is to be learnt isn't there.
    """
    found: Counter[tuple[int, int, bool]] = Counter()
    for ids, mask in documents:
        learnt = mask if kind == "chat" else [True] * len(ids)
        cut = slice(0, longest) if kind == "chat" else slice(None)
        if len(ids) - 1 <= longest or any(learnt[1:][cut]):
            found.update(list(zip(ids[:-1], ids[1:], learnt[1:], strict=True))[cut])
    return found


def pairs_of(batches: list[Batch]) -> Counter[tuple[int, int, bool]]:
    found: Counter[tuple[int, int, bool]] = Counter()
    for batch in batches:
        real = batch.segments >= 0
        learnt = (batch.weights > 0)[real].tolist()
        found.update(zip(batch.ids[real].tolist(), batch.targets[real].tolist(), learnt, strict=True))
    return found


@pytest.mark.parametrize("kind", ["text", "chat"])
@given(documents=DOCUMENTS, length=st.integers(2, 30), batch_size=st.integers(1, 4), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_pair_is_lost_or_added(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    documents: list[list[tuple[int, bool]]],
    length: int,
    batch_size: int,
    seed: int,
) -> None:
    split = [([i for i, _ in d], [m for _, m in d]) for d in documents]
    shards = write(tmp_path_factory.mktemp("s") / "s", split, kind)
    expected = pairs(split, length, kind)
    batches = one_pass(PackedLoader(shards, batch_size, length, seed))
    assert pairs_of(batches) == expected
    assert sum(b.n_supervised for b in batches) == sum(n for (_, _, m), n in expected.items() if m)
    assert pairs_of(list(held_out_batches(shards, batch_size, length))) == expected


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_segments_are_contiguous_with_positions_from_zero(tmp_path: Path, kind: str) -> None:
    shards = write(tmp_path / "s", random_documents(40, 30), kind)
    documents = {tuple(shards[n][0].tolist()) for n in range(len(shards))}
    for batch in one_pass(PackedLoader(shards, 3, 24, seed=1)):
        for row in range(3):
            segments = batch.segments[row].tolist()
            names = [s for s in segments if s >= 0]
            assert names == sorted(names), "in order"
            assert segments[: len(names)] == names, "padding last"
            for segment in set(names):
                where = batch.segments[row] == segment
                assert batch.positions[row][where].tolist() == list(range(int(where.sum())))
                ids = batch.ids[row][where].tolist()
                text = (*ids, int(batch.targets[row][where][-1]))
                assert any(part_of(text, document, whole=kind == "chat") for document in documents)


def part_of(piece: tuple[int, ...], document: tuple[int, ...], whole: bool) -> bool:
    if whole:
        return document[:25] == piece
    return any(document[n : n + len(piece)] == piece for n in range(len(document)))


def test_conversations_are_whole_and_no_two_rows_fit_into_one(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", random_documents(400, 100), "chat")
    batches = one_pass(PackedLoader(shards, 1, 128, seed=1))
    assert sum(int(b.segments.max()) + 1 for b in batches) == len(shards)
    emptiest = sorted(b.n_tokens for b in batches)[:2]
    assert sum(emptiest) > 128, "what any-fit packing guarantees"


def test_truncated_conversations_are_counted_and_those_without_a_reply_left_out(tmp_path: Path) -> None:
    late = [False] * 17 + [True] * 13
    documents = [([1] * 10, [True] * 10), ([2] * 30, [True] * 30), ([3] * 30, late), ([4] * 17, [True] * 17)]
    loader = PackedLoader(write(tmp_path / "s", documents, "chat"), 1, 16)
    assert (loader.plan.truncated, loader.plan.left_out) == (1, 1)
    assert {int(batch.ids[0, 0]) for batch in one_pass(loader)} == {1, 2, 4}


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_state_continues_to_the_batch_also_over_passes(tmp_path: Path, kind: str) -> None:
    shards = write(tmp_path / "s", random_documents(30, 20), kind)
    whole = list(islice(PackedLoader(shards, 2, 16, seed=3), 40))
    for stop in (0, 1, 7, 23):
        first = PackedLoader(shards, 2, 16, seed=3)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        second = PackedLoader(shards, 2, 16, seed=3)
        second.load_state_dict(state)
        for ours, expected in zip(islice(second, 40 - stop), whole[stop:], strict=True):
            assert same(ours, expected)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 3}, {"sequence_length": 15}, {"data": 1}])
def test_a_state_of_other_data_or_packing_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    shards = write(tmp_path / "s", random_documents(30, 20))
    other = write(tmp_path / "other", random_documents(30, 20, seed=change.pop("data", 0)))
    settings: dict[str, Any] = {"batch_size": 2, "sequence_length": 16, "seed": 3}
    state = PackedLoader(shards, **settings).state_dict()
    with pytest.raises(UserError, match="the loader's state comes from"):
        PackedLoader(other, **(settings | change)).load_state_dict(state)


def test_the_ranks_batches_are_one_process_batch(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", random_documents(50, 20))
    whole = PackedLoader(shards, 6, 16, seed=2)
    ranks = [PackedLoader(shards, 2, 16, seed=2, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(25):
        expected, parts = next(whole), [next(rank) for rank in ranks]
        for name in vars(expected):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(expected, name))
        assert all(map(same, expected.split(3), parts))


def test_each_pass_has_an_order_of_its_own(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", random_documents(50, 20))
    loader = PackedLoader(shards, 2, 16, seed=2)
    passes: list[list[Batch]] = [[], []]
    while loader.epoch < 2:
        passes[loader.epoch].append(next(loader))
    assert pairs_of(passes[0]) == pairs_of(passes[1])
    assert not all(map(same, *passes))


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_packed_logits_equal_unpacked_ones(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=300, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=96)
    )
    shards = write(tmp_path / "s", random_documents(30, 40), kind)
    compared = 0
    for batch in one_pass(PackedLoader(shards, 2, 64, seed=5)):
        packed = model(batch.ids, batch.positions, batch.segments)
        for row in range(2):
            for segment in range(int(batch.segments[row].max()) + 1):
                where = batch.segments[row] == segment
                alone = model(batch.ids[row][where][None])
                assert (packed[row][where] - alone[0]).abs().max() < 1e-5
                compared += 1
    assert compared >= 30


def test_held_out_batches_keep_the_order(tmp_path: Path) -> None:
    documents = random_documents(20, 20)
    shards = write(tmp_path / "s", documents)
    batches = list(held_out_batches(shards, 2, 16))
    ids = [i for b in batches for i in b.ids[b.segments >= 0].tolist()]
    assert ids == [i for d, _ in documents for i in d[:-1]]


@pytest.mark.parametrize("length", [40, 64])
def test_replies_to_one_prompt_stand_in_one_row(tmp_path: Path, length: int) -> None:
    """Every group that fits is there once, whole, its replies in their order; the others are counted."""
    chance = np.random.default_rng(length)
    groups = [random_documents(int(chance.integers(2, 5)), 20, seed=n) for n in range(50)]
    with atomic_folder(tmp_path / "shards") as temporary:
        writer = ShardWriter(temporary, "preferences", 300, "t")
        for group in groups:
            for ids, mask in group:
                writer.add(ids, mask, len(ids))
            writer.add_group(len(group))
        writer.close()
    loader = PackedLoader(Shards(tmp_path / "shards"), 4, length)
    n_left_out = loader.plan.left_out
    found = []
    for batch in one_pass(loader):
        for row in range(4):
            segments = batch.segments[row]
            there = torch.unique_consecutive(segments[segments >= 0]).tolist()
            assert there == sorted(set(there))
            by_group: dict[int, list[Any]] = {}
            for segment in there:
                here = segments == segment
                assert batch.positions[row, here].tolist() == list(range(int(here.sum())))
                ids = [*batch.ids[row, here].tolist(), int(batch.targets[row, here][-1])]
                mask = (batch.weights[row, here] > 0).tolist()
                replies = by_group.setdefault(segment // RANKS, [])
                assert segment % RANKS == len(replies)
                replies.append((ids, mask))
            assert list(by_group) == list(range(len(by_group)))
            found += by_group.values()
    fitting = [group for group in groups if sum(len(ids) - 1 for ids, _ in group) <= length]
    assert sorted(found) == sorted([(ids, mask[1:]) for ids, mask in group] for group in fitting)
    assert n_left_out == len(groups) - len(fitting) > 0
