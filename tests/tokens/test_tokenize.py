"""From documents to shards: nothing lost, what is left out is counted, what is cut is cut before a turn."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from danlu.core.errors import UserError
from danlu.data.config import DataConfig
from danlu.data.documents import Document, read_documents, write_documents
from danlu.data.prepare import prepare
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.chat import render, render_prompt
from danlu.tokens.config import InspectConfig, TokenizeConfig, TokenizerConfig
from danlu.tokens.inspect import inspect, show
from danlu.tokens.load import load_tokenizer
from danlu.tokens.shards import Shards
from danlu.tokens.tokenize import cut, tokenize

WORDS = ["the", "furnace", "is", "hot", "and", "gold", "will", "appear", "when", "night", "falls", "over"]


def talk(number: int, turns: int) -> list[dict[str, str]]:
    """Alternating turns, no two talks the same."""
    says = [f"{' '.join(WORDS[(number + t) % 9 :][: 2 + t])} {number}" for t in range(turns)]
    return [{"role": ("user", "assistant")[t % 2], "content": text} for t, text in enumerate(says)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(prepared data, tokenizer) of 60 conversations and a few plain texts."""
    root = tmp_path_factory.mktemp("t")
    rows: list[dict[str, Any]] = [{"messages": talk(number, 2 + number % 5)} for number in range(60)]
    rows += [{"text": f"just a text {number}"} for number in range(8)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(DataConfig(source=str(root / "rows.jsonl"), held_out=0.2, out=root / "data"))
    train_tokenizer(TokenizerConfig(data=root / "data", vocab_size=300, out=root / "tok"))
    return root / "data", root / "tok"


def test_text_shards_hold_every_document(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, tok = folders
    result = tokenize(TokenizeConfig(data=data, tokenizer=tok, out=tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    for part in ("train", "held_out"):
        texts = [document.text for document in read_documents(data / f"{part}.jsonl.zst")]
        shards = Shards(tmp_path / part)
        assert [tokenizer.decode(shards[n][0].tolist()) for n in range(len(shards))] == texts
        assert result[part]["tokens"] == sum(len(tokenizer.encode(t)) + 2 for t in texts)
        assert shards.meta["text_bytes"] == sum(len(t.encode()) for t in texts)


def test_chat_shards_hold_every_conversation_and_count_the_rest(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, tok = folders
    result = tokenize(TokenizeConfig(data=data, tokenizer=tok, kind="chat", out=tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    for part in ("train", "held_out"):
        documents = list(read_documents(data / f"{part}.jsonl.zst"))
        talks = [document.messages for document in documents if document.messages]
        shards = Shards(tmp_path / part)
        for number, messages in enumerate(talks):
            ids, mask = shards[number]
            rendered = render(messages, tokenizer)
            assert (ids.tolist(), mask.astype(bool).tolist()) == (rendered.ids, rendered.mask)
        assert result[part]["documents"] == len(talks)
        assert result[part].get("not a conversation", 0) == len(documents) - len(talks)
        assert result[part]["supervised"] == sum(sum(render(m, tokenizer).mask) for m in talks)


def test_cutting_loses_no_turn_and_begins_with_the_user(folders: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(folders[1])
    messages = talk(3, 12)
    parts = cut(messages, tokenizer, 100)
    assert len(parts) > 1
    assert [message for part in parts for message in part] == messages
    for part in parts:
        assert part[0]["role"] == "user"
        assert len(render(part, tokenizer).ids) <= 100 or len(part) == 2, "only one exchange may be longer"


def test_only_unanswered_turns_are_cut_off(folders: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(folders[1])
    messages = talk(3, 13)
    parts = cut(messages, tokenizer, 1)
    assert [message for part in parts for message in part] == messages[:-1]


def test_a_conversation_without_reply_is_refused_with_its_line(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for part in ("train", "held_out"):
        answered = Document("1", "x", talk(1, 2))
        write_documents([answered, Document("2", "y", talk(2, 1))], tmp_path / "data" / f"{part}.jsonl.zst")
    settings = TokenizeConfig(data=tmp_path / "data", tokenizer=folders[1], kind="chat", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"train\.jsonl\.zst, line 2: no assistant turn"):
        tokenize(settings)
    assert not (tmp_path / "out" / "train").exists()


def test_of_a_preference_only_the_replies_are_learnt(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Not what the assistant said before; each reply behind the ids that serving would prompt with."""
    prompt = [*talk(3, 4), {"role": "user", "content": "is the gold hot"}]
    rows = [{"prompt": prompt, "replies": [f"it is {n}", "the furnace", "night falls"]} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, *(talk_row(n) for n in range(30))]))
    )
    prepare(DataConfig(source=str(tmp_path / "rows.jsonl"), held_out=0.3, seed=4, out=tmp_path / "data"))
    tokenize(
        TokenizeConfig(data=tmp_path / "data", tokenizer=folders[1], kind="preferences", out=tmp_path / "tok")
    )
    tokenizer = load_tokenizer(folders[1])
    before = render_prompt(prompt, tokenizer)
    n_replies = 0
    for part in ("train", "held_out"):
        shards = Shards(tmp_path / "tok" / part)
        for begin, end in pairwise(shards.groups.tolist()):
            for number in range(begin, end):
                ids, mask = shards[number]
                n_replies += 1
                if end - begin == 3:
                    assert ids[: len(before)].tolist() == before
                    learnt = tokenizer.decode(ids[mask > 0].tolist())
                    assert learnt.startswith(("it is ", "the furnace", "night falls")[number - begin])
                    assert not mask[: len(before)].any()
    assert n_replies == 30 * 3 + 30 * 2


def talk_row(number: int) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": "yes", "rejected": "no"}


def test_inspect_shows_the_example_as_it_is_trained_on(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, tok = folders
    tokenize(TokenizeConfig(data=data, tokenizer=tok, kind="chat", out=tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    found = inspect(InspectConfig(file=tmp_path, index=0, sequence_length=120))
    documents = read_documents(data / "train.jsonl.zst")
    first = next(document.messages for document in documents if document.messages)
    rendered = render(first, tokenizer)
    segment = [token for token in found["tokens"] if token["segment"] == 0]
    assert [token["id"] for token in segment] == rendered.ids[1:]
    assert [token["learnt"] for token in segment] == rendered.mask[1:]
    show(found)
    shown = capsys.readouterr().out
    assert first[1]["content"] in shown.replace("\n", " ")
    assert f"{len(found['tokens'])} tokens" in shown


def test_inspect_of_a_row_says_that_it_is_cut(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk(1, 6)}))
    settings = {"file": tmp_path / "rows.jsonl", "tokenizer": folders[1]}
    found = inspect(InspectConfig.model_validate({**settings, "sequence_length": 20}))
    assert found["truncated"]
    assert len(found["tokens"]) == 21
    with pytest.raises(UserError, match="has no row 1"):
        inspect(InspectConfig.model_validate({**settings, "index": 1}))
    with pytest.raises(UserError, match="no tokenizer is given"):
        inspect(InspectConfig(file=tmp_path / "rows.jsonl"))
