"""/tokenize shows the tokens that a chat of the same messages and tools is made of."""

from collections.abc import Iterator
from typing import Any

import pytest
from small_servers import ask, listening, tiny_app

HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
BARE_TOOL = {"type": "function", "function": {"name": "look"}}
CALL = {"id": "a1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLED = [
    HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1", "content": "gold"},
]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with listening(tiny_app(tmp_path_factory.mktemp("tokenize"))) as found:
        yield found


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": [HI]},
        {"messages": [HI], "tools": [TOOL]},
        {"messages": [HI], "tools": [BARE_TOOL]},
        {"messages": CALLED, "tools": [TOOL]},
        {"messages": CALLED},
    ],
    ids=["plain", "tools", "tool without parameters", "calls", "calls without tools"],
)
def test_it_counts_what_a_chat_reads(port: int, asked: dict[str, Any]) -> None:
    chat = ask(port, "/v1/chat/completions", {**asked, "model": "tiny", "max_tokens": 1})
    found = ask(port, "/tokenize", {**asked, "return_token_strs": True})
    assert (chat.status, found.status) == (200, 200), (chat.body, found.body)
    assert found.json["count"] == chat.json["usage"]["prompt_tokens"]
    text = "".join(found.json["token_strs"])
    assert ("look" in text) == ("tools" in asked or asked["messages"] is CALLED)


def test_an_embedding_of_more_than_the_context_says_so_in_its_code(port: int) -> None:
    found = ask(port, "/v1/embeddings", {"model": "tiny", "input": "word " * 2000})
    assert (found.status, found.json["error"]["code"]) == (400, "context_length_exceeded")
