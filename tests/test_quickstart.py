"""`danlu quickstart`, for real: what it promises a newcomer, checked from outside."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import zstandard
from real_runs import Quickstart
from tokenizers import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = ("model", "gzip", "xz", "zstd", "zstd_dict", "zstd_raw", "xz_given_text")
STAGES = ("data", "tokenizer", "text-tokens", "chat-tokens", "pretrain", "chat", "scores")


@pytest.fixture(scope="module")
def figures(quickstart: Quickstart) -> dict[str, Any]:
    return json.loads((quickstart.run / "report.json").read_text())


@pytest.fixture(scope="module")
def lineages(quickstart: Quickstart) -> dict[str, dict[str, Any]]:
    return {name: json.loads((quickstart.run / name / "lineage.json").read_text()) for name in STAGES}


def documents(file: Path) -> list[dict[str, Any]]:
    """Read without danlu."""
    with open(file, "rb") as raw:
        lines = zstandard.ZstdDecompressor().stream_reader(raw).read().decode().split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.fixture(scope="module")
def held_out(quickstart: Quickstart) -> Path:
    """A file of the held-out text, a line end between documents."""
    texts = [row["text"] for row in documents(quickstart.run / "data/held_out.jsonl.zst")]
    path = quickstart.cwd / "held_out.txt"
    path.write_bytes("\n".join(texts).encode())
    return path


def test_the_model_compresses_best_by_a_tenth_at_least(figures: dict[str, Any]) -> None:
    bits = figures["bits_per_byte"]
    assert bits.keys() == set(NAMES)
    assert bits["model"] <= 0.9 * min(bits[name] for name in NAMES[1:])


def test_the_table_on_the_screen_holds_the_figures_of_the_report(
    quickstart: Quickstart, figures: dict[str, Any]
) -> None:
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in quickstart.stdout.splitlines()
    ]
    shown = {row[0]: row[1:] for row in rows if len(row) == 3}
    alone, whole = figures["bits_per_byte"], figures["bits_per_byte_with_model"]
    for name in NAMES:
        assert shown[figures["labels"][name]] == [f"{alone[name]:.3f}", f"{whole[name]:.3f}"]
    for label in ("gzip -9", "xz -9e", "zstd -19"):
        assert label in shown
    assert sum("training text" in label for label in shown) == 3
    assert re.search(r"The report: \S+report.html", quickstart.stdout)


def test_the_second_column_counts_the_model_s_own_bytes(
    quickstart: Quickstart, figures: dict[str, Any], held_out: Path
) -> None:
    alone, whole = figures["bits_per_byte"], figures["bits_per_byte_with_model"]
    size = held_out.stat().st_size
    assert figures["held_out_bytes"] == size
    assert whole["model"] - alone["model"] == pytest.approx(8 * figures["model_bytes"] / size)
    assert {name: whole[name] for name in NAMES[1:]} == {name: alone[name] for name in NAMES[1:]}
    # Two bytes a weight, of which a compressor saves some of the exponents and hardly any of the rest.
    weights = (quickstart.run / "pretrain/model/model.safetensors").stat().st_size / 4
    assert 1.2 * weights < figures["model_bytes"] < 2.2 * weights


@pytest.mark.parametrize(
    ("name", "command"),
    [("gzip", "gzip -9 -n -c"), ("xz", "xz -9e -c"), ("zstd", "zstd -19 --single-thread -c")],
)
def test_the_other_compressors_are_the_real_programs(
    figures: dict[str, Any], held_out: Path, name: str, command: str
) -> None:
    program, *options = command.split()
    if shutil.which(program) is None:
        pytest.skip(f"the program {program} is not installed")
    packed = subprocess.run([program, *options, str(held_out)], capture_output=True, check=True).stdout
    bits = 8 * len(packed) / held_out.stat().st_size
    assert figures["bits_per_byte"][name] == pytest.approx(bits, rel=0.005)


def test_small_talk_passes_its_checks(figures: dict[str, Any]) -> None:
    quality = figures["chat_quality"]
    assert len(quality["passed"]) == 5
    assert all(quality["passed"].values()), quality["checks"]
    assert len(quality["examples"]) == quality["replies_that_end"] == 20
    margin = quality["prompt_margin"]
    assert 0 < margin["low"] < margin["margin"] < margin["high"]
    gain = margin["loss_shuffled_prompt"] - margin["loss_own_prompt"]
    assert margin["margin"] == pytest.approx(gain, abs=1e-6)


def test_the_replies_are_english_short_and_different(quickstart: Quickstart, figures: dict[str, Any]) -> None:
    replies = [example["reply"] for example in figures["chat_quality"]["examples"]]
    tokenizer = Tokenizer.from_file(str(quickstart.run / "chat/model/tokenizer.json"))
    assert all(0 < len(tokenizer.encode(reply, add_special_tokens=False).ids) <= 60 for reply in replies)
    spec = find_spec("spellchecker")
    assert spec is not None
    assert spec.origin is not None
    listed = Path(spec.origin).parent / "resources/en.json.gz"
    english = json.loads(gzip.decompress(listed.read_bytes()))
    words = re.findall(r"[a-z]+(?:'[a-z]+)*", " ".join(replies).lower().replace("’", "'"))
    assert len(words) >= 40
    assert sum(word in english for word in words) >= 0.95 * len(words)
    pairs = [
        pair for reply in replies for pair in zip(*(reply.lower().split()[i:] for i in (0, 1)), strict=False)
    ]
    assert len(set(pairs)) >= 0.5 * len(pairs)


def test_no_reply_copies_a_training_conversation(quickstart: Quickstart, figures: dict[str, Any]) -> None:
    rows = documents(quickstart.run / "data/train.jsonl.zst")
    turns = "\n".join(m["content"] for row in rows for m in row.get("messages") or [])
    training = turns + "\n".join(row["text"] for row in rows)
    tokenizer = Tokenizer.from_file(str(quickstart.run / "chat/model/tokenizer.json"))
    spans = 0
    for example in figures["chat_quality"]["examples"]:
        ids = tokenizer.encode(example["reply"], add_special_tokens=False).ids
        for begin in range(len(ids) - 20):
            spans += 1
            assert tokenizer.decode(ids[begin : begin + 21]) not in training
    assert figures["chat_quality"]["longest_copy"] <= 20
    # The search finds what is there.
    first = tokenizer.encode(rows[0]["text"], add_special_tokens=False).ids
    assert tokenizer.decode(first[5:26]) in training


def test_it_stays_within_eight_gigabytes(
    quickstart: Quickstart, figures: dict[str, Any], lineages: dict[str, dict[str, Any]]
) -> None:
    recorded = max(lineage["peak_memory_bytes"] for lineage in lineages.values())
    assert recorded == figures["peak_memory_bytes"]
    if sys.platform == "linux":
        assert recorded == pytest.approx(quickstart.peak_memory_bytes, rel=0.05)
    assert quickstart.peak_memory_bytes < 8e9


def test_the_time_of_the_stages_is_the_time_that_it_took(
    quickstart: Quickstart, lineages: dict[str, dict[str, Any]]
) -> None:
    counted = sum(lineage["seconds"] for lineage in lineages.values())
    assert counted == pytest.approx(quickstart.seconds, rel=0.1)


def test_what_was_planned_is_what_it_took(
    quickstart: Quickstart, lineages: dict[str, dict[str, Any]]
) -> None:
    plan = json.loads(quickstart.danlu("plan", "quickstart", "--runs", "none", "--json").stdout)
    assert plan["problems"] == []
    took = sum(lineage["seconds"] for lineage in lineages.values())
    assert 0.4 < plan["seconds"] / took < 2.5  # other programs may be at work now, or were then
    for stage in plan["stages"]:
        lineage = lineages[stage["stage"]]
        assert stage["memory_bytes"] > 0.8 * lineage["peak_memory_bytes"]
        if stage["stage"] in ("pretrain", "chat"):
            assert stage["memory_bytes"] < 1.4 * lineage["peak_memory_bytes"]
            result = json.loads((quickstart.run / stage["stage"] / "result.json").read_text())
            assert stage["tokens"] == result["tokens"]


def test_a_second_run_skips_everything(quickstart: Quickstart) -> None:
    page = quickstart.run / "report.html"
    before = page.stat().st_mtime_ns
    started = time.monotonic()
    result = json.loads(quickstart.danlu("quickstart", "--runs", "kept", "--json").stdout)
    assert time.monotonic() - started < 30
    assert {stage["stage"]: stage["outcome"] for stage in result["stages"]} == dict.fromkeys(
        STAGES, "skipped"
    )
    assert page.stat().st_mtime_ns == before


def test_lineage_says_that_all_is_as_it_was(quickstart: Quickstart) -> None:
    shown = quickstart.danlu("lineage", "kept/quickstart").stdout
    assert shown.count("✓ as it was") == len(STAGES)
    assert "✗" not in shown
    assert "chitchat" in shown


def test_the_model_talks_back(quickstart: Quickstart) -> None:
    command = [
        "generate",
        "kept/quickstart",
        "--chat",
        "--prompt",
        "Hello, how are you?",
        "--n",
        "3",
        "--json",
    ]
    first = json.loads(quickstart.danlu(*command).stdout)
    assert len(first["answers"]) == 3
    assert all(answer["text"].strip() for answer in first["answers"])
    assert any(answer["finish_reason"] == "stop" for answer in first["answers"])
    assert json.loads(quickstart.danlu(*command).stdout) == first
    plain = quickstart.danlu("generate", "kept/quickstart", "--chat", "--prompt", "Hello, how are you?")
    assert plain.stdout == first["answers"][0]["text"] + "\n"


def test_the_report_s_bits_are_those_of_a_compressed_file(
    quickstart: Quickstart, figures: dict[str, Any], held_out: Path
) -> None:
    size = held_out.stat().st_size
    assert size >= 100_000
    model = ("--model", "kept/quickstart/pretrain")
    quickstart.danlu("compress", "held_out.txt", *model, "-o", "held_out.danlu")
    bits = 8 * (quickstart.cwd / "held_out.danlu").stat().st_size / size
    assert bits == pytest.approx(figures["bits_per_byte"]["model"], rel=0.01)
    quickstart.danlu("decompress", "held_out.danlu", *model, "-o", "back.txt")
    assert (quickstart.cwd / "back.txt").read_bytes() == held_out.read_bytes()
