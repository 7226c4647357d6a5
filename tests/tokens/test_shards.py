"""Shards hold what was put in, in bounded memory; damage is seen."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder
from danlu.tokens.shards import Shards, ShardWriter


def write(folder: Path, documents: list[list[int]], vocab_size: int = 300) -> Shards:
    with atomic_folder(folder) as temporary:
        writer = ShardWriter(temporary, "text", vocab_size, "t")
        for ids in documents:
            writer.add(ids, None, 3 * len(ids))
        writer.close()
    return Shards(folder)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_what_goes_in_comes_out(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    documents = [[0, vocab_size - 1], [1], [5, 6, 7]]
    shards = write(tmp_path / "s", documents, vocab_size)
    assert [shards[n][0].tolist() for n in range(len(shards))] == documents
    assert shards.meta["dtype"] == dtype
    assert (shards.n_tokens, shards.n_supervised, shards.meta["text_bytes"]) == (6, 3, 18)


def test_another_id_mask_or_border_is_another_fingerprint(tmp_path: Path) -> None:
    contents = [[[1, 2], [3]], [[1, 2], [4]], [[1], [2, 3]]]
    prints = {write(tmp_path / str(n), c).fingerprint() for n, c in enumerate(contents)}
    assert len(prints) == 3


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.bin"])
def test_a_file_cut_short_is_damage(tmp_path: Path, file: str) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    path = tmp_path / "s" / file
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        Shards(tmp_path / "s")


def test_no_tokens_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokens in it"):
        write(tmp_path / "s", [])


def test_writing_and_reading_take_little_memory(tmp_path: Path) -> None:
    document = list(range(300)) * 20
    with atomic_folder(tmp_path / "s") as temporary:
        writer = ShardWriter(temporary, "text", 300, "t")
        tracemalloc.start()
        for _ in range(3000):
            writer.add(document)
        writer.close()
    shards = Shards(tmp_path / "s")
    total = sum(int(np.sum(shards[n][0])) for n in range(len(shards)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 3000 * sum(document)
    assert (tmp_path / "s" / "tokens.bin").stat().st_size == 36_000_000
    assert peak < 2_000_000
