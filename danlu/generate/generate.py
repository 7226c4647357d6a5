"""`danlu generate`: a prompt in, a text out."""

from typing import Any

import torch

import danlu
from danlu.core.device import choose_dtype
from danlu.generate.config import GenerateConfig, SamplingConfig
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams


def sampling_params(config: SamplingConfig, seed: int | None = None) -> SamplingParams:
    """The part of a verb's config that says how to sample."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed if seed is None else seed,
    )


def generate(config: GenerateConfig) -> dict[str, Any]:
    """`n` answers, seeded seed, seed + 1 …"""
    model, tokenizer = danlu.load(config.model, dtype=torch.float32)
    model.compute_dtype = choose_dtype(config.dtype, torch.device("cpu"))
    engine = Engine(model, tokenizer)
    prompt: Any = [{"role": "user", "content": config.prompt}] if config.chat else config.prompt
    answers = [
        engine.generate([prompt], sampling_params(config, config.seed + number))[0]
        for number in range(config.n)
    ]
    return {
        "prompt": config.prompt,
        "answers": [
            {"text": a.text, "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers
        ],
    }


def show(result: dict[str, Any]) -> None:
    """The texts, nothing else."""
    for answer in result["answers"]:
        print(answer["text"])
