"""Answers that follow a JSON schema or a regular expression: what may come next, by llguidance.

A constraint is about an answer's bytes, whatever the tokenizer: every token stays possible that some valid
answer goes on with, and a stop token where the answer may end. The model chooses among them.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.tokens.tokenizer import Tokenizer

WHITESPACE = r"( |\n {0,20})?"
"""Between the parts of JSON: a blank, or a new line with indentation. Unbounded, a model may never go on."""


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, tokenizer: Tokenizer, grammar: str) -> None:
        """Raises UserError where no token of the vocabulary can begin an answer."""
        self._size = tokenizer.vocab_size
        self._matcher = prepare(tokenizer, grammar).deep_copy()
        self._bits()

    def allowed(self, size: int, stop_ids: Sequence[int]) -> Tensor:
        """(size,) bool: the tokens that may come next; stop tokens only where the answer may end.

        Raises UserError where the vocabulary has no token to go on with.
        """
        bits = self._bits()
        found = np.zeros(max(size, self._size), dtype=bool)
        found[: self._size] = bits[: self._size]
        found[list(stop_ids)] = bits[self._size]
        return torch.from_numpy(found[:size])

    def accept(self, token: int) -> None:
        """Goes on by a token, which `allowed` must have named. A stop token is none of the answer's."""
        if not self._matcher.consume_token(token):
            if "satisfy the grammar" not in self._matcher.get_error():  # but the limits of the library
                raise UserError("the schema or regex has too many ways to go on", "simplify it")
            raise ValueError(f"the constraint does not allow the token {token} here")

    def rewind(self, n: int) -> None:
        """Takes back the last n tokens."""
        self._matcher.rollback(n)

    @property
    def complete(self) -> bool:
        """Whether the answer has ended: nothing but a stop token may follow."""
        return self._matcher.is_stopped()

    def _bits(self) -> np.ndarray:
        """A bit a token, and one for the end."""
        raw = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise UserError(
                "no token of the vocabulary can follow here, by the schema or regex",
                "give one that this tokenizer can write",
            )
        return np.unpackbits(raw, bitorder="little")


@lru_cache(maxsize=64)
def prepare(tokenizer: Tokenizer, grammar: str) -> Any:
    """A matcher at the beginning, of which each answer gets a copy: a large grammar takes seconds."""
    return _library().LLMatcher(_vocabulary(tokenizer), grammar, log_level=0)


def compile_schema(schema: str) -> str:
    """The grammar of a JSON schema, given as text. Raises UserError for one that can't be followed."""
    try:
        values = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the schema is not JSON: {error}", "give a JSON schema") from None
    if not isinstance(values, dict):
        raise UserError("the schema is not an object", "give a JSON schema, as {...}")
    values.setdefault("x-guidance", {"whitespace_pattern": WHITESPACE})
    return _compile(f"%json {json.dumps(values)}", "schema", "change the schema")


def compile_regex(regex: str) -> str:
    """The grammar of a regular expression that the whole answer matches. Raises UserError for an invalid one.

    Syntax: Rust's regex crate, so no look-around and no back-references. \\d is 0 to 9, \\w any letter.
    """
    return _compile(f"/{_library().regex_to_lark(regex, 'd')}/", "regex", "change the regex")


@lru_cache(maxsize=64)
def _compile(start: str, name: str, remedy: str) -> str:
    # By default the library writes bytes that are certain as the tokenizer would, and rules out other tokens.
    grammar = f'%llguidance {{"no_forcing": true}}\nstart: {start}\n'
    if fault := _library().LLMatcher.validate_grammar(grammar):
        raise UserError(f"the {name} can't be used: {_essence(fault)}", remedy)
    return grammar


def _essence(fault: str) -> str:
    """What the library says, without the place in our grammar."""
    lines = fault.split("\n   1 |")[0].splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[0] if told else lines[0].split("JSON schema: ")[-1].split("(in regex): ")[-1]


class _Vocabulary:
    """A tokenizer as llguidance reads it. An entry of its own, behind the others, stands for the end."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [*tokenizer.token_bytes, b""]
        self.eos_token_id = len(self.tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """Asked for only where the library writes tokens itself, which it is told not to do."""
        return []


_vocabularies: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """Built once a tokenizer: it takes a second for a large one."""
    if tokenizer not in _vocabularies:
        library = _library()
        wrapped = library.TokenizerWrapper(_Vocabulary(tokenizer))
        _vocabularies[tokenizer] = library.LLTokenizer(wrapped)
    return _vocabularies[tokenizer]


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "the package llguidance is not installed", "pip install 'danlu[constraints]'"
        ) from None
    return llguidance
