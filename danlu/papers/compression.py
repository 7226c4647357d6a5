"""A language model is a lossless compressor: it codes text in as many bits as it finds it surprising.

Claim 1 (Delétang et al. 2023, "Language modeling is compression", table 1, raw rates): a model trained on
text compresses unseen text of the same kind below gzip, xz and zstd; here also below those that are given
the training text.
Claim 2 (the same table, adjusted rates): counting the model's own bytes, it doesn't pay for itself on data
as short as this.
Claim 3 (Rae 2023, "Compression for AGI"; Blier and Ollivier 2018): coder and decoder that train the same
model while they code need not send it. Verdict-free: bits per byte of the whole corpus are reported beside
xz, bzip2 and PPMd.

The rule, written before the first run:
- Text: --data, else the conversations of the package chitchat-dataset; 5 % of the documents held out by their
  hash.
- Model: LLaMA shape, 4 layers of width 192, vocabulary 4,096, context 512 (2.4 million parameters); 240 steps
  of 8 sequences, Muon and AdamW as in the quickstart. Static coder: the held-out documents as one file, and
  each of them as a file of its own (the first 200 of at most 2,000 tokens).
- Metric: bits per byte of what the coder really writes, header included for the one file; for single
  documents the bytes of each one's stream without the header, as gzip's and xz's without theirs (18 and 60
  bytes; zstd in its headerless format).
- Seeds: 3, of the weights and the order of the data. Interval: Student's t, 95 %, of model − best other.
- Claim 1 holds, for the six compressors on one file and for those without the training text on single
  documents, when the whole interval lies below 0. Claim 2 holds when, with the model's weights in bf16 and
  its tokenizer (zstd -19) added, the whole interval lies above 0.
- Prequential: 1 to 2 million parameters, one seed, the whole corpus (train and held-out), decoded again.
- Controls (null = as said): what is decoded differs in 0 bytes from what was coded; a model that was not
  trained compresses the file no better than gzip; the trained model does not make random bytes smaller.

Not tested: models of billions of parameters, images and audio, and data so long that a large model pays for
itself.
"""

import bz2
import gzip
import lzma
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import zstandard

from danlu.core.progress import Progress
from danlu.data.config import CHITCHAT
from danlu.data.documents import read_documents
from danlu.evaluate import codec, windows
from danlu.evaluate.compressors import COMPRESSORS, LABELS, compressor_bits
from danlu.evaluate.evaluate import model_bytes, plain_text
from danlu.evaluate.intervals import t_interval
from danlu.model.checkpoint import load, save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.papers.config import ReproduceConfig
from danlu.papers.corpus import prepare_tokens
from danlu.papers.protocol import Claim, Control, Result, at_least, at_most, judged, save_plot
from danlu.tokens.load import load_tokenizer
from danlu.tokens.tokenizer import Tokenizer
from danlu.train import prequential
from danlu.train.config import OptimConfig, ScheduleConfig, TrainConfig
from danlu.train.pretrain import pretrain

SEEDS = 3
STEPS = 240
VOCABULARY, CONTEXT = 4096, 512
SIZES = ModelConfig(
    vocab_size=VOCABULARY,
    width=192,
    n_layers=4,
    n_heads=3,
    n_kv_heads=1,
    ffn_width=512,
    max_positions=CONTEXT,
)
SINGLE, LONGEST = 200, 2000
"""Documents that are compressed one by one, and the most tokens in one."""
RANDOM = 20_000
"""Random bytes in the control."""


def run(config: ReproduceConfig, folder: Path) -> Result:
    """Trains the models, codes the held-out text with each, then the whole corpus without any."""
    begin = time.monotonic()
    source = str(config.data or CHITCHAT)
    tokens = prepare_tokens(source, folder / "tokens", VOCABULARY)
    data = folder / "tokens" / "data"
    text, training = plain_text(data / "held_out.jsonl.zst"), plain_text(data / "train.jsonl.zst")
    documents = _single_documents(data / "held_out.jsonl.zst", load_tokenizer(tokens))
    others, apart = compressor_bits(text, training), _apart(documents)
    seeds = list(range(config.seed, config.seed + SEEDS))
    models = [_train(tokens, folder / "runs" / f"seed-{seed}", seed) for seed in seeds]
    coded = [_code(text, model) for model in models]
    alone = [8 * size / len(text) for size, _ in coded]
    with_model = [
        bits + 8 * model_bytes(model) / len(text) for bits, model in zip(alone, models, strict=True)
    ]
    single = [code_apart(documents, model) for model in models]
    controls = _controls(text, tokens, models[0], folder, others["gzip"], sum(wrong for _, wrong in coded))
    online = _online(training + b"\n" + text)
    controls.append(_control("bytes of the whole corpus decoded wrongly", online.pop("wrong"), 0))
    claims = [
        judge("On one file the model beats gzip, xz and zstd", alone, others, ("gzip", "xz", "zstd"), 0),
        judge("… and those that are given the training text", alone, others, tuple(COMPRESSORS)[3:], 0),
        judge("On single documents the model beats gzip, xz and zstd", single, apart, tuple(apart), 0),
        judge("Counting its own bytes the model loses", with_model, others, tuple(others), 1),
    ]
    figures = {
        "text": source,
        "held_out_bytes": len(text),
        "bits_per_byte": {"model": mean(alone), **others},
        "bits_per_byte_with_model": mean(with_model),
        "single_documents": {"model": mean(single), **apart, "documents": len(documents)},
        "whole_corpus": online,
    }
    save_plot(_plot(figures), folder)
    return judged(
        Result(
            paper="Delétang et al. 2023: language modeling is compression",
            rule=__doc__ or "",
            claims=claims,
            controls=controls,
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="Models of billions of parameters; images and audio; data that repays a large model.",
            figures=figures,
        )
    )


def _train(tokens: Path, out: Path, seed: int) -> Path:
    """The folder of a trained model; one that is there already is taken as it is."""
    pretrain(
        TrainConfig(
            data=tokens,
            out=out,
            seed=seed,
            model=SIZES,
            steps=STEPS,
            batch_size=8,
            sequence_length=CONTEXT,
            optim=OptimConfig(name="muon", lr=6e-3, muon_lr=0.02, weight_decay=0.0),
            schedule=ScheduleConfig.model_validate(
                {"name": "wsd", "warmup": 15, "decay": 0.5, "final": 0.02}
            ),
            eval_every=0,
            eval_batches=4,
        )
    )
    return out / "model"


def _code(text: bytes, model: Path) -> tuple[int, int]:
    """(bytes of the compressed file, bytes that come back wrong)."""
    packed = codec.compress_bytes(text, str(model))
    return len(packed), wrong_bytes(codec.decompress_bytes(packed, str(model), "the coded text"), text)


def wrong_bytes(one: bytes, other: bytes) -> int:
    differ = sum(a != b for a, b in zip(one, other, strict=False))
    return differ + abs(len(one) - len(other))


def _single_documents(file: Path, tokenizer: Tokenizer) -> list[bytes]:
    texts = (document.text for document in read_documents(file))
    return [
        text.encode() for text in islice((t for t in texts if len(tokenizer.encode(t)) <= LONGEST), SINGLE)
    ]


def code_apart(documents: Sequence[bytes], model: Path) -> float:
    """Bits per byte of documents that are each coded alone, side by side in one batch."""
    transformer, tokenizer = load(model, dtype=torch.float32)
    ids = [tokenizer.encode_bytes(document) for document in documents]
    lengths = np.array([len(row) for row in ids])
    rows = np.zeros((len(ids), lengths.max()), np.int64)
    for row, tokens in zip(rows, ids, strict=True):
        row[: len(tokens)] = tokens
    stepper = windows.Stepper(transformer, len(ids), tokenizer.start_id, CONTEXT)
    coded = codec.encode_streams(stepper, rows, lengths)
    return 8 * sum(map(len, coded)) / sum(map(len, documents))


def _apart(documents: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of documents that are each compressed alone, without the formats' headers."""
    total = sum(map(len, documents))
    return {name: 8 * sum(map(size, documents)) / total for name, size in _BODIES.items()}


def gzip_body_size(text: bytes) -> int:
    """gzip -9 without its header and trailer of 18 bytes."""
    return len(gzip.compress(text, 9)) - 18


def xz_body_size(text: bytes) -> int:
    """xz -9e without its container."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters))


def zstd_body_size(text: bytes) -> int:
    """zstd -19 without magic number, length and checksum."""
    bare = zstandard.ZstdCompressionParameters.from_level(
        19,
        source_size=len(text),
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=0,
        write_checksum=0,
    )
    return len(zstandard.ZstdCompressor(compression_params=bare).compress(text))


_BODIES: dict[str, Callable[[bytes], int]] = {
    "gzip": gzip_body_size,
    "xz": xz_body_size,
    "zstd": zstd_body_size,
}


def judge(
    claim: str, values: Sequence[float], others: dict[str, float], names: Sequence[str], above: int
) -> Claim:
    """`above` 0: fewer bits than the best of `names`; 1: more than it."""
    best = min(names, key=lambda name: others[name])
    interval = t_interval([value - others[best] for value in values])
    return Claim(
        claim=claim,
        verdict=at_least(interval, 0) if above else at_most(interval, 0),
        value=mean(values) - others[best],
        interval=interval,
        required=f"bits per byte less those of the best other ({LABELS[best]}, {others[best]:.3f}): "
        f"the whole interval {'above' if above else 'below'} 0",
    )


def _control(control: str, value: float, most: float) -> Control:
    return Control(control=control, null=value <= most, value=value)


def _controls(
    text: bytes, tokens: Path, model: Path, folder: Path, gzip_bits: float, wrong: int
) -> list[Control]:
    """The file decoded; an untrained model; random bytes."""
    untrained = folder / "untrained"
    torch.manual_seed(0)
    save_model(Transformer(SIZES), untrained, load_tokenizer(tokens))
    short = text[:RANDOM]
    noise = np.random.default_rng(0).bytes(RANDOM)
    guess = 8 * len(codec.compress_bytes(short, str(untrained))) / len(short)
    ratio = len(codec.compress_bytes(noise, str(model))) / RANDOM
    return [
        _control("bytes of the held-out text decoded wrongly", wrong, 0),
        _control("bits per byte that an untrained model saves against gzip", gzip_bits - guess, 0),
        _control("share of random bytes that the trained model saves", 1 - ratio, 0),
    ]


def _online(corpus: bytes) -> dict[str, Any]:
    """The whole corpus, no weights sent; bits per byte beside others, times, and what decodes wrongly."""
    begin = time.monotonic()
    packed = prequential.compress_bytes(corpus)
    coded = time.monotonic()
    wrong = wrong_bytes(prequential.decompress_bytes(packed, "the coded corpus"), corpus)
    seconds = {"coding": coded - begin, "decoding": time.monotonic() - coded}
    sizes, skipped = {"prequential": len(packed)}, []
    with Progress("whole corpus", 3, "compressors") as progress:
        for number, (name, size) in enumerate(_WHOLE.items(), 1):
            found = size(corpus)
            if found is None:
                skipped.append(name)
            else:
                sizes[name] = found
            progress.update(number)
    return {
        "bytes": len(corpus),
        "bits_per_byte": {name: 8 * size / len(corpus) for name, size in sizes.items()},
        "not_installed": skipped,
        "seconds": seconds,
        "wrong": wrong,
    }


def ppmd_size(text: bytes) -> int | None:
    """PPMd, variant H of 7-Zip, order 16 and 256 MB of memory; None where danlu[papers] is not installed."""
    try:
        import pyppmd
    except ImportError:
        return None
    return len(pyppmd.compress(text, max_order=16, mem_size=256 << 20, variant="H"))


_WHOLE: dict[str, Callable[[bytes], int | None]] = {
    "xz": lambda text: len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    "bzip2": lambda text: len(bz2.compress(text, 9)),
    "ppmd": ppmd_size,
}


def _plot(figures: dict[str, Any]) -> Any:
    """Bits per byte in three panels: one file, single documents, the whole corpus."""
    from matplotlib.figure import Figure

    panels = {
        "one held-out file": figures["bits_per_byte"],
        "single documents": {k: v for k, v in figures["single_documents"].items() if k != "documents"},
        "the whole corpus, no weights sent": figures["whole_corpus"]["bits_per_byte"],
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, bits) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        names = sorted(bits, key=lambda name: bits[name])
        colours = ["C1" if name in ("model", "prequential") else "C0" for name in names]
        axes.bar_label(axes.barh(names, [bits[name] for name in names], color=colours), fmt="%.2f", padding=3)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="bits per byte, fewer is better", xlim=(0, 1.2 * max(bits.values())))
    return figure
