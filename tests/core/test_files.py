import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder, atomic_write, hash_file, hash_path, make_folder, read_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012
        file.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failed_folder_leaves_the_old_folder_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as new:
        (new / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as new:  # noqa: PT012
        (new / "weights").write_text("new")
        raise RuntimeError
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]
    with atomic_folder(path) as new:
        (new / "other").write_text("new")
    assert names(path) == ["other"]


def test_killed_while_writing_the_old_file_is_whole(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom danlu.core.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write('x' * 10_000_000); file.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.txt", "missing.txt: no such file"),
        ("file/a.txt", "file/a.txt: not a directory"),
        (".", "is a directory"),
    ],
)
def test_a_wrong_path_is_one_message(tmp_path, monkeypatch, path, expected) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match=expected):
        read_text(Path(path))


def test_a_file_where_a_folder_is_needed(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(UserError, match="file"):
            make_folder(path)


def test_wrong_encoding_names_the_line(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nbad \xff\n")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_text(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB; unmounted afterwards."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk) -> None:
    (small_disk / "a.txt").write_text("old")
    with (
        pytest.raises(UserError, match="no space left") as caught,
        atomic_write(small_disk / "a.txt") as file,
    ):
        file.write("x" * 200_000)
    assert "free some space" in caught.value.remedy
    assert (small_disk / "a.txt").read_text() == "old"
    assert names(small_disk) == ["a.txt"]
    with pytest.raises(UserError, match="no space left"), atomic_folder(small_disk / "model") as new:
        (new / "weights").write_bytes(bytes(200_000))
    assert names(small_disk) == ["a.txt"]


def test_hashes_are_those_of_hashlib(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    before = hash_path(tmp_path)
    os.utime(tmp_path / "a", (time.time(), 0))
    (tmp_path / ".hidden").write_text("x")
    assert hash_path(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_path(tmp_path) != before
