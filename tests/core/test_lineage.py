"""What made a run, and whether it is still as it was: on a real run, before and after something changes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from danlu.core.errors import UserError
from danlu.core.lineage import Node, lineage, show
from danlu.core.options import PathConfig

RUN = Path("runs/tiny")


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of the tiny run, times of the files included."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def nodes(path: Path | str = RUN) -> dict[str, Node]:
    """{name: node} of everything that the path was made of."""
    return {Path(n.path).name: n for result in lineage(PathConfig(path=Path(path))) for n in result.walk()}


def not_as_they_were(path: Path | str = RUN) -> dict[str, list[str]]:
    return {name: node.changed for name, node in nodes(path).items() if node.changed}


def test_the_tree_of_a_run_is_its_recipe(here: Path) -> None:
    (scores,) = lineage(PathConfig(path=RUN))
    found = {n.path: {option: s.path for option, s in n.inputs.items()} for n in scores.walk()}
    run = "runs/tiny/"
    assert found == {
        "chats.jsonl": {},
        f"{run}data": {"source": "chats.jsonl"},
        f"{run}tokenizer": {"data": f"{run}data"},
        f"{run}text-tokens": {"data": f"{run}data", "tokenizer": f"{run}tokenizer"},
        f"{run}chat-tokens": {"data": f"{run}data", "tokenizer": f"{run}tokenizer"},
        f"{run}pretrain": {"data": f"{run}text-tokens"},
        f"{run}chat": {"data": f"{run}chat-tokens", "init_from": f"{run}pretrain"},
        f"{run}scores": {
            "model": f"{run}pretrain",
            "data": f"{run}data",
            "chat_model": f"{run}chat",
            "chat_data": f"{run}chat-tokens",
        },
    }
    states = {node.state for node in scores.walk() if node.verb}
    assert states == {"as it was"}
    source = next(node for node in scores.walk() if node.verb is None)
    assert source.sha256 == hashlib.sha256(Path("chats.jsonl").read_bytes()).hexdigest()


def test_recorded_hashes_are_those_of_the_files(here: Path) -> None:
    for folder in RUN.iterdir():
        if folder.is_dir():
            recorded = json.loads((folder / "lineage.json").read_text())["outputs"]
            for name, facts in recorded.items():
                raw = (folder / name).read_bytes()
                assert facts["sha256"] == hashlib.sha256(raw).hexdigest()
                assert facts["bytes"] == len(raw)


def test_a_changed_file_is_named_and_so_is_what_was_made_of_it(here: Path) -> None:
    with open(RUN / "text-tokens/train/tokens.bin", "r+b") as file:
        file.write(b"\xff")
    assert not_as_they_were() == {
        "text-tokens": ["train/tokens.bin was changed"],
        "pretrain": ["data is not what it was made from"],
    }


def test_also_where_size_and_time_are_as_before(here: Path) -> None:
    weights = RUN / "chat/model/model.safetensors"
    before = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not_as_they_were()["chat"] == ["model/model.safetensors was changed"]


def test_removed_and_added_files_are_named(here: Path) -> None:
    (RUN / "data/stats.json").unlink()
    (RUN / "tokenizer/note.txt").write_text("mine")
    changed = not_as_they_were()
    assert changed["data"] == ["stats.json was removed"]
    assert changed["tokenizer"] == ["note.txt was added", "data is not what it was made from"]


def test_data_from_outside_that_changed(here: Path) -> None:
    with open("chats.jsonl", "a") as file:
        file.write("\n")
    assert not_as_they_were() == {"data": ["source is not what it was made from"]}
    Path("chats.jsonl").unlink()
    assert nodes()["chats.jsonl"].state == "missing"
    assert not_as_they_were() == {"data": ["source is not what it was made from"]}


def test_a_stage_that_is_gone_or_unfinished(here: Path) -> None:
    shutil.rmtree(RUN / "tokenizer")
    (RUN / "chat/DONE").unlink()
    found = nodes()
    assert found["tokenizer"].state == "missing"
    assert found["text-tokens"].changed == ["tokenizer is not what it was made from"]
    assert found["chat"].state == "unfinished"


def test_notes_of_a_run_and_times_are_not_its_artefacts(here: Path) -> None:
    with open(RUN / "pretrain/logbook.md", "a") as file:
        file.write("- a remark\n")
    os.utime(RUN / "data/train.jsonl.zst", (1, 1))
    assert not_as_they_were() == {}


def test_a_run_that_was_moved(here: Path) -> None:
    Path("elsewhere").mkdir()
    shutil.move(RUN, "elsewhere/renamed")
    assert not_as_they_were("elsewhere/renamed") == {}
    assert nodes("elsewhere/renamed")["data"].path == "elsewhere/renamed/data"


def test_of_a_file_it_is_that_of_its_stage(here: Path) -> None:
    (node,) = lineage(PathConfig(path=RUN / "pretrain/model/config.json"))
    assert node == lineage(PathConfig(path=RUN / "pretrain"))[0]
    assert node.path == "runs/tiny/pretrain"


def test_what_no_stage_wrote_is_refused(here: Path) -> None:
    for path, message in (("chats.jsonl", "no stage of danlu wrote this"), ("nowhere", "no such file")):
        with pytest.raises(UserError, match=message):
            lineage(PathConfig(path=Path(path)))
    Path("empty").mkdir()
    shutil.copy(RUN / "recipe.yaml", "empty/recipe.yaml")
    with pytest.raises(UserError, match="no stage of this run has begun") as caught:
        lineage(PathConfig(path=Path("empty")))
    assert caught.value.remedy == "danlu run empty/recipe.yaml"


def test_it_is_shown_as_a_tree(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (RUN / "data/stats.json").unlink()
    show(lineage(PathConfig(path=RUN)))
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].startswith("runs/tiny/scores")
    assert "✗ changed" in shown
    assert "stats.json was removed" in shown
    assert "✓ as it was" in shown  # the tokens
    # What stands there already is not spelt out once more.
    assert shown.count("stats.json was removed") == 1
    assert "data runs/tiny/data  as above" in shown
