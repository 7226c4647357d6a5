"""Wrong input, through the real command line: exit 2, one clear message, nothing half-written."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from danlu.data.config import DataConfig
from danlu.data.prepare import prepare
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.config import TokenizeConfig, TokenizerConfig
from danlu.tokens.tokenize import tokenize

DANLU = [sys.executable, "-m", "danlu.cli"]
MODEL = {"vocab_size": 300, "width": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_width": 64}
TINY = {"batch_size": 2, "sequence_length": 64, "compile": "off", "eval_batches": 1}
WORDS = ["the", "a", "cat", "dog", "fox", "owl", "sees", "hears", "finds", "red", "old", "river", "mill"]


def tiny(max_positions: int = 64, **options: Any) -> list[str]:
    """Options of a training that takes no time."""
    model = {f"model.{key}": value for key, value in {**MODEL, "max_positions": max_positions}.items()}
    return [f"{key}={value}" for key, value in (model | TINY | options).items()]


def make_documents(seed: int) -> str:
    """JSON lines of two-message conversations whose text is all different."""
    chance = random.Random(seed)
    rows = [[" ".join(chance.choices(WORDS, k=12)) for _ in range(2)] for _ in range(150)]
    roles = ("user", "assistant")
    return "".join(
        json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, row, strict=True)]}) + "\n"
        for row in rows
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `tokenizer`, `tokens`, `chat`, and `tokens2` of other text."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "chats.jsonl").write_text(make_documents(1))
    (folder / "other.jsonl").write_text(make_documents(2))
    for name, source in (("data", "chats.jsonl"), ("data2", "other.jsonl")):
        prepare(DataConfig(source=str(folder / source), held_out=0.1, out=folder / name))
    train_tokenizer(TokenizerConfig(data=folder / "data", vocab_size=300, out=folder / "tokenizer"))
    for name, data, kind in (
        ("tokens", "data", "text"),
        ("tokens2", "data2", "text"),
        ("chat", "data", "chat"),
    ):
        values = {
            "data": folder / data,
            "tokenizer": folder / "tokenizer",
            "kind": kind,
            "out": folder / name,
        }
        tokenize(TokenizeConfig.model_validate(values))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def danlu(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DANLU, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one message on stderr of a command that found fault with its input."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    _, *messages = re.split("^danlu: ", done.stderr, flags=re.MULTILINE)
    assert len(messages) == 1, done.stderr
    message = messages[0]
    remedies = ("\n  → ", "did you mean", "input should be")
    assert any(remedy in message for remedy in remedies), f"no remedy in: {message}"
    return message


def refused(*arguments: str | Path) -> str:
    """Runs a command that must be refused and write nothing; returns its message."""
    before = files(Path.cwd())
    message = message_of(danlu(*arguments))
    assert files(Path.cwd()) == before
    return message


RECIPE = """
name: toy
stages:
  - {name: data, verb: data prepare, options: {source: chats.jsonl, held_out: 0.1}}
  - {name: tokenizer, verb: tokenizer train, reads: {data: data}, options: {vocab_size: 300}}
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("vocab_size", "vocab_szie", 'stage tokenizer: vocab_szie: unknown key; did you mean "vocab_size"?'),
        ("reads", "raeds", 'raeds: unknown key; did you mean "reads"?'),
        ("300", "many", "stage tokenizer: vocab_size: input should be a valid integer, not 'many'"),
        ("0.1", "'0.1'", "stage data: held_out: input should be a valid number, not '0.1'"),
        ("0.1", "1.5", "stage data: held_out: input should be less than 1, not 1.5"),
        ("tokenizer train", "tokeniser", 'no stage verb is called "tokeniser"; did you mean "tokenize"?'),
        ("chats.jsonl", "nowhere.jsonl", "nowhere.jsonl"),
        ("stages:", "stages: [", "recipe.yaml, line 4: not valid YAML"),
    ],
)
def test_a_wrong_recipe(here: Path, old: str, new: str, expected: str) -> None:
    (here / "chats.jsonl").write_text(make_documents(1))
    (here / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    message = refused("run", "recipe.yaml")
    assert expected in message
    assert "recipe.yaml" in message or "nowhere" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("pretrain --stpes 3 --data x --out y", "Did you mean --steps?"),
        ("pretrain optim.lrr=3 --data x --out y", "--optim.lrr=3. Did you mean --optim.lr?"),
        ("pretrain --steps many --data . --out y", "steps: input should be a valid integer, not 'many'"),
        ("pretrain optim.lr=fast --data . --out y", "optim.lr: input should be a valid number, not 'fast'"),
        (
            "tokenize --kind audio --data . --tokenizer . --out y",
            '"audio" for --kind. Choose from: "text", "chat"',
        ),
        (
            "run recipe.yaml tokenizer.vocab=3",
            'stage tokenizer: vocab: unknown key; did you mean "vocab_size"?',
        ),
        ("run recipe.yaml tokenize.vocab_size=3", 'no stage is called "tokenize"; did you mean "tokenizer"?'),
    ],
)
def test_a_wrong_option(here: Path, arguments: str, expected: str) -> None:
    (here / "chats.jsonl").write_text(make_documents(1))
    (here / "recipe.yaml").write_text(RECIPE)
    assert expected.lower() in refused(*shlex.split(arguments)).lower()


@pytest.mark.parametrize(
    "arguments",
    [
        "run nowhere",
        "plan nowhere.yaml",
        "data prepare nowhere --out x",
        "data check nowhere",
        "tokenizer train --data nowhere --out x",
        "tokenize --data nowhere --tokenizer nowhere --out x",
        "inspect nowhere --tokenizer nowhere",
        "pretrain --data nowhere --out x",
        "sft --data nowhere --init-from nowhere --out x",
        "generate nowhere --prompt hello",
        "chat nowhere",
        "compress nowhere --model nowhere -o x",
        "decompress nowhere --model nowhere -o x",
        "eval nowhere --data nowhere",
        "lineage nowhere",
        "report nowhere",
    ],
)
def test_a_missing_file_is_named(here: Path, arguments: str) -> None:
    assert "nowhere" in refused(*shlex.split(arguments))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.jsonl.gz", "empty.parquet", "empty/"])
def test_an_empty_file_is_named(here: Path, name: str) -> None:
    if name.endswith("/"):
        (here / name).mkdir()
    else:
        (here / name).write_bytes(b"")
    assert name.rstrip("/") in refused("data", "prepare", name, "--out", "x")


def test_other_empty_files_are_named(here: Path, made: Path) -> None:
    (here / "empty.yaml").write_text("")
    assert "empty.yaml: expected keys and values" in refused("run", "empty.yaml")
    (here / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused("inspect", "empty.jsonl", "--tokenizer", made / "tokenizer")
    (here / "empty.danlu").write_text("")
    assert "empty.danlu" in refused("decompress", "empty.danlu", "-o", "x")


def test_a_broken_line_of_json_is_named(here: Path, made: Path) -> None:
    lines = make_documents(1).splitlines()
    lines[70] = lines[70][:-9]
    (here / "chats.jsonl").write_text("\n".join(lines) + "\n")
    for command in ("data prepare chats.jsonl --out x", "data check chats.jsonl"):
        assert "chats.jsonl, line 71" in refused(*shlex.split(command))
    message = refused("inspect", "chats.jsonl", "--index", "100", "--tokenizer", made / "tokenizer")
    assert "chats.jsonl, line 71" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.yaml"])
def test_invalid_utf_8_is_named(here: Path, name: str) -> None:
    rows = {"a.txt": "good\n", "a.jsonl": '{"text": "good"}\n', "a.yaml": "name: good\n"}
    (here / name).write_bytes(rows[name].encode() + rows[name].encode().replace(b"good", b"b\xe4d"))
    command = ["run", name] if name == "a.yaml" else ["data", "prepare", name, "--out", "x"]
    message = refused(*command)
    assert f"{name}, line 2" in message
    assert "UTF-8" in message


def test_a_conversation_in_which_no_assistant_speaks(here: Path, made: Path) -> None:
    lines = make_documents(1).splitlines()
    lines[29] = json.dumps({"messages": [{"role": "user", "content": "Is anybody there?"}]})
    (here / "chats.jsonl").write_text("\n".join(lines) + "\n")
    assert "chats.jsonl, line 30" in refused("data", "prepare", "chats.jsonl", "--out", "x")
    assert "chats.jsonl, line 30" in refused("data", "check", "chats.jsonl", "--chat")
    # The same, in a folder that danlu did not prepare.
    (here / "data").mkdir()
    for part in ("train", "held_out"):
        zstd = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, zstandard as z; sys.stdout.buffer.write(z.compress(sys.stdin.buffer.read()))",
            ],
            input=("\n".join(lines) + "\n").encode(),
            capture_output=True,
            check=True,
        )
        (here / f"data/{part}.jsonl.zst").write_bytes(zstd.stdout)
    command = [
        "tokenize",
        "--data",
        "data",
        "--tokenizer",
        made / "tokenizer",
        "--kind",
        "chat",
        "--out",
        "x",
    ]
    assert "train.jsonl.zst, line 30" in refused(*command)


def test_a_vocabulary_larger_than_the_text_supports(here: Path, made: Path) -> None:
    message = refused("tokenizer", "train", "--data", made / "data", "--vocab-size", "50000", "--out", "x")
    assert "asked for 50000" in message
    assert "or give more text" in message


def test_a_sequence_longer_than_the_models_positions(here: Path, made: Path) -> None:
    message = refused("pretrain", "--data", made / "tokens", "--out", "x", *tiny(sequence_length=65))
    assert "65" in message
    assert "64" in message
    (here / "recipe.yaml").write_text(
        f"name: toy\nstages: [{{name: model, verb: pretrain, options: {{data: {made / 'tokens'}, "
        "sequence_length: 65, model: {vocab_size: 300, max_positions: 64}}}]\n"
    )
    assert "65" in refused("run", "recipe.yaml")


def test_a_vocabulary_that_is_not_the_data_s(here: Path, made: Path) -> None:
    options = [*(option for option in tiny() if "vocab_size" not in option), "model.vocab_size=512"]
    assert "512" in refused("pretrain", "--data", made / "tokens", "--out", "x", *options)


def test_pretraining_on_conversations_is_refused(here: Path, made: Path) -> None:
    assert "chat" in refused("pretrain", "--data", made / "chat", "--out", "x", *tiny())


@pytest.mark.parametrize(
    "command", ["data prepare chats.jsonl --out file/x", "run recipe.yaml --runs file", "run recipe.yaml"]
)
def test_a_run_folder_whose_parent_is_a_file(here: Path, command: str) -> None:
    (here / "chats.jsonl").write_text(make_documents(1))
    (here / "recipe.yaml").write_text(RECIPE)
    parent = "file" if "file" in command else "runs"
    (here / parent).write_text("I am a file")
    message = refused(*shlex.split(command))
    assert parent in message
    assert "is a file" in message


def test_a_training_folder_whose_parent_is_a_file(here: Path, made: Path) -> None:
    (here / "file").write_text("I am a file")
    assert "is a file" in refused("pretrain", "--data", made / "tokens", "--out", "file/x", *tiny())


def with_mount(mount: str, folder: Path, *arguments: str | Path) -> tuple[str, list[str]]:
    """Runs danlu in a user namespace where `folder` is mounted; (message, files in it afterwards)."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces with mounts are not permitted here")
    folder.mkdir(exist_ok=True)
    script = f'{mount} || exit 99; "$@"; code=$?; find {folder} -type f >listing; exit $code'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", *DANLU, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 99, done.stderr
    return message_of(done), Path("listing").read_text().split()


@pytest.mark.parametrize(
    "command",
    [
        "data prepare {made}/chats.jsonl --out disk/x",
        "tokenizer train --data {made}/data --vocab-size 300 --out disk/x",
        "tokenize --data {made}/data --tokenizer {made}/tokenizer --out disk/x",
        "run recipe.yaml --runs disk",
    ],
)
def test_a_full_disk(here: Path, made: Path, command: str) -> None:
    (here / "chats.jsonl").write_text(make_documents(1))
    (here / "recipe.yaml").write_text(RECIPE)
    mount = "mount -t tmpfs -o size=8k,nr_inodes=40 tmpfs disk"
    message, left = with_mount(mount, here / "disk", *shlex.split(command.format(made=made)))
    assert "no space left on device" in message
    assert "disk" in message
    assert "free some space" in message
    assert left == []


@pytest.mark.parametrize(
    "command",
    [
        "data prepare {made}/chats.jsonl --out disk/x",
        "pretrain --data {made}/tokens --out disk/x",
        "run recipe.yaml --runs disk",
    ],
)
def test_a_read_only_mount(here: Path, made: Path, command: str) -> None:
    (here / "chats.jsonl").write_text(make_documents(1))
    (here / "recipe.yaml").write_text(RECIPE)
    mount = "mount --bind disk disk && mount -o remount,ro,bind disk"
    message, left = with_mount(mount, here / "disk", *shlex.split(command.format(made=made)))
    assert "read-only file system" in message
    assert "disk" in message
    assert "choose a folder that can be written" in message
    assert left == []


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training_keeps_whole_checkpoints(here: Path, made: Path) -> None:
    options = tiny(steps=50, checkpoint_every=5, keep_checkpoints=10)
    command = ["pretrain", "--data", made / "tokens", "--out", "disk/x", *options]
    mount = "mount -t tmpfs -o size=2m tmpfs disk"
    message, left = with_mount(mount, here / "disk", *command)
    assert "disk" in message
    assert "free some space" in message
    names = {path.split("checkpoints/")[1].split("/")[0] for path in left if "checkpoints/" in path}
    assert names
    assert all(name.startswith("step-") for name in names)
    assert len([path for path in left if path.endswith("state.json")]) == len(names)


def interrupt_once_begun(command: list[str | Path], begun: Path) -> None:
    """Starts a training and sends it SIGINT once its first checkpoint is there."""
    process = subprocess.Popen([*DANLU, *map(str, command)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(begun.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr


@pytest.mark.slow
def test_a_resume_against_other_data(here: Path, made: Path) -> None:
    options = ["--out", "x", *tiny(steps=100_000, checkpoint_every=20)]
    interrupt_once_begun(["pretrain", "--data", made / "tokens", *options], here / "x/checkpoints")
    message = refused("pretrain", "--data", made / "tokens2", *options)
    assert "unfinished run on other data" in message
    assert "remove x" in message


@pytest.mark.slow
def test_a_recipe_s_resume_against_other_data(here: Path, made: Path) -> None:
    os.symlink(made / "tokens", here / "tokens")
    (here / "recipe.yaml").write_text(
        "name: toy\nstages:\n  - name: model\n    verb: pretrain\n    options: {data: tokens, steps: 100000, "
        "batch_size: 2, sequence_length: 64, compile: off, checkpoint_every: 20, model: {vocab_size: 300, "
        "width: 32, n_layers: 1, n_heads: 2, n_kv_heads: 2, ffn_width: 64, max_positions: 64}}\n"
    )
    interrupt_once_begun(["run", "recipe.yaml"], here / "runs/toy/model/checkpoints")
    (here / "tokens").unlink()
    os.symlink(made / "tokens2", here / "tokens")
    message = refused("run", "recipe.yaml")
    assert "runs/toy/model holds an unfinished run on other data: data has other content" in message
    assert "--from model" in message
