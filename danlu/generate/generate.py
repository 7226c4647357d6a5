"""`danlu generate`: a prompt in, a text out."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import danlu
from danlu.core.device import choose_device, choose_dtype
from danlu.core.files import read_text
from danlu.generate.beam import BeamParams, beam_search
from danlu.generate.config import GenerateConfig, SamplingConfig
from danlu.generate.engine import Completion, Engine, Prompt
from danlu.generate.packed import Kind
from danlu.generate.sampling import Row, SamplingParams, process
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer


def sampling_params(config: SamplingConfig, seed: int | None = None) -> SamplingParams:
    """The part of a verb's config that says how to sample."""
    values = {name: getattr(config, name) for name in SamplingConfig.model_fields}
    schema, regex = values.pop("json_schema"), values.pop("regex")
    values["seed"] = config.seed if seed is None else seed
    return SamplingParams(**values, schema=_schema(schema) if schema else None, regex=regex or None)


def _schema(given: str) -> str:
    return given if given.lstrip().startswith("{") else read_text(Path(given))


def make_engine(ref: str, dtype: str = "auto", deterministic: bool = False, device: str = "auto") -> Engine:
    """An engine for the model that is named. `deterministic` counts on a processor only."""
    model, tokenizer, kind = load_for_engine(ref, dtype, device)
    on_cpu = model.head_weight.device.type == "cpu"
    return Engine(model, tokenizer, dtype=kind, deterministic=deterministic and on_cpu)


def load_for_engine(ref: str, dtype: str, device: str) -> tuple[Transformer, Tokenizer, Kind]:
    """What an engine is made of; both settings may be auto."""
    where = choose_device(device)
    if dtype == "auto":
        dtype = "bf16" if choose_dtype("auto", where) == torch.bfloat16 else "float32"
    live = torch.float32 if dtype == "float32" or where.type == "cpu" else torch.bfloat16
    model, tokenizer = danlu.load(ref, dtype=live, device=where)
    return model, tokenizer, cast(Kind, dtype)


def generate(config: GenerateConfig) -> dict[str, Any]:
    """`n` answers, seeded seed, seed + 1 …, in one batch; or the best ones that a search with beams finds."""
    engine = make_engine(config.model, config.dtype, config.deterministic, config.device)
    prompt: Any = [{"role": "user", "content": config.prompt}] if config.chat else config.prompt
    if config.beams > 1:
        answers = beams(engine, prompt, config)
    else:
        each = [sampling_params(config, config.seed + number) for number in range(config.n)]
        answers = engine.generate([prompt] * config.n, each)
    return {
        "prompt": config.prompt,
        "answers": [
            {"text": a.text, "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers
        ],
    }


def beams(engine: Engine, prompt: Prompt, config: GenerateConfig) -> list[Completion]:
    """The `n` best answers of a beam search. What shapes a draw (temperature, top-p …) is left out."""
    params = replace(sampling_params(config), temperature=0.0)
    ids, stops = engine.prompt_ids(prompt), tuple(engine.tokenizer.stop_ids)
    room = engine.model.config.max_positions - len(ids)
    search = BeamParams(
        beams=config.beams,
        n=config.n,
        max_tokens=max(1, min(config.max_tokens, room)),
        length_penalty=config.length_penalty,
        stop_ids=stops,
    )

    def change(logprobs: Tensor, texts: list[list[int]]) -> Tensor:
        rows = [Row(ids, params, engine.tokenizer) for _ in texts]
        for row, text in zip(rows, texts, strict=True):
            for token in text[len(ids) :]:
                row.accept(token)
        return process(logprobs, rows, [params] * len(rows))

    [found] = engine.run(lambda sequences: beam_search(sequences, ids, search, change))
    return [
        Completion(
            answer.ids,
            engine.text(prompt, answer.ids),
            "stop" if answer.stopped else "length",
            answer.logprobs,
        )
        for answer in found
    ]


def show(result: dict[str, Any]) -> None:
    """The texts, nothing else."""
    for answer in result["answers"]:
        print(answer["text"])
