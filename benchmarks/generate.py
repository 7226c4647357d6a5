"""Generation speed on smollm2: danlu beside transformers, ctranslate2 and llama.cpp, in turns.

    python benchmarks/generate.py [--batches 1 16] [--contestants NAME ...] [--alternations 7] [--json FILE]
    python benchmarks/generate.py --device cuda

On a GPU the model is a LLaMA shape of 1.1B parameters with random weights, and the peers are transformers,
compiled and not, and vLLM.

128 tokens in, 128 out, greedy, nothing stops. Every contestant is a process of its own. All are started, have
their answers compared, are warmed up, and then run by turns while the others sleep. Each call has prompts of
its own, so that nobody answers from what it computed before. What isn't installed is left out, by name:
pip install -c constraints.txt '.[bench]' (llama-cpp-python compiles for minutes).

Timed are, in each turn, a call for one token, which is the prompt's time, and a call for all of them; tokens
per second are those behind the first over the difference. `whole` is all tokens over the whole call. The
weights are those of the Q4_1 file in every format; `same` is how many of the first 16 tokens agree, on
average over 16 prompts, with transformers in float32. The run fails where a contestant in float32 has less
than 15, or any other less than 4.

danlu also runs in its deterministic mode, and with drafts looked up in the text so far (speculative
decoding): what these cost or gain on such prompts is a ratio too.

The share of memory bandwidth is the bytes of the matrices that a step must read, times steps, over time and
the rate at which the device reads memory (a sum over 1 GB, measured in every turn). It says how far batch 1
is from what the machine can do; at batch 16 arithmetic counts as well.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from _racing import Absent, Contestant, Quietness, median_interval, say

from danlu.core.host import cores

MODEL = "smollm2"
N_IN = N_OUT = 128
N_PROMPTS = 16
N_COMPARED = 16
"""Tokens of each answer that are compared before the race."""

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts of equal length and a number of tokens → that many tokens for each."""


@dataclass(frozen=True)
class Format:
    """Who computes, with weights in what."""

    program: str
    dtype: str
    bits: float
    """Of a weight. llama.cpp's files say it themselves."""
    agrees: int = 4
    """Least number of the compared tokens that are those of float32."""
    device: str = "cpu"


CONTESTANTS = {
    "danlu float32": Format("danlu", "float32", 32, agrees=15),
    "danlu bf16": Format("danlu", "bf16", 16),
    "danlu int8": Format("danlu", "int8", 8),
    "danlu int4": Format("danlu", "int4", 6),
    "danlu bf16, deterministic": Format("danlu", "bf16 deterministic", 16),
    "danlu bf16, look-up": Format("danlu", "bf16 look-up", 16),
    "transformers float32": Format("transformers", "float32", 32, agrees=15),
    "transformers bf16": Format("transformers", "bfloat16", 16),
    "ctranslate2 float32": Format("ctranslate2", "float32", 32, agrees=15),
    "ctranslate2 int8": Format("ctranslate2", "int8", 8),
    "llama.cpp bf16": Format("llama.cpp", "bfloat16", 16),
    "llama.cpp Q8_0": Format("llama.cpp", "q8_0", 8.5),
    "llama.cpp Q4_1": Format("llama.cpp", "as it is", 5),
    "GPU: danlu bf16": Format("danlu", "bf16", 16, device="cuda"),
    "GPU: danlu int8": Format("danlu", "int8", 8, device="cuda"),
    "GPU: transformers float32": Format("transformers", "float32", 32, agrees=15, device="cuda"),
    "GPU: transformers bf16": Format("transformers", "bfloat16", 16, device="cuda"),
    "GPU: transformers bf16, compiled": Format("transformers", "bfloat16 compiled", 16, device="cuda"),
    "GPU: vLLM bf16": Format("vllm", "bfloat16", 16, device="cuda"),
}
REFERENCES = ("transformers float32", "GPU: transformers float32")

_KEPT: dict[str, Any] = {}
"""What a process makes once."""


# The contestants: each gets the folder with the converted models, and returns its `Generate`.


def danlu_program(form: Format, folder: Path) -> Generate:
    import torch

    import danlu
    from danlu.generate.kernels import POSITIONS
    from danlu.generate.paged import bytes_per_block
    from danlu.generate.sampling import SamplingParams
    from danlu.generate.speculative import PromptLookup, speculative
    from danlu.model.checkpoint import load_model
    from danlu.tokens.bpe import train_bpe

    torch.set_num_threads(cores())
    kind, _, mode = form.dtype.partition(" ")
    if form.device == "cuda":
        model = load_model(folder / "hf", dtype=torch.bfloat16).to("cuda")
        tokenizer = train_bpe(["danlu danlu"], 259)  # unused: ids go in and out
    else:
        model, tokenizer = danlu.load(MODEL, dtype=torch.float32)
    room = N_PROMPTS * 2 * (N_IN + N_OUT)  # six of us and seven others share the memory
    size = bytes_per_block(model.config, torch.float32) * room // POSITIONS
    engine: Any = danlu.Engine(
        model, tokenizer, dtype=kind, deterministic=mode == "deterministic", cache_bytes=size
    )

    def generate(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=n_tokens, temperature=0, stop_ids=())
        return [completion.ids for completion in engine.generate(prompts, params)]

    def with_drafts(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        def program(ids: list[int]) -> Any:
            return lambda sequences: speculative(sequences, ids, PromptLookup(), max_tokens=n_tokens)

        return [answer.ids for answer in engine.run(*map(program, prompts))]

    return with_drafts if mode == "look-up" else generate


def transformers_program(form: Format, folder: Path) -> Generate:
    import torch
    import transformers

    torch.set_num_threads(cores())
    dtype, _, mode = form.dtype.partition(" ")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, dtype))
    model.to(form.device)
    model.generation_config.eos_token_id = None
    if mode == "compiled":  # a static cache is what makes transformers compile its decoding
        model.generation_config.cache_implementation = "static"

    @torch.no_grad()
    def generate(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=form.device)
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n_tokens,
            pad_token_id=0,
        )
        return answer[:, ids.shape[1] :].tolist()

    return generate


def vllm_program(form: Format, folder: Path) -> Generate:
    import vllm

    model = vllm.LLM(
        str(folder / "hf"),
        dtype=form.dtype,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        max_model_len=2 * (N_IN + N_OUT),
    )

    def generate(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=n_tokens, min_tokens=n_tokens, ignore_eos=True, detokenize=False
        )
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
        return [list(found.outputs[0].token_ids) for found in model.generate(asked, params, use_tqdm=False)]

    return generate


def ctranslate2_program(form: Format, folder: Path) -> Generate:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    dtype = form.dtype

    # Converted to its own format here: two processes don't share a folder.
    converted = folder / f"ctranslate2-{dtype}"
    TransformersConverter(str(folder / "hf")).convert(str(converted), quantization=dtype, force=True)
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type=dtype, intra_threads=cores())
    names = json.loads((folder / "vocabulary.json").read_text("utf-8"))
    ids_of = {name: number for number, name in enumerate(names)}

    def generate(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        answers = generator.generate_batch(
            [[names[number] for number in ids] for ids in prompts],
            max_length=n_tokens,
            include_prompt_in_result=False,
            sampling_topk=1,
            end_token=[len(names) - 1],  # another one than the model's: a rare word ends nothing here
        )
        return [[ids_of[name] for name in answer.sequences[0]] for answer in answers]

    return generate


def llama_cpp_program(form: Format, folder: Path) -> Generate:
    """Its lower interface: all sequences are one llama_batch, as in its own llama-batched-bench."""
    import llama_cpp
    import numpy as np

    @llama_cpp.llama_log_callback
    def silent(level: int, text: bytes, data: Any) -> None:
        pass

    _KEPT["silent"] = silent  # it is called for as long as the process lives
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(gguf_of(form.dtype, folder)).encode(), settings)
    n_words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    contexts: dict[int, Any] = {}

    def context_of(n_sequences: int) -> Any:
        if n_sequences not in contexts:
            wanted = llama_cpp.llama_context_default_params()
            wanted.n_ctx = n_sequences * 2 * (N_IN + N_OUT)
            wanted.n_batch = n_sequences * N_IN
            wanted.n_seq_max = n_sequences
            wanted.n_threads = wanted.n_threads_batch = cores()
            contexts[n_sequences] = llama_cpp.llama_init_from_model(model, wanted)
        return contexts[n_sequences]

    def decode(context: Any, batch: Any, rows: list[list[int]], start: int) -> list[int]:
        """Reads the next tokens of every sequence; the most probable one after each."""
        place = 0
        for sequence, ids in enumerate(rows):
            for offset, token in enumerate(ids):
                batch.token[place] = token
                batch.pos[place] = start + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = offset == len(ids) - 1
                place += 1
        batch.n_tokens = place
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode ends with {code}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(rows), n_words))
        return logits.argmax(axis=1).tolist()

    def generate(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        context = context_of(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        batch = llama_cpp.llama_batch_init(len(prompts) * N_IN, 0, 1)
        steps = [decode(context, batch, prompts, 0)]
        while len(steps) < n_tokens:
            steps.append(decode(context, batch, [[token] for token in steps[-1]], N_IN + len(steps) - 1))
        llama_cpp.llama_batch_free(batch)
        return [list(row) for row in zip(*steps, strict=True)]

    return generate


PROGRAMS: dict[str, Callable[[Format, Path], Generate]] = {
    "danlu": danlu_program,
    "vllm": vllm_program,
    "transformers": transformers_program,
    "ctranslate2": ctranslate2_program,
    "llama.cpp": llama_cpp_program,
}


class Racer(Contestant):
    """A contestant, with its times so far."""

    def __init__(self, name: str, folder: Path) -> None:
        self.format = CONTESTANTS[name]
        super().__init__(name, PROGRAMS[self.format.program], self.format, folder)
        self.same = 0.0
        self.prompt: dict[int, list[float]] = {}
        self.whole: dict[int, list[float]] = {}

    def run(self, prompts: list[list[int]], n_tokens: int) -> tuple[float, list[list[int]]]:
        seconds, answers = self.ask(prompts, n_tokens)
        if [len(answer) for answer in answers] != [n_tokens] * len(prompts):
            raise SystemExit(f"{self.name} was asked for {n_tokens} tokens, and gave another number")
        return seconds, answers

    def race(self, batch: int, one: list[list[int]], all_of_them: list[list[int]]) -> None:
        self.prompt.setdefault(batch, []).append(self.run(one, 1)[0])
        self.whole.setdefault(batch, []).append(self.run(all_of_them, N_OUT)[0])

    def rates(self, batch: int) -> list[float]:
        """Tokens a second behind the prompt, turn by turn."""
        times = zip(self.prompt[batch], self.whole[batch], strict=True)
        return [batch * (N_OUT - 1) / (whole - prompt) for prompt, whole in times]

    def whole_rates(self, batch: int) -> list[float]:
        return [batch * N_OUT / seconds for seconds in self.whole[batch]]


# The controller.


def gguf_of(dtype: str, folder: Path) -> Path:
    from danlu.model.checkpoint import resolve

    return resolve(MODEL) if dtype == "as it is" else folder / f"{dtype}.gguf"


def prepare_random(folder: Path) -> None:
    """Writes a model in TinyLlama's shape (Zhang et al. 2024, table 1)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(sizes)
    model.bfloat16().save_pretrained(folder / "hf")


def prepare(folder: Path, programs: set[str]) -> None:
    """Writes the model in the formats that the contestants read."""
    from transformers import AutoTokenizer

    from danlu.model.config import ConvertConfig
    from danlu.model.convert import convert

    convert(ConvertConfig(source=MODEL, out=folder / "hf", dtype="float32"))
    theirs = AutoTokenizer.from_pretrained(folder / "hf")
    names = theirs.convert_ids_to_tokens(range(len(theirs)))
    (folder / "vocabulary.json").write_text(json.dumps(names), "utf-8")
    if "llama.cpp" in programs:
        for dtype in ("bfloat16", "q8_0"):
            convert(
                ConvertConfig.model_validate(
                    {"source": MODEL, "out": folder / f"{dtype}.gguf", "dtype": dtype}
                )
            )


def draw_prompts(count: int, folder: Path, device: str) -> list[list[int]]:
    """The beginnings of `count` different conversations of the package chitchat-dataset, in ids."""
    if device == "cuda":
        draw = random.Random(0)
        return [[draw.randrange(32000) for _ in range(N_IN)] for _ in range(count)]
    from danlu.data.chitchat import read_chitchat
    from danlu.tokens.load import load_tokenizer

    tokenizer = load_tokenizer(folder / "hf")
    found = (tokenizer.encode(document.text)[:N_IN] for document in read_chitchat())
    prompts = list(islice((ids for ids in found if len(ids) == N_IN), count))
    if len({tuple(ids[:8]) for ids in prompts}) < count / 2:
        raise SystemExit("the prompts begin alike: caches would answer for the models")
    return prompts


def weight_bytes(racer: Racer, folder: Path) -> float:
    """What one step must read: all matrices, the output's among them (the embedding is the same one)."""
    if racer.format.program == "llama.cpp":
        from gguf import GGUFReader

        return float(sum(t.n_bytes for t in GGUFReader(gguf_of(racer.format.dtype, folder)).tensors))
    from danlu.model.checkpoint import sizes_of
    from danlu.model.count import parameters

    sizes = sizes_of(str(folder / "hf") if racer.format.device == "cuda" else MODEL)
    embedding = 0 if sizes.tied_embeddings else sizes.vocab_size * sizes.width
    return (parameters(sizes) - embedding) * racer.format.bits / 8


def bandwidth(device: str) -> float:
    """Bytes a second that the device reads from memory: the best of several sums over 1 GB."""
    import numpy as np

    if device == "cuda":
        return _gpu_bandwidth()

    best, table = float("inf"), _table(np)
    total = _summing()
    for _ in range(6):
        start = time.perf_counter()
        total(table)
        best = min(best, time.perf_counter() - start)
    return table.nbytes / best


def _gpu_bandwidth() -> float:
    import torch

    table = torch.ones(1 << 28, device="cuda")
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        table.sum()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return table.nbytes / best


def _table(np: Any) -> Any:
    return _KEPT.setdefault("table", np.ones(1 << 28, np.float32))


def _summing() -> Callable[[Any], float]:
    import numba

    if "sum" not in _KEPT:

        @numba.njit(parallel=True, fastmath=True)
        def total(table: Any) -> float:
            found = 0.0
            for index in numba.prange(table.shape[0]):
                found += table[index]
            return found

        _KEPT["sum"] = total
    return _KEPT["sum"]


def compare(racers: list[Racer], prompts: list[list[int]]) -> None:
    """Sets `same`. Ends the run where a contestant doesn't say what the model says."""
    answers = {racer.name: racer.run(prompts, N_COMPARED)[1] for racer in racers}
    if (reference := next((name for name in REFERENCES if name in answers), None)) is None:
        raise SystemExit(f"{REFERENCES[0]} is what the others are compared with: let it take part")
    for racer in racers:
        pairs = zip(answers[racer.name], answers[reference], strict=True)
        racer.same = statistics.mean(_agreeing(found, expected) for found, expected in pairs)
        if racer.same < racer.format.agrees:
            raise SystemExit(
                f"{racer.name} agrees with {reference} on {racer.same:.1f} of the first {N_COMPARED} tokens, "
                f"which is less than {racer.format.agrees}: that isn't the same model"
            )


def _agreeing(found: list[int], expected: list[int]) -> int:
    """How many tokens are the same before the first other one."""
    pairs = zip(found, expected, strict=True)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(expected))


def measure(names: list[str], batches: list[int], alternations: int, folder: Path) -> dict[str, Any]:
    """Every contestant, turn by turn. Returns the rows and ratios of the result."""
    racers, left_out = [], {}
    for name in names:
        try:
            racers.append(Racer(name, folder))
        except Absent as reason:
            left_out[name] = str(reason)
            say(str(reason))
    device = racers[0].format.device
    sets = max(batches) * (2 * (alternations + 1) * len(batches)) + N_PROMPTS
    pool = iter(draw_prompts(sets, folder, device))
    compare(racers, list(islice(pool, N_PROMPTS)))
    for batch in batches:
        one, all_of_them = list(islice(pool, batch)), list(islice(pool, batch))
        for racer in racers:
            racer.race(batch, one, all_of_them)
            racer.prompt.clear(), racer.whole.clear()
            say(f"{racer.name} is warm at batch {batch}")
    quiet, reads = Quietness(), []
    for batch in batches:
        for number in range(alternations):
            one, all_of_them = list(islice(pool, batch)), list(islice(pool, batch))
            for racer in racers if number % 2 == 0 else racers[::-1]:
                racer.race(batch, one, all_of_them)
            reads.append(bandwidth(device))
            last = "  ".join(f"{racer.rates(batch)[-1]:.0f}" for racer in racers)
            say(f"batch {batch}: {number + 1}/{alternations}  {last}")
    others = quiet.others()
    for racer in racers:
        racer.stop()
    speed = statistics.median(reads)
    return {
        "rows": [row(racer, batch, speed, folder) for batch in batches for racer in racers],
        "ratios": {name: found for batch in batches for name, found in ratios(racers, batch).items()},
        "left_out": left_out,
        "bandwidth_bytes_per_second": speed,
        "others_share_of_processor": others,
    }


def row(racer: Racer, batch: int, speed: float, folder: Path) -> dict[str, Any]:
    rate, size = statistics.median(racer.rates(batch)), weight_bytes(racer, folder)
    return {
        "contestant": racer.name,
        "batch": batch,
        "tokens_per_second": rate,
        "whole_tokens_per_second": statistics.median(racer.whole_rates(batch)),
        "prompt_seconds": statistics.median(racer.prompt[batch]),
        "weight_bytes": size,
        "share_of_bandwidth": size * rate / batch / speed,
        "same": racer.same,
        "turns": {"prompt_seconds": racer.prompt[batch], "whole_seconds": racer.whole[batch]},
    }


def ratios(racers: list[Racer], batch: int) -> dict[str, Any]:
    """danlu over a peer or over itself, within each turn: at equal bits, and the fastest over the fastest."""
    by_name = {racer.name.removeprefix("GPU: "): racer for racer in racers}
    ours = [racer for racer in racers if racer.format.program == "danlu" and "," not in racer.name]
    peers = [racer for racer in racers if racer.format.program != "danlu"]
    theirs = [racer for racer in peers if racer.format.program == "transformers"]
    pairs = {
        "16 bits": (by_name.get("danlu bf16"), by_name.get("llama.cpp bf16")),
        "8 bits": (by_name.get("danlu int8"), by_name.get("llama.cpp Q8_0")),
        "deterministic": (by_name.get("danlu bf16, deterministic"), by_name.get("danlu bf16")),
        "speculative decoding": (by_name.get("danlu bf16, look-up"), by_name.get("danlu bf16")),
        "fastest over the fastest peer": (fastest(ours, batch), fastest(peers, batch)),
        "fastest over transformers' fastest": (fastest(ours, batch), fastest(theirs, batch)),
        "beside vLLM": (by_name.get("danlu bf16"), by_name.get("vLLM bf16")),
    }
    found = {}
    for name, (mine, other) in pairs.items():
        if mine is None or other is None:
            continue
        each = [a / b for a, b in zip(mine.rates(batch), other.rates(batch), strict=True)]
        whole = [a / b for a, b in zip(mine.whole_rates(batch), other.whole_rates(batch), strict=True)]
        found[f"batch {batch}, {name}"] = {
            "danlu": mine.name,
            "against": other.name,
            "median": statistics.median(each),
            "interval": list(median_interval(each)),
            "each": each,
            "median_whole": statistics.median(whole),
        }
    return found


def fastest(racers: list[Racer], batch: int) -> Racer | None:
    return max(racers, key=lambda racer: statistics.median(racer.rates(batch)), default=None)


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':32} {'batch':>5} {'tokens/s':>9} {'whole':>7} {'prompt':>8} {'bandwidth':>10} {'same':>5}"]
    for found in result["rows"]:
        lines.append(
            f"{found['contestant']:32} {found['batch']:5} {found['tokens_per_second']:9.1f} "
            f"{found['whole_tokens_per_second']:7.1f} {found['prompt_seconds']:6.2f} s "
            f"{found['share_of_bandwidth']:10.1%} {found['same']:5.1f}"
        )
    lines += result["left_out"].values()
    for name, ratio in result["ratios"].items():
        low, high = ratio["interval"]
        lines.append(
            f"{name}: {ratio['danlu']} is {ratio['median']:.3f} times as fast as {ratio['against']} "
            f"[{low:.3f}, {high:.3f}]; {ratio['median_whole']:.3f} times with the prompt"
        )
    lines.append(
        f"memory is read at {result['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s; other processes took "
        f"{result['others_share_of_processor']:.1%} of the processor"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help="default: all of the device"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

    from danlu.core.device import machine

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        names = [
            name
            for name, form in CONTESTANTS.items()
            if form.device == options.device and (not options.contestants or name in options.contestants)
        ]
        if options.device == "cuda":
            prepare_random(folder)
        else:
            prepare(folder, {CONTESTANTS[name].program for name in names})
        measured = measure(names, options.batches, options.alternations, folder)
    result = {"machine": asdict(machine()), **measured}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
