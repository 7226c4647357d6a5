"""What people prefer, in every known form of a row: a prompt, and replies to it, the best first.

{"prompt": …, "chosen": …, "rejected": …}         texts, or lists of messages
{"chosen": …, "rejected": …}                      two whole conversations that differ in the last reply:
                                                  lists of messages, or Anthropic's transcripts
{"conversations": […], "chosen": {…}, "rejected": {…}}          ShareGPT
{"instruction": …, "input": …, "chosen": …, "rejected": …}      Alpaca
{"prompt": …, "replies": […]}                     the best first
{"prompt": …, "replies": […], "rankings": [[…]]}  each annotator's numbers of replies, the best first
{"message_tree_id": …, "prompt": {…}}             a conversation tree of OpenAssistant
{"prompt": …, "a": …, "b": …, "answer": "b"}      what somebody answered on the page of `danlu eval annotate`;
                                                  a conversation stands in "messages"
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from danlu.core.errors import UserError
from danlu.data.conversations import Messages, check_messages, to_messages

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_SPEAKER = {"Human": "user", "Assistant": "assistant", "prompter": "user", "assistant": "assistant"}
FEW = 7
"""Replies up to which all orders are tried."""


@dataclass(frozen=True)
class Ranked:
    """Replies to one prompt, the best first; the prompt ends with what is answered."""

    prompt: Messages
    replies: list[str]

    @property
    def fault(self) -> str | None:
        """Why nothing can be learnt from it."""
        if not self.replies:
            return "neither reply is better"
        if len(self.replies) < 2:
            return "a ranking of one reply"
        if any(not reply.strip() for reply in self.replies):
            return "an empty reply"
        if len(set(self.replies)) < len(self.replies):
            return "chosen equals rejected" if len(self.replies) == 2 else "two replies are the same"
        return None


def is_ranked(row: dict[str, Any]) -> bool:
    """Whether a row holds preferences in one of the known forms."""
    return (
        {"chosen", "rejected"} <= row.keys()
        or {"prompt", "replies"} <= row.keys()
        or {"message_tree_id", "prompt"} <= row.keys()
        or {"prompt", "a", "b", "answer"} <= row.keys()
    )


def to_ranked(row: dict[str, Any], where: str) -> list[Ranked]:
    """The rankings in a row: one, or of a tree one for each prompt in it that has ranked replies.

    Raises UserError for what is no ranking at all; `fault` says where nothing can be learnt from one.
    """
    if "message_tree_id" in row:
        return _from_tree(row["prompt"], where)
    if "answer" in row and {"a", "b"} <= row.keys():
        return [_checked(_judged(row, where), where)]
    if "replies" in row:
        replies = [_text(reply, where) for reply in _list(row["replies"], where)]
        if "rankings" in row:
            replies = [replies[number] for number in merge_rankings(_orders(row["rankings"], replies, where))]
        return [_checked(Ranked(_prompt(row["prompt"], where), replies), where)]
    if "prompt" in row:
        prompt, replies = _prompt(row["prompt"], where), [_text(row[name], where) for name in PAIR]
    elif "conversations" in row or "instruction" in row:
        asked = {name: value for name, value in row.items() if name not in PAIR}
        messages = to_messages(asked | ({"output": "…"} if "instruction" in row else {}), where) or []
        prompt = messages[:-1] if "instruction" in row else messages
        replies = [_text(row[name], where) for name in PAIR]
    else:
        prompt, replies = _from_whole(row, where)
    return [_checked(Ranked(prompt, replies), where)]


PAIR = ("chosen", "rejected")


def _judged(row: dict[str, Any], where: str) -> Ranked:
    """A pair that somebody has judged; where neither is better, nothing can be learnt."""
    orders = {"a": ("a", "b"), "b": ("b", "a"), "tie": ()}
    if row["answer"] not in orders:
        raise UserError(f"{where}: the answer is {row['answer']!r}", "a, b or tie")
    replies = [_text(row[name], where) for name in orders[row["answer"]]]
    return Ranked(_prompt(row.get("messages", row["prompt"]), where), replies)


def _checked(ranked: Ranked, where: str) -> Ranked:
    check_messages(ranked.prompt, f"{where}, prompt")
    if ranked.prompt[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where}: the prompt ends with the {ranked.prompt[-1]['role']}'s turn", "end it with the user's"
        )
    return ranked


def _from_whole(row: dict[str, Any], where: str) -> tuple[Messages, list[str]]:
    """Two conversations that differ in the last turn."""
    both = [_conversation(row[name], f"{where}, {name}") for name in PAIR]
    heads = [messages[:-1] for messages in both]
    if heads[0] != heads[1]:
        raise UserError(f"{where}: chosen and rejected answer different prompts", "mend or remove the row")
    if any(messages[-1]["role"] != "assistant" for messages in both):
        raise UserError(f"{where}: the last turn is not the assistant's")
    return heads[0], [messages[-1]["content"] for messages in both]


def _conversation(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        return _from_transcript(value, where)
    return check_messages(value, where)


def _from_transcript(text: str, where: str) -> Messages:
    """ "\\n\\nHuman: …\\n\\nAssistant: …" (Bai et al. 2022). Turns of one speaker in a row become one."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise UserError(f'{where}: not a transcript: it begins with no "\\n\\nHuman: "')
    messages: Messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _SPEAKER[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    if len(messages) < 2:
        raise UserError(f"{where}: a transcript of one turn", "it needs a prompt and a reply")
    return messages


def _prompt(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: an empty prompt", "mend or remove the row")
        return [{"role": "user", "content": value}]
    return check_messages(value, f"{where}, prompt")


def _text(value: Any, where: str) -> str:
    """A reply: a text, a message, or a list of one message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if not isinstance(value, str):
        raise UserError(f"{where}: a reply is no text and no message of the assistant")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of replies")
    return value


# Rankings of several people


def _orders(value: Any, replies: Sequence[str], where: str) -> list[list[int]]:
    expected = list(range(len(replies)))
    for order in _list(value, where) or [None]:
        if not isinstance(order, list) or sorted(order) != expected:
            raise UserError(f"{where}: {order} orders not all of the {len(replies)} replies once")
    return value


def merge_rankings(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order from several: the one that the fewest judged pairs contradict (Kemeny 1959).

    `orders`: each a permutation of the same numbers, the best first. Of more than seven replies by Borda's
    count, with ties by the first order.
    """
    numbers = sorted(orders[0])
    places = [{number: place for place, number in enumerate(order)} for order in orders]
    if len(numbers) > FEW:
        return sorted(orders[0], key=lambda number: sum(place[number] for place in places))
    beaten = {
        (a, b): sum(place[a] > place[b] for place in places) for a in numbers for b in numbers if a != b
    }

    def contradictions(order: tuple[int, ...]) -> int:
        return sum(beaten[a, b] for place, a in enumerate(order) for b in order[place + 1 :])

    # Of equally good orders the one that is nearest to the first annotator's.
    best = min(permutations(orders[0]), key=contradictions)
    return list(best)


# OpenAssistant


def _from_tree(root: Any, where: str) -> list[Ranked]:
    """Each prompt with at least two ranked replies that people wrote and that weren't deleted.

    What stands below a message that a model wrote, or that was deleted, is left out with it.
    """
    found: list[Ranked] = []

    def walk(message: dict[str, Any], before: Messages) -> None:
        if message.get("synthetic") or message.get("deleted"):
            return
        here = [*before, {"role": _SPEAKER[message["role"]], "content": message["text"]}]
        below = [
            one for one in message.get("replies", []) if not one.get("synthetic") and not one.get("deleted")
        ]
        if message["role"] == "prompter":
            ranked = sorted(
                (one for one in below if one.get("rank") is not None), key=lambda one: one["rank"]
            )
            replies = list(dict.fromkeys(one["text"] for one in ranked if one["text"].strip()))
            if len(replies) > 1:
                found.append(_checked(Ranked(here, replies), where))
        for one in below:
            walk(one, here)

    try:
        walk(root, [])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: not a tree of OpenAssistant: {error!r}", "mend or remove the row"
        ) from None
    return found
