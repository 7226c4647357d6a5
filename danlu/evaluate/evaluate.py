"""`danlu eval`: what a model is worth, in one table."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save

import danlu
from danlu.core.errors import UserError
from danlu.core.verbs import Estimate
from danlu.data.conversations import Messages
from danlu.data.documents import read_documents
from danlu.evaluate.bits_per_byte import bits_per_byte, text_scores
from danlu.evaluate.chat_quality import chat_quality
from danlu.evaluate.compressors import LABELS, compressor_bits
from danlu.evaluate.config import EvalConfig
from danlu.evaluate.memorisation import memorisation
from danlu.generate.engine import Engine
from danlu.model.checkpoint import find_base, is_adapter, resolve
from danlu.tokens.shards import Shards


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Bits per byte where `model` and `data` are given, chat quality where `chat_model` is."""
    if config.model is None and config.chat_model is None:
        raise UserError("nothing to evaluate", "name a model, with tasks or data; or chat_model")
    result: dict[str, Any] = {}
    if config.tasks:
        if config.model is None:
            raise UserError("tasks need a model", "danlu eval MODEL --tasks NAME")
        from danlu.evaluate.tasks import run_tasks

        result |= run_tasks(config)
    if config.model is not None and config.text is not None:
        model, tokenizer = danlu.load(config.model, dtype=torch.float32)
        text = "\n".join(document.text for document in read_documents(config.text)).encode()
        result["text"] = text_scores(model, tokenizer, text, config.window, config.stride)
    if config.model is not None and config.memorised:
        engine = Engine(*danlu.load(config.model, dtype=torch.float32))
        data = required(config.data)
        result["memorisation"] = memorisation(engine, data, config.memorised, config.seed)
    elif config.model is not None and (config.data is not None or not (config.tasks or config.text)):
        result |= compression_scores(config.model, required(config.data))
    if config.chat_model is not None:
        model, tokenizer = danlu.load(config.chat_model, dtype=torch.float32)
        training = None if config.chat_data is None else Shards(config.chat_data / "train")
        held_out = iter(()) if config.data is None else held_out_conversations(config.data)
        result["chat_quality"] = chat_quality(
            Engine(model, tokenizer), training, islice(held_out, config.conversations), config.seed
        )
    return result


def required(data: Path | None) -> Path:
    if data is None:
        raise UserError("data is missing", "give the output folder of `danlu data prepare`")
    return data


def compression_scores(ref: str, data: Path) -> dict[str, Any]:
    """Bits per byte of the held-out text under the model and under other compressors."""
    text, training = plain_text(data / "held_out.jsonl.zst"), plain_text(data / "train.jsonl.zst")
    model, tokenizer = danlu.load(ref, dtype=torch.float32)
    scores = {"model": bits_per_byte(model, tokenizer, text), **compressor_bits(text, training)}
    own = model_bytes(resolve(ref))
    return {
        "held_out_bytes": len(text),
        "model_bytes": own,
        "labels": LABELS,
        "bits_per_byte": scores,
        "bits_per_byte_with_model": {**scores, "model": scores["model"] + 8 * own / len(text)},
    }


def plain_text(file: Path) -> bytes:
    """The documents' texts, a line end between them: the bytes that all compressors are given."""
    return "\n".join(document.text for document in read_documents(file)).encode()


def model_bytes(folder: Path) -> int:
    """What sending the model would cost: its weights in bf16 and its tokenizer, compressed by zstd -19."""
    if folder.is_file():  # GGUF: packed already
        return folder.stat().st_size
    if is_adapter(folder):
        return model_bytes(find_base(folder)[0]) + _packed(load_file(folder / "adapter_model.safetensors"))
    return _packed(load_file(folder / "model.safetensors"), (folder / "tokenizer.json").read_bytes())


def _packed(tensors: Mapping[str, torch.Tensor], rest: bytes = b"") -> int:
    raw = save({name: tensor.bfloat16() for name, tensor in tensors.items()}) + rest
    return len(zstandard.ZstdCompressor(level=19).compress(raw))


def held_out_conversations(data: Path) -> Iterator[Messages]:
    for document in read_documents(data / "held_out.jsonl.zst"):
        if document.messages is not None:
            yield document.messages


def estimate(config: EvalConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """A forward pass over the held-out text, and xz twice over the training text."""
    size = upstream["data"].outputs.get("bytes", 0) if "data" in upstream else 0
    return Estimate(seconds=20 + size / 5e5, memory_bytes=(1 << 30) + 12 * size)
