"""Requests that are wrong, hostile or broken off: each is told so, or closed, and the next one is served.

The model is tiny; the server, its limits and the engine are the real ones.
"""

import contextlib
import dataclasses
import json
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_servers import (
    CONTEXT,
    Answer,
    ask,
    connected,
    listening,
    read_to_end,
    say,
    status_of,
    tiny_app,
)

from danlu.serve import schema
from danlu.serve.app import App
from danlu.web import guard, server
from danlu.web.guard import Guard

pytestmark = pytest.mark.slow

CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE, MARKDOWN, PREFER = "/tokenize", "/detokenize", "/page/markdown", "/page/preference"
SECONDS = 10.0
"""Most that a request may take."""
BODY_BYTES = 2**20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    limits = {"max_pending": 40, "max_body_mb": BODY_BYTES / 2**20, "timeout": SECONDS}
    app = tiny_app(tmp_path_factory.mktemp("serve"), **limits)
    assert isinstance(app.app, Guard)
    app.app.limits = dataclasses.replace(app.app.limits, body_seconds=1)
    return app


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "HEADER_SECONDS", 1.0)
        patch.setattr(server, "FLUSH_SECONDS", 2.0)
        patch.setattr(guard, "_LINGER_SECONDS", 0.5)
        with listening(app) as found:
            yield found


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


GOOD_CHAT: dict[str, Any] = {"model": "tiny", "messages": [user("Hi")], "max_tokens": 2, "temperature": 0}
GOOD_TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Fire", "max_tokens": 2, "temperature": 0}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: GOOD_CHAT,
    COMPLETE: GOOD_TEXT,
    EMBED: {"model": "tiny", "input": "Fire"},
    TOKENIZE: {"model": "tiny", "prompt": "Fire"},
    DETOKENIZE: {"model": "tiny", "tokens": [40, 41]},
    MARKDOWN: {"text": "*a*"},
    PREFER: {
        "row": {"prompt": [user("Hi")], "completion": [{"role": "assistant", "content": "Ho"}], "label": True}
    },
}


def metric(port: int, name: str) -> float:
    """The sum over its labels."""
    told = ask(port, "/metrics").body.decode()
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", told, re.MULTILINE)
    assert found, name
    return sum(map(float, found))


AT_REST = {
    "danlu_answers_pending": 0,
    "danlu_jobs_running": 0,
    "danlu_jobs_waiting": 0,
    "danlu_cache_blocks_in_use": 0,
}


def at_rest(port: int) -> dict[str, float]:
    return {name: metric(port, name) for name in AT_REST}


@pytest.fixture(autouse=True)
def _leaves_nothing(port: int) -> Iterator[None]:
    """Whatever a test asked, the next request is answered, and nothing is kept of it."""
    yield
    answer = ask(port, CHAT, GOOD_CHAT)
    assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 2)
    deadline = time.monotonic() + 5
    while at_rest(port) != AT_REST and time.monotonic() < deadline:
        time.sleep(0.05)
    assert at_rest(port) == AT_REST


def refused(answer: Answer, status: int = 400, param: str | None = None, told: str = "") -> None:
    assert answer.status == status, answer.body[:500]
    schema.ErrorResponse.model_validate_json(answer.body, strict=True)
    error = answer.json["error"]
    assert told in error["message"]
    assert len(answer.body) < 10_000
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("path", GOOD)
def test_good_requests_are_answered(port: int, path: str) -> None:
    assert ask(port, path, GOOD[path]).status == 200


def test_a_key_is_needed_for_all_but_the_page(port: int, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.app, "keys", [b"sk-right"])
    told = ask(port, "/openapi.json").json["paths"]
    assert GOOD.keys() <= told.keys()
    for path in [*told, "/metrics", "/nothing", "/v1/", "//", "/static", "/shared"]:
        if path == "/health":
            continue
        body = GOOD.get(path)
        refused(ask(port, path, body), 401)
        refused(ask(port, path, body, headers={"Authorization": "Bearer sk-wrong"}), 401)
        assert ask(port, path, body, headers={"Authorization": "Bearer sk-right"}).status != 401
    for path in ("/", "/health", "/openapi.json", "/static/index.html", "/shared/base.css"):
        assert ask(port, path).status == 200


# Wrong values

WRONG = (None, True, -1, 1.5, 10**30, "text", "", [], [None], {}, {"a": 1}, [[]], [[1], "a"])


def values_that_are_taken(path: str, field: str) -> Iterator[Any]:
    """Of WRONG those that the types of our own schema take for this field."""
    cls = {
        CHAT: schema.ChatRequest,
        COMPLETE: schema.CompletionRequest,
        EMBED: schema.EmbeddingRequest,
        TOKENIZE: schema.TokenizeRequest,
        DETOKENIZE: schema.DetokenizeRequest,
    }[path]
    for value in WRONG:
        with contextlib.suppress(ValueError):
            cls.model_validate_json(json.dumps({**GOOD[path], field: value}))
            yield value


FIELDS = [
    *((CHAT, name) for name in schema.ChatRequest.model_fields),
    *((COMPLETE, name) for name in schema.CompletionRequest.model_fields),
    *((EMBED, name) for name in schema.EmbeddingRequest.model_fields),
    *((TOKENIZE, name) for name in schema.TokenizeRequest.model_fields),
    *((DETOKENIZE, name) for name in schema.DetokenizeRequest.model_fields),
]


@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_values_of_wrong_types(port: int, path: str, field: str) -> None:
    """Each is answered or refused, never a fault of the server's; and hardly any is taken."""
    taken = [*values_that_are_taken(path, field)]
    assert len(taken) <= 6
    for value in WRONG:
        answer = ask(port, path, {**GOOD[path], field: value})
        if value in taken and type(value) in map(type, taken):
            assert answer.status in (200, 400, 404), (field, value, answer.body[:500])
        else:
            refused(answer, param=field if answer.json["error"]["param"] else None)


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        (CHAT, {"temperature": -1}, "temperature"),
        (CHAT, {"temperature": 101}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"top_p": 1.1}, "top_p"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 129}, "n"),
        (CHAT, {"n": 100}, None),  # more than max_pending
        (COMPLETE, {"best_of": 100}, None),
        (COMPLETE, {"prompt": ["a"] * 41}, None),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 10**9}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 10**9, "max_tokens": None}, "max_tokens"),
        (COMPLETE, {"max_tokens": 10**9}, "max_tokens"),
        (COMPLETE, {"max_tokens": 10**30}, "max_tokens"),
        (CHAT, {"min_tokens": 10**9}, None),
        (CHAT, {"seed": 2**63}, "seed"),
        (CHAT, {"presence_penalty": 3}, "presence_penalty"),
        (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [user([])]}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        (
            CHAT,
            {"messages": [user([{"type": "image_url", "image_url": {"url": "https://a.example"}}])]},
            "messages",
        ),
        (CHAT, {"messages": [user([{"type": "input_audio", "input_audio": {"data": ""}}])]}, "messages"),
        (CHAT, {"messages": [user("x" * 8 * CONTEXT)]}, None),
        (COMPLETE, {"prompt": "x" * 8 * CONTEXT}, None),
        (COMPLETE, {"prompt": [5] * CONTEXT}, None),
        (COMPLETE, {"prompt": [5] * (CONTEXT + 1), "max_tokens": 0, "echo": True}, None),
        (EMBED, {"input": "x" * 8 * CONTEXT}, None),
        (COMPLETE, {"prompt": [10**6]}, None),
        (COMPLETE, {"prompt": [10**6], "echo": True, "max_tokens": 0, "logprobs": 1}, None),
        (EMBED, {"input": [[1], [10**6]]}, None),
        (EMBED, {"input": ""}, "input"),
        (EMBED, {"input": [""]}, "input"),
        (EMBED, {"dimensions": 7}, "dimensions"),
        (DETOKENIZE, {"tokens": [10**6]}, "tokens"),
        (DETOKENIZE, {"tokens": [2**31]}, "tokens"),
        (CHAT, {"stop": ""}, None),
        (CHAT, {"stop": ["a", ""]}, None),
        (CHAT, {"stop": ["a"] * 17}, "stop"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias"),
        (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"1000000": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"٣": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (CHAT, {"stop_token_ids": [10**6]}, "stop_token_ids"),
        (CHAT, {"stop_token_ids": [2**31 - 1], "guided_regex": "a+"}, "stop_token_ids"),
        (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (CHAT, {"stream_options": {"include_usage": True}}, None),
        (CHAT, {"top_logprobs": 5}, None),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (COMPLETE, {"suffix": "x"}, "suffix"),
        (COMPLETE, {"max_tokens": 0}, None),
        (COMPLETE, {"n": 3, "best_of": 2}, None),
        (CHAT, {"tool_choice": "required"}, None),
        (CHAT, {"tool_choice": "auto"}, None),
        (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, None),
        (CHAT, {"guided_choice": []}, "guided_choice"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
        (TOKENIZE, {"messages": [user("Hi")]}, None),
        (TOKENIZE, {"prompt": None}, None),
    ],
)
def test_values_out_of_range(port: int, path: str, changes: dict[str, Any], param: str | None) -> None:
    refused(ask(port, path, {**GOOD[path], **changes}), param=param)


@pytest.mark.parametrize("path", [CHAT, COMPLETE, EMBED, TOKENIZE, DETOKENIZE])
def test_models_and_keys_that_are_not_known(port: int, path: str) -> None:
    for name in ("gpt-9", "", "TINY", "../tiny", "x" * 500, "tiny\u0000"):
        refused(ask(port, path, {**GOOD[path], "model": name}), 404, "model", "tiny")
    refused(ask(port, path, {**GOOD[path], "model": "x" * 513}), 400, "model")
    refused(ask(port, path, {**GOOD[path], "temprature": 1}), 400, "temprature", "not known")
    refused(ask(port, path, {**GOOD[path], "x" * 500_000: 1}), 400)


def test_a_key_that_is_nearly_right_is_told(port: int) -> None:
    refused(ask(port, CHAT, {**GOOD_CHAT, "temprature": 1}), told='"temperature"')


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def tool(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "parameters": parameters}}


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL], "tool_choice": "look"},
        {"tools": [{"type": "retrieval"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"},
        {"tools": [tool(**{"$defs": 5})], "tool_choice": "required"},
        {"tools": [tool(**{"$defs": [1]})], "tool_choice": "required"},
        {"tools": [tool(definitions="x")], "tool_choice": "required"},
        {"tools": [tool(**{"$defs": {"a": 1}}), tool(**{"$defs": {"a": 2}})], "tool_choice": "required"},
        {"tools": [tool(**{"$ref": "https://evil.example/x"})], "tool_choice": "required"},
        {"tools": [tool(**{"$ref": "#/nowhere"})], "tool_choice": "required"},
        {"tools": [tool(type="nonsense")], "tool_choice": "required"},
        {"tools": [tool(properties=7)], "tool_choice": "required"},
        {
            "messages": [
                user("Hi"),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "look", "arguments": "[" * 100_000},
                        }
                    ],
                },
            ]
        },
        {
            "messages": [
                user("Hi"),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "look", "arguments": "9" * 5000}}
                    ],
                },
            ]
        },
    ],
)
def test_tools_that_cannot_be_called(port: int, changes: dict[str, Any]) -> None:
    refused(ask(port, CHAT, {**GOOD_CHAT, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"guided_regex": "("},
        {"guided_regex": "[z-a]"},
        {"guided_regex": "(?=a)"},
        {"guided_regex": r"(a)\1"},
        {"guided_regex": "*"},
        {"guided_regex": "(" * 5000 + ")" * 5000},
        {"guided_json": "no json"},
        {"guided_json": "[]"},
        {"guided_json": "[" * 100_000},
        {"guided_json": '{"a":' * 5000 + "1" + "}" * 5000},
        {"guided_json": {"type": "nonsense"}},
        {"guided_json": {"type": 5}},
        {"guided_json": {"$ref": "#/nowhere"}},
        {"guided_json": {"enum": []}},
        {"guided_json": {"$ref": "file:///etc/passwd"}},
        {"guided_json": {"pattern": "(", "type": "string"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"minimum": "a", "type": "integer"}},
            }
        },
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"guided_json": {"x-guidance": {"nonsense": 1}}},
        {"guided_json": {"x-guidance": 5}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_forms_that_cannot_be_followed(port: int, changes: dict[str, Any]) -> None:
    begin = time.monotonic()
    answer = ask(port, CHAT, {**GOOD_CHAT, **changes})
    refused(answer)
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize(
    "changes",
    [
        {"guided_regex": "[a-z]{1,100000}"},
        {"guided_regex": "(a|b|ab)*" * 1000},
        {"guided_regex": "(.*a.*b){40}"},
        {"guided_regex": "((a{100}){100}){100}"},
        {"guided_regex": r"\p{L}" * 10_000},
        {"guided_regex": "(" + "|".join(f"x{n}y" for n in range(10_000)) + ")"},
        {"guided_choice": [f"choice number {n}" for n in range(1024)]},
        {"guided_choice": ["x" * 50_000]},
        {"guided_choice": ["金" * 100 + str(n) for n in range(1024)]},
        {"guided_json": {"enum": [f"x{n}" for n in range(20_000)]}},
        {"guided_json": {"type": "object", "properties": {f"x{n}": {"type": "string"} for n in range(20)}}},
        {
            "guided_json": {
                "type": "object",
                "properties": {f"x{n}": {"type": "string"} for n in range(3000)},
            },
            "n": 20,
        },
        {
            "guided_json": {
                "type": "object",
                "properties": {f"x{n}": {"type": "string"} for n in range(30_000)},
            }
        },
        {"guided_regex": "a{1000000000}"},
        {"guided_regex": "a/\nb: /c"},
        {"guided_regex": "\\"},
        {
            "guided_json": {
                "type": "array",
                "minItems": 10**6,
                "items": {"type": "object", "minProperties": 1000},
            }
        },
        {"guided_json": {"type": "string", "minLength": 10**6}},
        {
            "guided_json": {
                "allOf": [
                    {"anyOf": [{"type": "string", "pattern": f"^.*{n}.*{m}$"} for n in range(9)]}
                    for m in range(9)
                ]
            }
        },
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_large_forms_hold_nobody_up(port: int, changes: dict[str, Any]) -> None:
    """Followed or refused, in a request's time; and not at the expense of others."""
    begin = time.monotonic()
    answer = ask(port, CHAT, {**GOOD_CHAT, **changes})
    assert answer.status in (200, 400), answer.body[:300]
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {str(token): -100 for token in range(330)}},
        {"guided_regex": "a", "logit_bias": {str(token): -100 for token in range(330)}},
        {"guided_regex": "金", "stop": ["金"]},
        {"guided_regex": "", "min_tokens": 2, "max_tokens": 2},
        {"guided_choice": [""]},
        {"guided_choice": ["a"], "min_tokens": 5, "max_tokens": 5},
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"temperature": 1e-40, "top_p": 1e-40},
        {"temperature": 100},
        {"temperature": 1, "top_p": 5e-324},
        {"temperature": 1, "min_p": 1},
        {"temperature": 1, "typical_p": 5e-324},
        {"repetition_penalty": 1e-320},
        {"repetition_penalty": 1e-30, "temperature": 1},
        {"repetition_penalty": 1000},
        {"no_repeat_ngram_size": 1, "max_tokens": 900},
        {"no_repeat_ngram_size": 10**6},
        {"seed": 2**63 - 1, "n": 2},
        {"seed": -(2**63), "temperature": 1},
        {"top_k": 10**9, "temperature": 1},
        {"stop_token_ids": [*range(250)], "min_tokens": 2},
        {"ignore_eos": True, "max_tokens": 50},
        {"stop": "x" * 100_000},
        {"stop": ["\u0000", "\ufffd"]},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_extremes_are_the_sender_s_own_matter(port: int, path: str, changes: dict[str, Any]) -> None:
    """Whatever comes of it, another answer that is computed in the same batch is none the worse for it."""
    plain = ask(port, CHAT, {**GOOD_CHAT, "max_tokens": 100, "min_tokens": 100}).json["choices"][0]["message"]
    with connected(port) as connection:
        connection.sendall(post(CHAT, {**GOOD_CHAT, "max_tokens": 100, "min_tokens": 100}, close=True))
        answer = ask(port, path, {**GOOD[path], **changes})
        assert answer.status in (200, 400), answer.body[:500]
        if answer.status == 400:
            refused(answer)
        beside = read_to_end(connection)
    assert status_of(beside) == 200
    assert json.loads(beside.partition(b"\r\n\r\n")[2])["choices"][0]["message"] == plain


def test_a_request_that_names_many_wrong_values_is_refused_soon(port: int) -> None:
    """A line of complaint for each would take all the memory there is, and everybody waits for it."""
    many = [""] * 200_000
    for path, changes in [
        (COMPLETE, {"prompt": [1, *many]}),
        (EMBED, {"input": [1, *many]}),
        (DETOKENIZE, {"tokens": many}),
        (CHAT, {"logit_bias": dict.fromkeys(map(str, range(50_000)), "x")}),
        (CHAT, {"stop": [1] * 200_000}),
        (CHAT, {"guided_choice": [1] * 200_000}),
        (CHAT, {"messages": [{}] * 200_000}),
        (CHAT, {"messages": [user([{}] * 200_000)]}),
        (CHAT, {"tools": [{}] * 200_000}),
        (CHAT, {f"x{n}": 1 for n in range(50_000)}),
    ]:
        begin = time.monotonic()
        refused(ask(port, path, {**GOOD[path], **changes}))
        assert time.monotonic() - begin < 2, (path, [*changes])


def test_many_short_messages_are_answered_soon(port: int) -> None:
    turns = [user("a"), {"role": "assistant", "content": "b"}] * 2000
    begin = time.monotonic()
    refused(ask(port, CHAT, {**GOOD_CHAT, "messages": [*turns, user("a")]}))
    assert time.monotonic() - begin < SECONDS


# Wrong JSON


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b"{",
        b"{}",
        b'{"model"}',
        b"{'model': 'tiny'}",
        b"\xff\xfe\x00",
        b'{"model": "\xff\xfe"}',
        b"\x1f\x8b\x08\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{" * 100_000,
        b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"model": -Infinity}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\udc00x"}',
        b'{"model": "a\x00b"}',
        b'{"model": "a\nb"}',
        b'{"model": 1' + b"0" * 5000 + b"}",
        b'{"model": 1e999999}',
        b"model=tiny",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--",
        b"{}{}",
        b"{},",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_or_no_request(port: int, path: str, body: bytes) -> None:
    refused(ask(port, path, body))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
def test_numbers_that_are_none(port: int, field: str, value: str) -> None:
    body = json.dumps({**GOOD_CHAT, field: "HERE"}).replace('"HERE"', value)
    refused(ask(port, CHAT, body.encode()), param=field)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_deep_inside(port: int, value: str, tmp_path: Path) -> None:
    row = {**GOOD[PREFER]["row"], "made": ["HERE"]}
    for path, request in [
        (CHAT, {**GOOD_CHAT, "logit_bias": {"5": "HERE"}}),
        (CHAT, {**GOOD_CHAT, "guided_json": {"const": "HERE"}}),
        (PREFER, {"row": row}),
    ]:
        refused(ask(port, path, json.dumps(request).replace('"HERE"', value).encode()))


def test_of_two_keys_the_last_one_counts(port: int) -> None:
    """As in Python's and JavaScript's own readers."""
    body = json.dumps(GOOD_CHAT)[:-1] + ', "max_tokens": 1}'
    assert ask(port, CHAT, body.encode()).json["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "text", ["\u0000", "a\u0000b", "\ufffe", "😀", "\u202e", "\x7f", "\ufeff", " ", "\n"]
)
def test_strange_characters_are_only_characters(port: int, text: str) -> None:
    assert ask(port, CHAT, {**GOOD_CHAT, "messages": [user(text)]}).status == 200
    assert (
        ask(port, COMPLETE, {**GOOD_TEXT, "prompt": text, "echo": True})
        .json["choices"][0]["text"]
        .startswith(text)
    )
    tokens = ask(
        port, TOKENIZE, {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
    ).json["tokens"]
    assert ask(port, DETOKENIZE, {"tokens": tokens}).json == {"prompt": text}


def test_noncharacters_of_our_own_are_refused(port: int) -> None:
    refused(ask(port, CHAT, {**GOOD_CHAT, "messages": [user("\ufdd0")]}))


# Wrong requests


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x"]
)
def test_other_content_types(port: int, kind: str) -> None:
    """What a page elsewhere can send without asking first is never taken."""
    for path, body in GOOD.items():
        refused(ask(port, path, body, headers={"Content-Type": kind}), 415)


def test_the_content_type_may_say_more(port: int) -> None:
    assert (
        ask(port, CHAT, GOOD_CHAT, headers={"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
    )


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods(port: int, method: str) -> None:
    for path in GOOD:
        answer = ask(port, path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert ask(port, "/health", method="PUT").status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v2/chat/completions",
        "/v1/chat",
        "/v1/models/tiny/x",
        "//v1/models",
        "/admin",
        "/docs",
        "/.env",
        "/static/../app.py",
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/%2e%2e/app.py",
        "/static/%2e%2e%2fapp.py",
        "/static/..\\app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/%00",
        "/static/.",
        "/static/....//app.py",
        "/static/%252e%252e/app.py",
        "/static/" + "x" * 5000,
        "/static/" + "a/" * 5000,
        "/shared/../guard.py",
        "/shared/..%2fguard.py",
        "/shared/%2e%2e/%2e%2e/serve/app.py",
        "/shared/..%5cguard.py",
        "/shared/",
        "/static/",
        "/shared/~root",
        "/static/index.html%00.js",
        "/%ff%fe",
        "/%01",
    ],
)
def test_paths_where_nothing_is(port: int, path: str) -> None:
    data = say(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert status_of(data) == 404
    assert b"import" not in data
    schema.ErrorResponse.model_validate_json(data.partition(b"\r\n\r\n")[2])


def test_paths_do_not_become_metrics(port: int) -> None:
    """Else anybody could fill the memory with names."""
    for number in range(50):
        ask(port, f"/v1/unknown-{number}")
        ask(port, f"/page/unknown-{number}", headers={"Host": "evil.example"})
    told = ask(port, "/metrics").body.decode()
    assert "unknown-" not in told
    assert 'danlu_requests_total{path="other",status="421"}' in told


def test_a_body_beyond_the_limit(port: int) -> None:
    text = {**GOOD_CHAT, "messages": [user("x" * BODY_BYTES)]}
    refused(ask(port, CHAT, text), 413)
    refused(ask(port, CHAT, b" " * 3 * BODY_BYTES), 413)
    refused(ask(port, MARKDOWN, {"text": "x" * 500_001}), 400, "text")


def test_embeddings_leave_the_count_of_what_is_pending_as_it_was(port: int) -> None:
    """A chat that begins and ends beside one must not leave it counted."""
    with connected(port) as connection:
        connection.sendall(post(EMBED, {"model": "tiny", "input": ["Fire"] * 300}, close=True))
        while not select.select([connection], [], [], 0)[0]:
            assert ask(port, CHAT, GOOD_CHAT).status == 200
        assert status_of(read_to_end(connection)) == 200
    assert metric(port, "danlu_answers_pending") == 0


# Broken connections


def post(path: str, body: Any, close: bool = False) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = b"Connection: close\r\n" if close else b""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + more + b"Content-Length: %d\r\n\r\n" % len(data) + data


LONG_STREAM = {
    **GOOD_CHAT,
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 900,
    "n": 20,
    "logprobs": True,
    "top_logprobs": 20,
}
"""Megabytes, and some seconds."""


def test_a_body_that_stops_halfway(port: int) -> None:
    whole = post(CHAT, GOOD_CHAT)
    begin = time.monotonic()
    assert status_of(say(port, whole[:-10])) == 408
    assert time.monotonic() - begin < 6


def test_a_client_that_goes_while_it_sends(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is at fault then: no error in the log, no failed request in the metrics."""
    for cut in (1, 10, 60, len(post(CHAT, GOOD_CHAT)) - 1):
        with connected(port) as connection:
            connection.sendall(post(CHAT, GOOD_CHAT)[:cut])
    time.sleep(0.3)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert 'status="500"' not in ask(port, "/metrics").body.decode()


def test_requests_that_arrive_byte_by_byte(port: int) -> None:
    with connected(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(CHAT, GOOD_CHAT, close=True):
            connection.sendall(bytes([byte]))
            time.sleep(0.001)
        assert status_of(read_to_end(connection)) == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("resets", [True, False])
def test_clients_that_go_in_the_middle(port: int, path: str, stream: bool, resets: bool) -> None:
    """What they asked for is given up, long before it would be whole."""
    asked = {**GOOD[path], "stream": stream, "ignore_eos": True, "max_tokens": 900, "n": 10}
    cancelled = _cancelled(port)
    with connected(port) as connection:
        connection.sendall(post(path, asked))
        deadline = time.monotonic() + 5
        while metric(port, "danlu_jobs_running") == 0 and time.monotonic() < deadline:
            pass
        if stream:
            assert status_of(connection.recv(4096)) == 200
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline = time.monotonic() + 2
    while at_rest(port) != AT_REST and time.monotonic() < deadline:
        time.sleep(0.02)
    assert at_rest(port) == AT_REST
    assert _cancelled(port) >= cancelled + 1


def _cancelled(port: int) -> float:
    told = ask(port, "/metrics").body.decode()
    found = re.search(r'^danlu_answers_total{reason="cancelled"} (\S+)$', told, re.MULTILINE)
    return float(found[1]) if found else 0


def test_a_client_that_goes_with_more_requests_behind(port: int) -> None:
    """uvicorn tells only the last request of a connection that it is lost."""
    with connected(port) as connection:
        connection.sendall(post(CHAT, LONG_STREAM) + post(CHAT, LONG_STREAM))
        assert status_of(connection.recv(4096)) == 200
    deadline = time.monotonic() + 2
    while at_rest(port) != AT_REST and time.monotonic() < deadline:
        time.sleep(0.02)
    assert at_rest(port) == AT_REST


def test_a_stream_that_nobody_reads_is_cut_in_time(port: int) -> None:
    begin = time.monotonic()
    with connected(port, receives=4096) as connection:
        connection.sendall(post(CHAT, LONG_STREAM))
        time.sleep(1)
        assert metric(port, "danlu_answers_pending") > 0
        while metric(port, "danlu_answers_pending") > 0:
            time.sleep(0.1)
            assert time.monotonic() - begin < SECONDS + 5
        data = read_to_end(connection)
    assert status_of(data) == 200
    assert b"[DONE]" not in data


def test_garbage_behind_a_request_that_is_answered(port: int) -> None:
    """The stream is cut; the complaint doesn't stand in the middle of it."""
    with connected(port) as connection:
        connection.sendall(post(CHAT, LONG_STREAM))
        begun = connection.recv(4096)
        connection.sendall(b"\x00\x01garbage\r\n\r\n")
        data = begun + read_to_end(connection)
    assert data.count(b"HTTP/1.1 ") == 1


def test_many_of_all_kinds_at_once(port: int) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(port)) for _ in range(100)]
        for number, one in enumerate(held):
            one.sendall(
                [b"", b"GET / HT", post(CHAT, GOOD_CHAT)[:-5], post(CHAT, GOOD_CHAT), b"\x16\x03\x01"][
                    number % 5
                ]
            )
        begin = time.monotonic()
        assert ask(port, CHAT, GOOD_CHAT).status == 200
        assert time.monotonic() - begin < 5
        for number, one in enumerate(held):
            if number % 5 != 3:
                read_to_end(one)
    assert time.monotonic() - begin < 15
