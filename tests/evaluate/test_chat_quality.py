"""The chat scores against brute force, and on models whose replies are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder
from danlu.data.conversations import Messages
from danlu.evaluate.chat_quality import (
    PROMPTS,
    chat_quality,
    dictionary_share,
    english_words,
    longest_copy,
    prompt_margin,
)
from danlu.evaluate.text_measures import distinct_n
from danlu.generate.engine import Completion, Engine
from danlu.generate.sampling import SamplingParams
from danlu.model.checkpoint import load
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render
from danlu.tokens.shards import Shards, ShardWriter
from danlu.tokens.tokenizer import Tokenizer

TEXTS = st.lists(st.text(st.sampled_from("ab' ’\n.AB1é"), max_size=30), max_size=5)


def plain_words(text: str) -> list[str]:
    """Runs of a-z, apostrophes within them included, letter by letter."""
    found, word = [], ""
    letters = [c.lower() for c in text.replace("’", "'")] + [" "]
    for place, letter in enumerate(letters):
        inside = letter == "'" and word and letters[place + 1 : place + 2] and letters[place + 1] in "ab"
        if letter in ("a", "b") or inside:
            word += letter
        elif word:
            found.append(word)
            word = ""
    return found


@given(TEXTS, st.sets(st.text(st.sampled_from("ab'"), min_size=1, max_size=3)))
@settings(max_examples=300)
def test_dictionary_share(texts: list[str], known: set[str]) -> None:
    said = [word for text in texts for word in plain_words(text)]
    share, unknown = dictionary_share(texts, known)
    assert unknown == sorted({word for word in said if word not in known})
    assert share == (sum(word in known for word in said) / len(said) if said else 0)


def test_the_dictionary_knows_english() -> None:
    words = english_words()
    good = ["Hello! How are you?", "I don't like music, but my sister does.", "It is very cold outside."]
    assert dictionary_share(good, words) == (1.0, [])
    assert dictionary_share(["thre wsa qqzx"], words)[0] == 0


@given(TEXTS, st.integers(1, 3))
def test_distinct_n(texts: list[str], n: int) -> None:
    grams = []
    for text in texts:
        said = text.lower().split()
        grams += [" ".join(said[i : i + n]) for i in range(len(said)) if i + n <= len(said)]
    assert distinct_n(texts, n) == (len(set(grams)) / len(grams) if grams else 0)


def test_distinct_2_of_one_stock_answer() -> None:
    """One answer to twenty prompts: each of its bigrams is one of twenty."""
    assert distinct_n(["I like it very much."] * 20) == pytest.approx(1 / 20)


# Ids whose bytes repeat, so that they also stand in a document between its tokens.
IDS = st.lists(st.sampled_from([0, 1, 256, 257, 65536, 65537, 65792]), max_size=14)


@given(replies=st.lists(IDS, max_size=4), documents=st.lists(IDS.filter(len), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_longest_copy(tmp_path: Path, replies: list[list[int]], documents: list[list[int]]) -> None:
    with atomic_folder(tmp_path / "shards") as folder:
        writer = ShardWriter(folder, "text", 70_000, "t")
        for ids in documents:
            writer.add(ids, None, 1)
        writer.close()
    runs = {tuple(ids[i:j]) for ids in documents for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)}
    copies = [
        j - i for ids in replies for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)
        if tuple(ids[i:j]) in runs
    ]  # fmt: skip
    assert longest_copy(replies, Shards(tmp_path / "shards")) == max(copies, default=0)


def exchange(prompt: str, reply: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


TWO = [exchange("the furnace", "burns hot"), exchange("一扇门 🔥", "opens slowly and never again")]


@torch.no_grad()
def reply_loss(theirs: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, reply: str) -> float:
    """transformers' loss over the reply and the end of its turn, the rest labelled as not learnt."""
    start = render(exchange(prompt, ""), tokenizer)
    head = start.ids[: start.mask.index(True)]
    end = tokenizer.special_ids["<|im_end|>"]
    ids = torch.tensor([[*head, *tokenizer.encode(reply), end]])
    labels = ids.clone()
    labels[:, : len(head)] = -100
    return float(theirs(ids, labels=labels).loss)


def test_prompt_margin_of_two_is_the_loss_with_prompts_exchanged(
    model: Transformer, tokenizer: Tokenizer, theirs: LlamaForCausalLM
) -> None:
    pairs = [(talk[0]["content"], talk[1]["content"]) for talk in TWO]
    own = [reply_loss(theirs, tokenizer, prompt, reply) for prompt, reply in pairs]
    other = [reply_loss(theirs, tokenizer, pairs[1 - i][0], reply) for i, (_, reply) in enumerate(pairs)]
    found = prompt_margin(model, tokenizer, TWO)
    assert found["replies"] == 2
    assert found["loss_own_prompt"] == pytest.approx(sum(own) / 2, abs=1e-4)
    assert found["loss_shuffled_prompt"] == pytest.approx(sum(other) / 2, abs=1e-4)
    assert found["margin"] == pytest.approx((sum(other) - sum(own)) / 2, abs=1e-4)
    gains = sorted(b - a for a, b in zip(own, other, strict=True))
    assert (found["low"], found["high"]) == pytest.approx(tuple(gains), abs=1e-4)


def test_a_model_that_reads_no_prompt_gains_nothing(folder: Path) -> None:
    """Without attention a token's prediction hangs on the token before it alone."""
    model, tokenizer = load(folder, torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.out.weight.zero_()
    talks = [exchange(f"{number} the furnace", f"burns {number * 7} hot") for number in range(12)]
    found = prompt_margin(model, tokenizer, talks)
    assert found["margin"] == pytest.approx(0, abs=1e-6)
    assert found["low"] <= 1e-6
    assert found["loss_own_prompt"] > 0.1


def test_a_reply_without_room_for_it_does_not_count(
    model: Transformer, tokenizer: Tokenizer, theirs: LlamaForCausalLM
) -> None:
    """Cut short, it would cost too little."""
    system = {"role": "system", "content": "be brief"}
    short = [[system, *exchange("door", "opens"), *exchange("more", "no")] for _ in range(8)]
    long: list[Messages] = [exchange("the furnace " * 30, "opens"), exchange("door", "the furnace " * 30)]
    silent: list[Messages] = [exchange("hot", "  "), [{"role": "user", "content": "alone"}]]
    found = prompt_margin(model, tokenizer, short + long + silent)
    # The two long ones, and the one whose other prompt is the long one (which may be the long reply).
    assert found["too_long"] in (2, 3)
    assert found["replies"] == 10 - found["too_long"]
    expected = reply_loss(theirs, tokenizer, "door", "opens")
    assert found["loss_own_prompt"] == pytest.approx(expected, abs=1e-4)
    assert found["loss_shuffled_prompt"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="0 of 2 held-out conversations"):
        prompt_margin(model, tokenizer, silent)


class Parrot:
    """An engine whose replies are given."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, replies: Sequence[Completion]) -> None:
        self.model, self.tokenizer, self.replies = model, tokenizer, list(replies)

    def generate(self, prompts: Any, params: SamplingParams) -> list[Completion]:
        assert [prompt[-1]["content"] for prompt in prompts] == list(PROMPTS)
        return self.replies


GOOD = (
    "Hello there!", "Very well, thank you.", "My name is Anna.", "From a small town by the sea.",
    "Nothing much, just reading.", "Yes, mostly jazz.", "Noodles with beef.", "Did you have a hard day?",
    "Two cats and a dog.", "History and French.", "Yes, I need a warmer coat.", "The last one was boring.",
    "Then go to bed early.", "We will visit my parents.", "Sometimes tennis.", "Good luck with it!",
    "Old stories about travel.", "No, I work in a bank.", "My brother lives in Spain.", "See you tomorrow!",
)  # fmt: skip


def score(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], reason: str = "stop", **more: Any
) -> dict[str, bool]:
    replies = [Completion(tokenizer.encode(text), text, reason) for text in texts]
    engine: Any = Parrot(model, tokenizer, replies)
    return chat_quality(engine, more.get("training"), iter(more.get("held_out", ())))["passed"]


def test_good_small_talk_passes_and_each_fault_fails_its_check(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert set(score(model, tokenizer, GOOD).values()) == {True}
    faults = {
        "every reply ends": score(model, tokenizer, GOOD, "length"),
        "dictionary words": score(model, tokenizer, [f"{text} qzx vvrk" for text in GOOD]),
        "distinct-2": score(model, tokenizer, ["I like it very much."] * 20),
    }
    for check, passed in faults.items():
        assert [name for name, kept in passed.items() if not kept] == [check]


def test_a_model_that_says_nothing_fails(model: Transformer, tokenizer: Tokenizer) -> None:
    passed = score(model, tokenizer, [""] * 20)
    assert not passed["dictionary words"]
    assert not passed["distinct-2"]


@pytest.mark.parametrize(("length", "passes"), [(20, True), (21, False)])
def test_a_copied_reply_fails(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, length: int, passes: bool
) -> None:
    """At most 20 tokens in a row may stand in a training conversation."""
    ids = tokenizer.encode(" ".join(GOOD))
    with atomic_folder(tmp_path / "shards") as folder:
        writer = ShardWriter(folder, "text", tokenizer.vocab_size, "t")
        writer.add([0, *ids[:length], 0], None, 1)
        writer.close()
    replies = [Completion(ids, text, "stop") for text in GOOD]
    engine: Any = Parrot(model, tokenizer, replies)
    result = chat_quality(engine, Shards(tmp_path / "shards"), iter(()))
    assert result["passed"]["no long copy"] is passes
    assert result["longest_copy"] == length


def test_the_real_engine_is_scored_in_whole(folder: Path) -> None:
    """Figures agree with the replies that are shown, and the same seed gives the same."""
    engine = Engine(*load(folder, torch.float32))
    result, again = (chat_quality(engine, None, iter(TWO), seed=3) for _ in range(2))
    assert result == again
    replies = [example["reply"] for example in result["examples"]]
    assert [example["prompt"] for example in result["examples"]] == list(PROMPTS)
    assert result["distinct_2"] == distinct_n(replies)
    assert result["dictionary_words"] == dictionary_share(replies, english_words())[0]
    assert result["passed"]["own prompt helps"] == (result["prompt_margin"]["low"] > 0)
    assert result["passed"].keys() == {check["check"] for check in result["checks"]}
