"""Conversations: the known forms of a row, as one list of `{"role", "content"}`."""

from typing import Any

from danlu.core.errors import UserError

Messages = list[dict[str, Any]]

ROLES = {"system", "user", "assistant", "tool"}
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_KEYS = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt-completion": {"prompt", "completion"},
    "text": {"text"},
}
"""Form → keys that a row of it has; the first match counts."""


def detect_format(row: dict[str, Any]) -> str | None:
    """messages, sharegpt, alpaca, prompt-completion, text, or None."""
    return next((name for name, keys in _KEYS.items() if keys <= row.keys()), None)


def to_messages(row: dict[str, Any], where: str) -> Messages | None:
    """The conversation in a row; None where it holds none. `where` names the row in errors."""
    form = detect_format(row)
    if form == "messages":
        messages = row["messages"]
    elif form == "sharegpt":
        messages = [_from_sharegpt(turn, where) for turn in _list(row["conversations"], where)]
    elif form == "alpaca":
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        messages = _exchange(question, row["output"])
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    elif form == "prompt-completion":
        messages = _exchange(row["prompt"], row["completion"])
    else:
        return None
    return check_messages(messages, where)


def check_messages(messages: Any, where: str) -> Messages:
    """The messages themselves. Raises UserError for what isn't a list of them, or is an empty one."""
    for number, message in enumerate(_list(messages, where), 1):
        _check_message(message, f"{where}, message {number}")
    return messages


def _exchange(question: Any, answer: Any) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_sharegpt(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise UserError(f'{where}: a ShareGPT turn needs "from" and "value"')
    role = turn["from"]
    return {"role": _SHAREGPT.get(role, role) if isinstance(role, str) else role, "content": turn["value"]}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of messages that isn't empty")
    return value


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f'{where}: a message needs "role" and "content"')
    if not isinstance(message["role"], str) or message["role"] not in ROLES:
        raise UserError(f"{where}: unknown role {message['role']!r}", f"known: {', '.join(sorted(ROLES))}")
    if not isinstance(message["content"], str):
        raise UserError(f"{where}: content is not text")


def has_reply(messages: Messages) -> bool:
    """Whether an assistant says anything: without it there is nothing to learn."""
    return any(m["role"] == "assistant" and m["content"].strip() for m in messages)


def require_reply(messages: Messages, where: str) -> None:
    """Raises UserError where a conversation meant for fine-tuning has no assistant turn."""
    if not has_reply(messages):
        raise UserError(
            f"{where}: no assistant turn, so there is nothing to learn from it",
            "add the reply or remove the row",
        )


def plain_text(messages: Messages) -> str:
    """One line a turn: "A: …" for the user, "B: …" for the assistant, else the role's name."""
    names = {"user": "A", "assistant": "B"}
    return "".join(f"{names.get(m['role'], m['role'])}: {m['content']}\n" for m in messages)
