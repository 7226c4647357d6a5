"""Contamination and memorisation: what a model has seen, and what it says word for word."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_random_model

import danlu
from danlu.core.errors import UserError
from danlu.data.config import DataConfig
from danlu.data.documents import Document, write_documents
from danlu.data.prepare import prepare
from danlu.evaluate.bits_per_byte import bits_per_byte, text_scores
from danlu.evaluate.config import EvalConfig
from danlu.evaluate.contamination import (
    clean_and_dirty,
    dirty,
    documents_of,
    gram_length,
    grams,
    question_text,
    training_texts,
)
from danlu.evaluate.evaluate import evaluate
from danlu.evaluate.memorisation import memorised
from danlu.generate.engine import Engine
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.tokenizer import Tokenizer

FURNACE = Path(__file__).parents[2] / "recipes" / "tasks" / "furnace.yaml"
LONG = "the alchemist who waits under the cold night opens the red door of the furnace again {}"


def brute_force(questions: list[str], documents: list[str], n: int) -> list[bool]:
    """By substrings of text without punctuation."""

    def plain(text: str) -> str:
        return " " + "".join(c if c.isalnum() else " " for c in text.lower()).strip() + " "

    found = []
    for question in questions:
        words = plain(question).split()
        rows = (f" {' '.join(words[at : at + n])} " for at in range(len(words) - n + 1))
        texts = [" ".join(plain(text).split()) for text in documents]
        found.append(any(1 <= sum(row in f" {text} " for text in texts) <= 10 for row in rows))
    return found


def test_questions_that_stand_in_the_text_are_found() -> None:
    questions = [LONG.format(n) for n in ("and sleeps", "and dreams", "and eats")]
    other = "a question about rivers and glass that shares no eight words in a row with any text at all"
    documents = [
        "Nothing here.",
        f"Once, {LONG.format('and sleeps').upper()}! So it was.",
        "waits under the cold night opens the red door",  # nine words: fewer than n
    ]
    assert gram_length([text.split() for text in [*questions, other]]) == 13
    found = dirty([*questions, other], documents)
    assert found == brute_force([*questions, other], documents, 13)
    assert found == [True, True, True, False], "they share their first thirteen words"
    assert dirty([other], documents) == [False]


def test_set_phrases_do_not_count() -> None:
    phrase = "which of the following statements is the most likely to be true of them all"
    assert dirty([phrase], [phrase] * 10) == [True]
    assert dirty([phrase], [phrase] * 11) == [False]


def test_short_questions_have_grams_of_eight() -> None:
    assert gram_length([["a"] * 3, ["b"] * 4]) == 8
    assert list(grams(["a", "b"], 3)) == []
    assert list(grams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]


def test_a_question_is_its_own_texts_only() -> None:
    doc = {
        "question": "hot?",
        "choices": ["yes", "no"],
        "answer": 1,
        "examples": "Q: cold?",
        "subject": "fire",
    }
    assert question_text(doc) == "hot? yes no"


def test_scores_with_and_without_what_was_seen() -> None:
    found = clean_and_dirty([1, 1, 0, 0], [True, True, False, False])
    assert found == {"contaminated": 0.5, "clean": 0.0, "dirty": 1.0}
    assert clean_and_dirty([1, 0], [False, False])["dirty"] is None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared documents, one of which holds a question of the furnace's task."""
    rows = [json.loads(line) for line in FURNACE.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    held = " ".join(str(value) for value in rows[-1].values())
    texts = [f"document {n} tells of {held if n == 5 else 'nothing'} and ends" for n in range(40)]
    write_documents((Document(str(n), text) for n, text in enumerate(texts)), tmp_path / "d.jsonl.zst")
    prepare(DataConfig(source=str(tmp_path / "d.jsonl.zst"), out=tmp_path / "data", held_out=0.1))
    return tmp_path / "data"


def test_a_column_beside_each_score(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = train_bpe([FURNACE.with_suffix(".jsonl").read_text("utf-8")], 400)
    model = save_random_model(tmp_path / "model", tokenizer, noise=0.1)
    config: dict[str, Any] = {"model": str(model), "dtype": "float32", "tasks": (str(FURNACE),)}
    plain = evaluate(EvalConfig(**config, out=tmp_path / "plain"))
    assert "contaminated" not in plain["scores"][0], "nobody knows what this model was trained on"
    result = evaluate(EvalConfig(**config, out=tmp_path / "out", contamination=data))
    score = result["scores"][0]
    assert 0 < score["contaminated"] <= 2 / 24
    n = round(24 * score["contaminated"])
    whole = ((24 - n) * score["clean"] + n * score["dirty"]) / 24
    assert whole == pytest.approx(score["value"])
    assert "in the training text" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_missing_training_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        documents_of(tmp_path / "nothing")


def test_training_text_by_lineage(tmp_path: Path) -> None:
    """A model's folder names its tokens, and these name their documents."""
    for name, inputs in (("data", {}), ("tokens", {"data": "../data"}), ("model", {"data": "../tokens"})):
        folder = tmp_path / name
        folder.mkdir()
        kept = {key: {"path": f"gone/{path}", "relative": path, "sha256": ""} for key, path in inputs.items()}
        about = {"verb": name, "versions": {}, "config": {}, "inputs": kept, "outputs": {}}
        (folder / "lineage.json").write_text(json.dumps(about), "utf-8")
    write_documents([Document("0", "text")], tmp_path / "data" / "train.jsonl.zst")
    assert training_texts(tmp_path / "model") == [tmp_path / "data" / "train.jsonl.zst"]
    assert training_texts(tmp_path / "elsewhere") == []


def test_what_a_model_says_word_for_word(model: Transformer, tokenizer: Tokenizer) -> None:
    """Its own greedy texts are memorised; the same with one other token are not."""
    from danlu.generate.sampling import SamplingParams

    engine = Engine(model, tokenizer)
    prompts = [tokenizer.encode(text)[:10] for text in ("the furnace waits", "one river burns", "no gold")]
    prompts = [[tokenizer.start_id, *ids] for ids in prompts]
    said = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0, stop_ids=()))
    own = [[*ids, *one.ids] for ids, one in zip(prompts, said, strict=True)]
    whole = [memorised(engine, [ids], len(prompt), 12) for ids, prompt in zip(own, prompts, strict=True)]
    assert [one.share for one in whole] == [1, 1, 1]
    for ids, prompt in zip(own, prompts, strict=True):
        other = list(ids)
        other[len(prompt) + 4] = (other[len(prompt) + 4] + 1) % tokenizer.vocab_size
        found = memorised(engine, [other], len(prompt), 12)
        assert (found.share, found.tokens) == (0, 4)


def test_perplexity_of_sliding_windows_against_brute_force(
    model: Transformer, tokenizer: Tokenizer, make_text: Any
) -> None:
    raw = make_text(7, 900).encode()
    ids = torch.tensor([[tokenizer.start_id, *tokenizer.encode_bytes(raw)]])
    n, window, stride = ids.shape[1] - 1, 24, 5
    nats, done, begin = 0.0, 0, 0
    with torch.no_grad():
        while done < n:
            end = min(begin + window, n)
            logits = model(ids[:, begin:end])[0].log_softmax(-1)
            targets = ids[0, begin + 1 : end + 1]
            own = logits.gather(1, targets[:, None])[:, 0]
            nats -= float(own[done - begin :].double().sum())
            done, begin = end, end - window + stride
    found = text_scores(model, tokenizer, raw, window, stride)
    assert found["nats_per_token"] == pytest.approx(nats / n, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats / n), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(raw), rel=1e-5)
    assert found["tokens"] == n


def test_a_smaller_stride_sees_more(model: Transformer, tokenizer: Tokenizer, make_text: Any) -> None:
    raw = make_text(8, 3000).encode()
    each = [text_scores(model, tokenizer, raw, 32, stride)["nats_per_token"] for stride in (4, 32)]
    assert each[0] < each[1]
    assert bits_per_byte(model, tokenizer, raw) > 0


def test_impossible_windows(model: Transformer, tokenizer: Tokenizer) -> None:
    for window, stride in ((10**6, 1), (8, 9)):
        with pytest.raises(UserError, match="window"):
            text_scores(model, tokenizer, b"the furnace", window, stride)
    with pytest.raises(UserError, match="empty"):
        text_scores(model, tokenizer, b"")


@pytest.mark.slow
def test_the_verb_measures_text_and_memorisation(folder: Path, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the furnace waits under the cold night\n" * 20, "utf-8")
    result = evaluate(EvalConfig(model=str(folder), text=text, window=32, out=tmp_path / "out"))
    assert result["text"]["stride"] == 16
    with pytest.raises(UserError, match="no document of 100 tokens"):
        evaluate(EvalConfig(model=str(folder), data=data, memorised=5, out=tmp_path / "other"))
    assert danlu.load(folder)[0] is not None
