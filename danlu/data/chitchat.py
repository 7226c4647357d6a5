"""The conversations in the package chitchat-dataset, which is read, not imported."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from danlu.core.errors import UserError
from danlu.data.conversations import Messages, has_reply, plain_text
from danlu.data.documents import Document


def read_chitchat() -> Iterator[Document]:
    """The 7,168 conversations in the package chitchat-dataset, which is read, not imported.

    The first to speak is A, the user; the other is B, the assistant. What one speaker sends in a row is one
    turn, its parts joined by a space. Where nobody answers there is a text, but no `messages`.
    """
    for identifier, conversation in json.loads(chitchat_file().read_text("utf-8")).items():
        speakers: list[str] = []
        messages: Messages = []
        for turn in conversation["messages"]:
            sender = turn[0]["sender"]
            if sender not in speakers:
                speakers.append(sender)
            role = "user" if sender == speakers[0] else "assistant"
            content = " ".join(" ".join(part["text"] for part in turn).split())
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += f" {content}"
            elif content:
                messages.append({"role": role, "content": content})
        yield Document(identifier, plain_text(messages), messages if has_reply(messages) else None)


def chitchat_file() -> Path:
    """Where the package's conversations lie. Raises UserError when it isn't installed."""
    spec = find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package chitchat-dataset is not installed",
            "pip install --no-deps chitchat-dataset==0.9.0",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "dataset.json"
