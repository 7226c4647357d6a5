"""Schemas and regular expressions: what is allowed, by enumeration, and what random models then write."""

import json
import re
from typing import Any

import pytest
import tokenizers
import torch

from danlu.core.errors import UserError
from danlu.generate.constraints import Matcher, compile_regex, compile_schema
from danlu.generate.engine import Engine
from danlu.generate.sampling import Row, RowError, SamplingParams, process
from danlu.tokens.tokenizer import Tokenizer

pytest.importorskip("llguidance")


def tiny() -> Tokenizer:
    """Entries that overlap, one that is written twice, single bytes of 丹, and a token that ends."""
    names = [
        "a",
        "b",
        "ab",
        "ba",
        "aab",
        '"',
        "1",
        "12",
        "{",
        "}",
        ":",
        "[",
        "]",
        ",",
        "-",
        " ",
        "\n",
        "0",
        ".",
    ]
    names += [f"<0x{byte:02X}>" for byte in "丹".encode()] + ["<0x61>"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.ByteFallback()
    backend.add_special_tokens(["<end>", "<other>"])
    return Tokenizer(backend, None, "<end>", ["<end>"], "")


TINY = tiny()
LONGEST = 5
FEW = ["a", "b", '"', "1", "2", "丹", "{", "0"]
MANY = [*FEW, *"}:[],- \n.", *"丸乸乹"]
"""Every character that the vocabulary can write."""
REGEXES = ["a+b", "(ab|ba)*", "a{3}", "a?b?", "丹|a", '"(1|12)*"', "(a|aa)(b|ab)", "1[0-2]{0,2}"]
ANY = ["[^a]b", ".b", "[一-龥]", r"[^\d]{2}"]


def language(regex: str) -> set[bytes]:
    """All that it matches of so many characters, by Python's own engine."""
    found, pattern = set(), re.compile(regex)
    characters, longest = (FEW, LONGEST) if regex in REGEXES else (MANY, 2)
    texts = [""]
    for _ in range(longest + 1):
        found |= {text.encode() for text in texts if pattern.fullmatch(text)}
        texts = [text + character for text in texts for character in characters]
    return found


def by_enumeration(words: set[bytes], written: bytes) -> set[int]:
    """Tokens that some word goes on with, and the end where the text is a word."""
    found = set()
    for token, raw in enumerate(TINY.token_bytes):
        if raw and any(word.startswith(written + raw) for word in words):
            found.add(token)
    return found | (set(TINY.stop_ids) if written in words else set())


@pytest.mark.parametrize("regex", REGEXES + ANY)
def test_what_is_allowed_is_what_some_match_goes_on_with(regex: str) -> None:
    """After every way of writing up to two tokens, where the words enumerated are long enough to tell."""
    words, size = language(regex), TINY.vocab_size
    paths: list[list[int]] = [[]]
    for path in paths:
        matcher = Matcher(TINY, compile_regex(regex))
        for token in path:
            matcher.accept(token)
        written = TINY.decode_bytes(path)
        allowed = set(matcher.allowed(size + 3, TINY.stop_ids).nonzero()[:, 0].tolist())
        told = {token for token in range(size) if len(written + TINY.token_bytes[token]) < LONGEST}
        assert allowed & told == by_enumeration(words, written) & told, (regex, written)
        if len(path) < 2:
            paths += [[*path, token] for token in sorted(allowed - set(TINY.stop_ids))]
    assert len(paths) > 2


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["hot", "丹"]}, "maxItems": 2},
        "fine": {"type": "boolean"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def follows(value: Any) -> bool:
    """SCHEMA, read by hand."""
    return (
        {"name", "age", "tags"} <= set(value) <= set(SCHEMA["properties"])
        and isinstance(value["name"], str) and len(value["name"]) <= 6
        and type(value["age"]) is int and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 2 and set(value["tags"]) <= {"hot", "丹"}
        and type(value.get("fine", True)) is bool
    )  # fmt: skip


def test_a_random_models_answers_follow_the_schema(engine: Engine) -> None:
    answers = [
        engine.generate(
            ["The", "🔥"], SamplingParams(max_tokens=120, temperature=2.0, seed=seed, schema=SCHEMA)
        )
        for seed in range(6)
    ]
    ended = [answer for pair in answers for answer in pair if answer.finish_reason == "stop"]
    assert len(ended) > 8
    assert all(follows(json.loads(answer.text)) for answer in ended)
    assert len({answer.text for answer in ended}) == len(ended)


@pytest.mark.parametrize(
    "regex", [r"\d{4}-\d\d-\d\d", "(yes|no)( 🔥)?", r"[A-Z][a-z]{2,8}\.", "丹炉{1,3}|gold/fire\n"]
)
@pytest.mark.parametrize("stop_ids", [None, ()])
def test_a_random_models_answers_match_the_regex(
    engine: Engine, regex: str, stop_ids: tuple[int, ...] | None
) -> None:
    """Without a stop token the answer ends where nothing more can match."""
    params = SamplingParams(max_tokens=60, temperature=1.5, regex=regex, stop_ids=stop_ids)
    for answer in engine.generate(["The", "🔥", "gold"], params):
        assert re.fullmatch(regex, answer.text), answer.text
        assert answer.finish_reason == "stop"


def test_a_stop_token_that_spells_a_part_of_the_answer_waits_for_its_end(tokenizer: Tokenizer) -> None:
    comma, other = (tokenizer.encode(text)[0] for text in ",b")
    params = SamplingParams(regex="a,?b[,]?", stop_ids=(comma,), temperature=1.0)
    row = Row([5], params, tokenizer)
    row.accept(tokenizer.encode("a")[0])
    assert process(torch.zeros(1, 330), [row], [params])[0].exp().nonzero()[:, 0].tolist() == [other]
    row.accept(other)
    assert process(torch.zeros(1, 330), [row], [params])[0].exp().nonzero()[:, 0].tolist() == [comma]


def test_rows_without_a_constraint_are_untouched(tokenizer: Tokenizer) -> None:
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, regex="a")]
    rows = [Row([5], own, tokenizer) for own in params]
    logits = torch.randn(2, 340, generator=torch.Generator().manual_seed(0))
    found = process(logits, rows, params)
    assert torch.equal(found[0], logits[0])
    assert (found[1] > -torch.inf).nonzero()[:, 0].tolist() == tokenizer.encode("a")


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        ("a(", "unclosed group"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences are not supported"),
        ("[", "unclosed character class"),
    ],
)
def test_an_invalid_regex_is_refused(regex: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^the regex can't be used: .*{message}"):
        compile_regex(regex)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "the schema is not JSON"),
        ("[1]", "the schema is not an object"),
        ('{"type": "text"}', "the schema can't be used: Invalid type: text"),
        ('{"not": {}}', "Unimplemented keys"),
        ('{"type": "integer", "minimum": 3, "maximum": 2}', "Unsatisfiable schema"),
        ('{"$ref": "#/nowhere"}', "does not exist"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        compile_schema(schema)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("regex", ["x", "xa|yb"])
def test_what_no_token_can_begin_is_refused_before_anything_is_read(regex: str) -> None:
    with pytest.raises(UserError, match="no token of the vocabulary can follow"):
        Row([0], SamplingParams(regex=regex), TINY)


def test_what_no_token_can_go_on_with_is_an_error_of_its_row() -> None:
    params = SamplingParams(regex="ax")
    row = Row([0], params, TINY)
    row.accept(0)
    with pytest.raises(RowError, match="no token of the vocabulary can follow") as caught:
        process(torch.zeros(1, TINY.vocab_size), [row], [params])
    assert caught.value.row is row


def test_a_token_that_is_not_allowed_is_not_accepted() -> None:
    with pytest.raises(ValueError, match="does not allow the token 1 "):
        Matcher(TINY, compile_regex("a")).accept(1)
