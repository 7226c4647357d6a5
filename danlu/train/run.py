"""What a training run is made of, put together and checked before the first step."""

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import danlu.model.checkpoint as models
from danlu.core.config import flatten
from danlu.core.device import choose_device, choose_dtype
from danlu.core.errors import UserError
from danlu.model import parallel
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.lora import add_adapter, merge
from danlu.model.quantised import quantise
from danlu.model.transformer import Transformer
from danlu.tokens.load import load_tokenizer
from danlu.tokens.loader import Batch, PackedLoader, held_out_batches
from danlu.tokens.shards import Shards
from danlu.tokens.tokenizer import Tokenizer
from danlu.train.config import TrainConfig


class Source(Protocol):
    """Where a run's batches come from."""

    tokenizer: Tokenizer

    def fingerprint(self) -> str:
        """Of what is learnt from: a run resumes on the same only."""
        ...

    def loader(self, config: TrainConfig) -> Any:
        """As `PackedLoader`."""
        ...

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]: ...

    def held_out_rows(self) -> Sequence[dict[str, Any]]:
        """What is to be said of the last evaluation besides its figures, for `held_out.jsonl`."""
        ...


class Stopped(Exception):
    """A source has seen why the run should end before its last step."""


class Data:
    """The tokens that a run learns from and is measured on. Raises UserError where they can't serve."""

    def __init__(self, config: TrainConfig, kind: str) -> None:
        self.folder = config.data
        for part in ("train", "tokenizer"):
            if not (config.data / part).exists():
                raise UserError(
                    f"{config.data}: no {part} in it", "give the output folder of `danlu tokenize` as data"
                )
        self.tokenizer = load_tokenizer(config.data / "tokenizer")
        self.train = Shards(config.data / "train")
        self.held_out = Shards(config.data / "held_out") if (config.data / "held_out").exists() else None
        if self.train.kind != kind:
            raise UserError(
                f"{config.data}: tokens of kind {self.train.kind}, this verb learns from {kind}",
                f"run `danlu tokenize` with kind={kind}",
            )
        if self.train.n_supervised == 0:
            raise UserError(
                f"{config.data}: no token of the training data is supervised",
                "look at it with `danlu inspect`",
            )

    def fingerprint(self) -> str:
        return self.train.fingerprint()

    def loader(self, config: TrainConfig) -> PackedLoader:
        """This process's share of every batch."""
        processes, parts = parallel.data_processes(config.parallel), config.accumulate
        if config.batch_size % (processes * parts):
            raise UserError(
                f"batch_size {config.batch_size} does not divide by processes × accumulate = "
                f"{processes} × {parts}",
                "change batch_size or accumulate",
            )
        loader = PackedLoader(
            self.train,
            config.batch_size // processes,
            config.sequence_length,
            seed=config.seed,
            rank=parallel.rank() if processes > 1 else 0,
            world_size=processes,
        )
        if not loader.plan.n_rows:
            raise UserError(
                f"{config.data}: no reply begins within sequence_length {config.sequence_length}",
                "raise sequence_length, or `danlu tokenize` with longest",
            )
        return loader

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """One pass over the held-out tokens, or its first `eval_batches` × `batch_size` sequences."""
        if self.held_out is None or self.held_out.n_supervised == 0:
            return iter(())
        parts = parallel.data_processes(config.parallel) * config.accumulate
        batches = held_out_batches(self.held_out, config.batch_size // parts, config.sequence_length)
        return itertools.islice(batches, config.eval_batches * parts or None)

    def held_out_rows(self) -> Sequence[dict[str, Any]]:
        return ()


def build_model(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """A new model from the seed, or the one of `init_from`. Raises UserError where it doesn't fit."""
    if config.init_from is not None and config.model is not None:
        raise UserError("model and init_from are both given", "give sizes, or a model to start from")
    if config.init_from is None:
        sizes = config.model or ModelConfig(
            vocab_size=tokenizer.vocab_size, max_positions=config.sequence_length
        )
        if sizes.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size is {sizes.vocab_size}, the tokenizer in {config.data} has "
                f"{tokenizer.vocab_size} entries",
                f"set model.vocab_size={tokenizer.vocab_size}",
            )
        model = Transformer(sizes)
    else:
        if config.lora is not None and models.is_adapter(models.resolve(config.init_from)):
            raise UserError(
                f"{config.init_from} is an adapter, and lora puts another on it",
                "write it into its base first: danlu merge",
            )
        model, own = models.load(config.init_from, dtype=torch.float32)
        merge(model)  # where it is an adapter: all weights are trained
        if own is not None and own.fingerprint() != tokenizer.fingerprint():
            raise UserError(
                f"{config.init_from} and {config.data} have different tokenizers",
                "tokenize the data with the model's tokenizer",
            )
        if model.config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"{config.init_from}: vocabulary of {model.config.vocab_size}, smaller than the tokenizer's "
                f"{tokenizer.vocab_size}",
                "tokenize the data with the model's tokenizer",
            )
    if config.sequence_length > model.config.max_positions:
        raise UserError(
            f"sequence_length {config.sequence_length} is beyond the model's max_positions "
            f"{model.config.max_positions}",
            "lower sequence_length, or raise model.max_positions of a new model",
        )
    return model.to(device)


def adapt(model: Transformer, config: LoraConfig, dtype: torch.dtype) -> None:
    """Freezes a float32 model and puts a new adapter on it, in place.

    The base is kept in `dtype`, the computation's: a step rounds the weights to that anyway. Norms, which
    are computed in float32, and the adapter stay float32.
    """
    quantise(model, config.quantise)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(dtype)
    add_adapter(model, config)


def choose_machine(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the computation; joins the processes of torchrun."""
    device = parallel.start(choose_device(config.device))
    return device, choose_dtype(config.dtype, device)


@contextmanager
def exactness(deterministic: bool) -> Iterator[None]:
    """Deterministic algorithms for the time of a run, where asked for.

    New tensors aren't filled: that guards against reading uninitialised memory, and costs time.
    """
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


_FREE = {
    *("out", "data", "eval_every", "eval_batches", "sample_every", "sample_prompts", "sample_tokens"),
    *("checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "stop_loss"),
}
"""Config keys that may differ on a resume: they leave the weights alone (`data` is compared by content)."""


def require_same_run(config: TrainConfig, fingerprint: str, base: str, saved: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint's state comes from other data, another base or other maths."""
    if saved.get("base", "") != base:
        raise UserError(
            f"{config.out} holds an adapter for another base than {config.init_from} is now",
            "bring the old one back, or choose another output folder",
        )
    if saved["data"] != fingerprint:
        raise UserError(
            f"{config.out} holds a run on other data than {config.data}",
            "choose another output folder, or remove this one to start afresh",
        )
    ours = flatten(config.model_dump(mode="json", exclude=_FREE))
    theirs = flatten(saved["config"])
    changed = [
        f"{key}: {theirs.get(key)} → {ours.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and key.split(".")[0] not in _FREE
    ]
    if changed:
        raise UserError(
            f"{config.out} holds an unfinished run with other settings: {'; '.join(changed)}",
            "resume with the same settings, or choose another output folder",
        )
