"""Prequential coding: coder and decoder train the same model from the same seed while they code.

No weights are sent: each token is coded by a model trained on what came before it, and then learnt (Dawid
1984; Blier and Ollivier 2018, "The description length of deep learning models", sec. 3.3). What a file takes
is therefore the whole description of it, the model included. This holds only as long as both sides compute
the same bits; the header's probe says at once when they don't.

The file's vocabulary is sent with it. Its tokens run in N streams (`evaluate.windows`); whenever half a
window of new tokens is known, the model is updated by that window and, unless the file is long, by random
earlier ones, and the context is read again with the new weights.
"""

import hashlib
import lzma

import numpy as np
import torch

from danlu.core.device import choose_dtype
from danlu.evaluate import codec, windows
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import bpe
from danlu.tokens.loader import Batch
from danlu.train.config import OptimConfig
from danlu.train.optim import make_optimizer
from danlu.train.run import exactness
from danlu.train.step import TrainStep

SEED = 0
WINDOW = 128
START = 0
"""Id that stands before each stream: the first special token, which no file holds."""

OPTIM = OptimConfig(name="muon", lr=6e-3, muon_lr=0.02, weight_decay=0.0)
WARMUP = 10
FINAL = 0.2
"""Multiple of the learning rate at the last token, reached linearly."""

PIECE = 1 << 16
"""Bytes that are encoded at a time."""


class OnlineStepper(windows.Stepper):
    """A stepper whose model learns what was pushed, each time its window is full."""

    def __init__(self, vocab_size: int, streams: int, longest: int) -> None:
        """`longest`: tokens in the longest stream."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = Transformer(model_config(vocab_size))
        super().__init__(model, streams, START, WINDOW)
        self.kept = WINDOW // 2
        self.dtype = choose_dtype(device=torch.device("cpu"))
        self.optimizer = make_optimizer(model, OPTIM)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.updater = TrainStep(model, self.optimizer, self.dtype)
        self.model.compute_dtype = None
        self.generator = torch.Generator().manual_seed(SEED)
        self.all = torch.full((streams, longest + 1), START)
        self.n_tokens, self.longest = 0, longest
        self.updates_a_window = 1 + replays(streams * longest)
        self.updates = 0

    def push(self, tokens: np.ndarray) -> None:
        super().push(tokens)
        self.n_tokens += 1
        self.all[:, self.n_tokens] = self.history[:, -1]

    def window_is_full(self) -> None:
        """Learns the newest window, and random ones of the past."""
        newest = self.n_tokens - WINDOW
        self._learn(torch.full((len(self.all),), newest))
        for _ in range(self.updates_a_window - 1):
            self._learn(torch.randint(newest + 1, (len(self.all),), generator=self.generator))

    def _learn(self, starts: torch.Tensor) -> None:
        """One update by the windows that begin at `starts` (N,)."""
        rows = self.all.gather(1, starts[:, None] + torch.arange(WINDOW + 1))
        positions = torch.arange(WINDOW).expand(len(rows), -1)
        batch = Batch(
            ids=rows[:, :-1].contiguous(),
            targets=rows[:, 1:].contiguous(),
            weights=torch.ones(positions.shape),
            positions=positions,
            segments=torch.zeros(positions.shape, dtype=torch.int32),
        )
        self.updates += 1
        done = self.n_tokens / self.longest
        scale = min(1.0, self.updates / WARMUP) * (1 - (1 - FINAL) * done)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.model.compute_dtype = self.dtype
        with torch.enable_grad():
            self.updater.step([batch])
        self.model.compute_dtype = None


def model_config(vocab_size: int) -> ModelConfig:
    """About a million parameters."""
    return ModelConfig(
        vocab_size=vocab_size, width=128, n_layers=4, n_heads=4, n_kv_heads=4, ffn_width=352,
        max_positions=WINDOW, tied_embeddings=True,
    )  # fmt: skip


def n_streams(n_tokens: int) -> int:
    """One for each 32,768 tokens: few streams learn early, many are fast."""
    return max(4, min(64, n_tokens // 32_768))


def replays(n_tokens: int) -> int:
    """Windows learnt again for each new one: a short file has time for more, a long one for none."""
    return min(4, 2_000_000 // max(n_tokens, 1))


def n_merges(size: int) -> int:
    """Entries of the vocabulary beside the bytes: each costs about 3 bytes of the file."""
    return min(2048, size // 1024)


def compress_bytes(raw: bytes) -> bytes:
    """The compressed form of any bytes."""
    tokens, vocabulary = _tokenise(raw)
    streams = n_streams(len(tokens))
    header = codec.Header(codec.ONLINE, torch.get_num_threads(), streams, WINDOW, len(tokens), len(raw))
    header.original, header.versions = codec.checksum(raw), _versions()
    rows, lengths = windows.split_streams(tokens, streams), windows.stream_lengths(len(tokens), streams)
    with exactness(True):
        header.probe = _probe(len(vocabulary), streams)
        stepper = OnlineStepper(len(vocabulary), streams, rows.shape[1])
        coded = codec.encode_streams(stepper, rows, lengths)
    packed = _pack_vocabulary(vocabulary)
    sizes = np.array([len(packed), *map(len, coded)], "<u4").tobytes()
    payload = sizes + packed + b"".join(coded)
    if len(payload) >= len(raw):  # nothing to learn in it: stored as it is
        header.streams, payload = 0, raw
    return codec.pack(header, payload)


def decompress_bytes(raw: bytes, where: str) -> bytes:
    """The original bytes, or UserError: never other bytes. `where` names the file."""
    header, payload = codec.unpack(raw, where)
    if header.streams == 0:
        return codec.checked(payload, header, where)
    sizes = np.frombuffer(payload[: 4 * (header.streams + 1)], "<u4").astype(np.int64)
    ends = 4 * len(sizes) + np.cumsum(sizes)
    packed, *coded = [payload[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    vocabulary = _unpack_vocabulary(packed)
    lengths = windows.stream_lengths(header.tokens, header.streams)
    with codec.threads(header.threads), exactness(True):
        codec.require_probe(_probe(len(vocabulary), header.streams), header, _versions(), where)
        stepper = OnlineStepper(len(vocabulary), header.streams, int(lengths.max()))
        rows = codec.decode_streams(stepper, coded, lengths, np.zeros(header.streams, bool))
    result = b"".join(vocabulary[t] for row, n in zip(rows, lengths, strict=True) for t in row[:n])
    return codec.checked(result, header, where)


def _versions() -> str:
    return codec.versions(choose_dtype(device=torch.device("cpu")))


def _tokenise(raw: bytes) -> tuple[list[int], list[bytes]]:
    """The file's tokens, and for each id the bytes it stands for."""
    pieces = [raw[begin : begin + PIECE] for begin in range(0, len(raw), PIECE)]
    tokenizer = bpe((piece.decode("utf-8", "ignore") for piece in pieces), 259 + n_merges(len(raw)))
    tokens = [token for piece in pieces for token in tokenizer.encode_bytes(piece)]
    return tokens, tokenizer.token_bytes


def _pack_vocabulary(vocabulary: list[bytes]) -> bytes:
    lengths = np.array([len(entry) for entry in vocabulary], "<u2")
    return lzma.compress(len(vocabulary).to_bytes(2, "little") + lengths.tobytes() + b"".join(vocabulary))


def _unpack_vocabulary(packed: bytes) -> list[bytes]:
    raw = lzma.decompress(packed)
    count = int.from_bytes(raw[:2], "little")
    lengths = np.frombuffer(raw, "<u2", count, offset=2).astype(np.int64)
    ends = 2 + 2 * count + np.cumsum(lengths)
    return [raw[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _probe(vocab_size: int, streams: int) -> bytes:
    """Hash of the probabilities after one update: another processor or library gives another one."""
    stepper = OnlineStepper(vocab_size, streams, WINDOW)
    for step in range(WINDOW):
        stepper.probabilities()
        stepper.push((np.arange(streams) * 7 + step) % vocab_size)
    return hashlib.sha256(stepper.probabilities().tobytes()).digest()[:8]
