"""A SentencePiece vocabulary as a pipeline of the tokenizers library (Kudo & Richardson 2018).

SentencePiece model files and GGUF files of kind "llama" both hold it: entries with a score and a kind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from danlu.tokens.tokenizer import SPACE


class Kind(IntEnum):
    """What an entry is; both formats count so."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Pieces:
    """A vocabulary, and how a text is made ready for it."""

    names: list[str]
    scores: list[float]
    kinds: list[int]
    bpe: bool
    """Byte-pair merges by score; else the segmentation of the largest summed score (Unigram)."""
    adds_blank: bool
    """A blank is put before the first word."""
    squeezes: bool = False
    """Blanks at the ends go, several in a row become one."""
    charsmap: bytes = b""
    """SentencePiece's compiled table of characters and what they become."""

    def backend(self) -> tokenizers.Tokenizer:
        """The pipeline. One deviation: with `adds_blank`, text behind a user-defined entry gets a blank too.

        So do the published tokenizer.json of Llama 2 and Mistral, and llama.cpp.
        """
        unknown = self.kinds.index(Kind.UNKNOWN) if Kind.UNKNOWN in self.kinds else None
        has_bytes = Kind.BYTE in self.kinds
        if self.bpe:
            numbers = {name: number for number, name in enumerate(self.names)}
            model: models.Model = models.BPE(
                numbers,
                merges(self._mergeable()),
                unk_token=None if unknown is None else self.names[unknown],
                fuse_unk=True,
                byte_fallback=has_bytes,
            )
        else:
            entries = list(zip(self.names, map(rounded, self.scores), strict=True))
            model = models.Unigram(entries, unk_id=unknown, byte_fallback=has_bytes)
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence(self._normalizers())
        steps = [decoders.Replace(SPACE, " "), *[decoders.ByteFallback()] * has_bytes, decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * self.adds_blank)
        add_tokens(backend, self.names, self.kinds)
        return backend

    def _mergeable(self) -> list[str]:
        """Entries that merges may make, the best first."""
        found = [n for n, kind in enumerate(self.kinds) if kind == Kind.NORMAL]
        return [self.names[n] for n in sorted(found, key=lambda n: -self.scores[n])]

    def _normalizers(self) -> list[normalizers.Normalizer]:
        steps: list[normalizers.Normalizer] = []
        if self.charsmap:
            steps.append(normalizers.Precompiled(self.charsmap))
        if self.squeezes:
            steps += [
                normalizers.Replace(Regex("^ +| +$"), ""),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        if self.adds_blank:
            steps.append(normalizers.Prepend(SPACE))
        return [*steps, normalizers.Replace(" ", SPACE)]


def rounded(score: float) -> float:
    """To the nine digits that tell float32 apart: so short a number the library reads as it wrote it."""
    return float(f"{score:.9g}")


def merges(entries: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that make `entries`, the first entry before all others.

    SentencePiece and tiktoken rank a merge by what it makes, so every cut of an entry into two others is one.
    """
    known = set(entries)
    cuts = ((entry[:at], entry[at:]) for entry in entries for at in range(len(entry) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in known and right in known]


def add_tokens(backend: tokenizers.Tokenizer, names: Sequence[str], kinds: Iterable[int]) -> None:
    """Tells `backend` which of its entries are special, and which are found in text before all else."""
    special = (Kind.CONTROL, Kind.UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(names[n], special=kind in special, normalized=False)
            for n, kind in enumerate(kinds)
            if kind in (*special, Kind.USER_DEFINED)
        ]
    )
