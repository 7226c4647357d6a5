"""A model folder's tokenizer, whatever kind of file it comes as."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from danlu.core.errors import UserError
from danlu.core.files import os_errors, read_json, read_text
from danlu.tokens.from_sentencepiece import backend_from_sentencepiece
from danlu.tokens.from_tiktoken import LLAMA3_WORDS, add_llama3_tokens, backend_from_tiktoken, is_tiktoken
from danlu.tokens.pieces import rounded
from danlu.tokens.tokenizer import Tokenizer, begin_with

ENDS = (
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
)  # fmt: skip
"""Special tokens that end an answer wherever they come."""


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a folder, or in a file of SentencePiece's or tiktoken's.

    In this order: tokenizer.json, tokenizer.model, another *.model, *.tiktoken, vocab.json with merges.txt.
    Its names come from tokenizer_config.json, special_tokens_map.json, generation_config.json and
    config.json, where they are. Raises UserError where nothing is found, or something doesn't fit.
    """
    path = Path(path)
    if not path.exists() and not path.suffix:
        raise UserError(
            f"{path}: no such folder", "an alias or a .gguf file is converted first: danlu convert SRC FOLDER"
        )
    if (path / "tokenizer" / "tokenizer.json").is_file():
        path = path / "tokenizer"
    folder = _Folder.read(path if path.is_dir() else None)
    backend, bos, eos = _backend(path, folder.settings)
    _add_declared(backend, folder)
    bos, eos = folder.name("bos", backend) or bos, folder.name("eos", backend) or eos
    stops = _stops(backend, folder, eos)
    named = [token for token in (bos, eos, *stops) if token is not None]
    if absent := [token for token in named if backend.token_to_id(token) is None]:
        raise UserError(f"{path}: the vocabulary has no {absent[0]!r}, which the settings name")
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    # Not those that are special already: they may say that they swallow the blanks beside them.
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in named if token not in special]
    )
    begins = folder.settings.get("add_bos_token")
    if isinstance(begins, bool) and not (path / "tokenizer.json").is_file():  # that file says it itself
        begin_with(backend, bos if begins else None)
    return Tokenizer(backend, bos, eos, stops, folder.template)


@dataclass
class _Folder:
    """What a model's folder says about its tokenizer beside the vocabulary."""

    where: Path
    settings: dict[str, Any]
    names: dict[str, Any]
    sizes: dict[str, Any]
    generation: dict[str, Any]
    template: str

    @classmethod
    def read(cls, folder: Path | None) -> "_Folder":
        if folder is None:
            return cls(Path(), {}, {}, {}, {}, "")

        def read(name: str) -> dict[str, Any]:
            content = read_json(folder / name) if (folder / name).is_file() else {}
            if not isinstance(content, dict):
                raise UserError(f"{folder / name}: not an object", "the file is damaged")
            return content

        settings = read("tokenizer_config.json")
        names, sizes, generation = (
            read(name) for name in ("special_tokens_map.json", "config.json", "generation_config.json")
        )
        file = folder / "chat_template.jinja"
        written = settings.get("chat_template") or read("chat_template.json").get("chat_template")
        template = read_text(file) if file.is_file() else _template(written, folder)
        return cls(folder, settings, names, sizes, generation, template)

    def name(self, which: str, backend: tokenizers.Tokenizer) -> str | None:
        """The token for "bos" or "eos", where any file names it."""
        for source in (self.settings, self.names):
            if f"{which}_token" in source:
                token = source[f"{which}_token"]
                token = token.get("content") if isinstance(token, dict) else token
                if token is not None and not isinstance(token, str):
                    raise UserError(f"{self.where}: {which}_token is {token!r}, not a token's text")
                return token
        for number in self.numbers(self.sizes, which):
            return backend.id_to_token(number)
        return None

    def numbers(self, source: Mapping[str, Any], which: str) -> list[int]:
        """The ids that config.json or generation_config.json give for a token."""
        value = source.get(f"{which}_token_id")
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) and number >= 0 for number in found):
            raise UserError(f"{self.where}: {which}_token_id is {value!r}, not an id")
        return found


def _template(written: Any, where: Path) -> str:
    """The template of tokenizer_config.json: a text, or several with names, of which "default" is meant."""
    if isinstance(written, list):
        named = {entry["name"]: entry["template"] for entry in written if isinstance(entry, dict)}
        written = named.get("default")
    if written is not None and not isinstance(written, str):
        raise UserError(f"{where}: its chat_template is no text", "see tokenizer_config.json")
    return written or ""


def _backend(path: Path, settings: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    """The pipeline, and the tokens for begin and end of text as far as its file says them."""
    if not path.is_dir():
        return _model_file(path, settings)
    if (path / "tokenizer.json").is_file():
        return _json_file(path / "tokenizer.json"), None, None
    files = [path / "tokenizer.model", *sorted(path.glob("*.model")), *sorted(path.glob("*.tiktoken"))]
    for file in files:
        if file.is_file():
            return _model_file(file, settings)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _vocabulary_and_merges(path, settings), None, None
    raise UserError(
        f"{path}: holds no tokenizer",
        "danlu reads tokenizer.json, tokenizer.model, *.tiktoken, or vocab.json with merges.txt; "
        "convert a .gguf file or an alias first: danlu convert SRC FOLDER",
    )


def _json_file(file: Path) -> tokenizers.Tokenizer:
    text = read_text(file)
    try:
        if (content := json.loads(text))["model"].get("type") == "Unigram":
            entries = content["model"]["vocab"]
            content["model"]["vocab"] = [[name, rounded(score)] for name, score in entries]
            text = json.dumps(content)
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: not a tokenizer: {error}") from None


def _model_file(
    file: Path, settings: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    with os_errors(file):
        raw = file.read_bytes()
    if not is_tiktoken(raw):
        backend, bos, eos = backend_from_sentencepiece(file, raw)
        begin_with(backend, bos)  # LLaMA and Mistral; another choice is written as add_bos_token
        return backend, bos, eos
    if file.name == "tokenizer.model":
        backend = backend_from_tiktoken(file, raw, LLAMA3_WORDS)
        return backend, *add_llama3_tokens(backend)
    pattern = settings.get("pattern")
    if not isinstance(pattern, str):
        raise UserError(
            f"{file}: a file of tiktoken's does not say how words are cut",
            'write that as "pattern" into tokenizer_config.json beside it',
        )
    return backend_from_tiktoken(file, raw, pattern), None, None


def _vocabulary_and_merges(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT's files (</w> ends a word, all is lower-case) or those of byte-level BPE since GPT-2."""
    entries = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").splitlines()
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not isinstance(entries, dict) or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{folder}: vocab.json or merges.txt is not what its name says", "the file is damaged"
        )
    ends_words = any(entry.endswith("</w>") for entry in entries)
    more = {"unk_token": "<unk>", "end_of_word_suffix": "</w>"} if ends_words else {}
    try:
        model = models.BPE(entries, pairs, **more)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: merges.txt does not fit vocab.json: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if ends_words:
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
    else:
        blank = bool(settings.get("add_prefix_space", False))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
        backend.decoder = decoders.ByteLevel()
    return backend


def _add_declared(backend: tokenizers.Tokenizer, folder: _Folder) -> None:
    """Tokens that the settings add to the vocabulary, each at the id that they say."""
    declared: dict[int, AddedToken] = {}
    try:
        for number, facts in folder.settings.get("added_tokens_decoder", {}).items():
            kept = {key: value for key, value in facts.items() if not key.startswith("__")}
            declared[int(number)] = AddedToken(**kept)
        plain = folder.where / "added_tokens.json"
        for name, number in (read_json(plain) if plain.is_file() else {}).items():
            declared.setdefault(number, AddedToken(name, normalized=False))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder.where}: added tokens that can't be read: {error}") from None
    known = backend.get_added_tokens_decoder()
    absent = [number for number in declared if backend.token_to_id(declared[number].content) is None]
    added = [
        token for number, token in declared.items() if number not in absent and known.get(number) != token
    ]
    # The library gives out the next free id, so ids without an entry in between get one.
    for number in range(backend.get_vocab_size(with_added_tokens=True), max(absent, default=-1) + 1):
        filler = AddedToken(f"<unused {number}>", special=True, normalized=False)
        added.append(declared[number] if number in absent else filler)
    backend.add_tokens(added)
    for number, token in declared.items():
        if (found := backend.id_to_token(number)) != token.content:
            raise UserError(
                f"{folder.where}: id {number} is {found!r} in the vocabulary, "
                f"{token.content!r} in the settings"
            )


def _stops(backend: tokenizers.Tokenizer, folder: _Folder, eos: str | None) -> list[str]:
    """danlu's own list; else eos, and the ids of generation_config.json; without those, what is named so."""
    if "stop_tokens" in folder.settings:
        return list(folder.settings["stop_tokens"])
    numbers = folder.numbers(folder.generation, "eos")
    named = [name for name in map(backend.id_to_token, numbers) if name is not None]
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    ends = [] if named else [name for name in ENDS if name in special]
    return list(dict.fromkeys([*([eos] if eos else []), *named, *ends]))
