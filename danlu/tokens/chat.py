"""One renderer from a conversation to ids and loss mask, for training and for serving.

The template writes the turns with each content between two marks, which no text holds; the marks say
where contents are, and are taken out again. So content is encoded as plain text whatever it spells, the
frame around it with its special tokens, and the mask is known, not guessed. Since each piece is encoded by
itself, the ids of a training example begin with exactly the ids that serving would prompt with.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.tokens.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Unicode noncharacters: reserved for a program's own use, never part of a text."""

_CONTENT = re.compile(f"{_OPEN}([au])(.*?){_CLOSE}", re.DOTALL)


@dataclass
class Rendered:
    """A conversation as the model sees it: ids, and for each whether it is learnt."""

    ids: list[int]
    mask: list[bool]


def render(messages: Messages, tokenizer: Tokenizer, longest_reply: int = 0) -> Rendered:
    """Ids and loss mask: what the assistant says, and the token that ends its turn, are learnt.

    Replies of more than `longest_reply` tokens are not learnt (0 = all are).
    """
    return _encode(messages, tokenizer, add_generation_prompt=False, longest_reply=longest_reply)


def render_prompt(messages: Messages, tokenizer: Tokenizer) -> list[int]:
    """Ids up to where the assistant's next turn begins: what serving hands to the model."""
    return _encode(messages, tokenizer, add_generation_prompt=True).ids


def render_text(messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = False) -> str:
    """The same as text."""
    return _run_template(tokenizer.chat_template, messages, add_generation_prompt)


def _encode(
    messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool, longest_reply: int = 0
) -> Rendered:
    out = Rendered([], [])
    ends_turn = False
    for text, kind in _pieces(messages, tokenizer.chat_template, add_generation_prompt):
        if kind == "frame":
            for ids in _frame(text, tokenizer):
                learnt = ends_turn and ids[0] in tokenizer.stop_ids
                out.ids += ids
                out.mask += [learnt] * len(ids)
                ends_turn = False
        else:
            ids = tokenizer.encode(text)
            learnt = kind == "assistant" and (not longest_reply or len(ids) <= longest_reply)
            out.ids += ids
            out.mask += [learnt] * len(ids)
            ends_turn = learnt
    return out


def _pieces(messages: Messages, template: str, add_generation_prompt: bool) -> list[tuple[str, str]]:
    """(text, "frame" | "assistant" | "other"), in order."""
    marked = []
    for message in messages:
        content = message["content"]
        if _OPEN in content or _CLOSE in content:
            raise UserError("a message holds a Unicode noncharacter (U+FDD0 or U+FDD1)", "remove it")
        who = "a" if message["role"] == "assistant" else "u"
        marked.append({**message, "content": f"{_OPEN}{who}{content}{_CLOSE}"})
    text = _run_template(template, marked, add_generation_prompt)
    plain = _run_template(template, messages, add_generation_prompt)
    pieces, end = [], 0
    for match in _CONTENT.finditer(text):
        pieces.append((text[end : match.start()], "frame"))
        pieces.append((match[2], "assistant" if match[1] == "a" else "other"))
        end = match.end()
    pieces.append((text[end:], "frame"))
    if "".join(piece for piece, _ in pieces) != plain:
        raise UserError("the chat template changes the messages' content", "use one that inserts it as it is")
    return [(piece, kind) for piece, kind in pieces if piece or kind == "assistant"]


def _frame(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The template's own text; here, and only here, special tokens are special."""
    found = []
    for part in re.split(f"({'|'.join(map(re.escape, tokenizer.special_ids))})", text):
        if part in tokenizer.special_ids:
            found.append([tokenizer.special_ids[part]])
        elif part:
            found.append(tokenizer.encode(part))
    return found


def _run_template(template: str, messages: Messages, add_generation_prompt: bool) -> str:
    if not template:
        raise UserError("the tokenizer has no chat template", "use a model that was made for chat")
    try:
        return _compile(template).render(messages=messages, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template fails on this conversation: {error}") from None


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
