"""What reinforcement learning will cost here, for `danlu plan`."""

import math
from collections.abc import Mapping
from itertools import islice

from danlu.align.config import BestOfNConfig, Drawing, RLConfig
from danlu.align.rollouts import read_prompts
from danlu.core.device import machine
from danlu.core.errors import UserError
from danlu.core.verbs import Estimate
from danlu.model import count
from danlu.model.config import ModelConfig
from danlu.train.estimate import estimate_training, sizes_of_start

DRAWING = 1.0
"""Time in which replies are drawn, as a multiple of that in which they are learnt from."""
CHARACTERS = 4
"""Of a prompt's row, in a token."""
DRAWN_SHARE = 0.2
"""Of the machine's matrix-product rate, while replies are drawn: of sixteen together `benchmarks/generate.py`
measures 751 tokens a second, at 270 million operations each, where products run at 984 GFLOP/s."""
PROMPTS = 1000
"""Where they come from another stage, which doesn't say how many."""
LOOKED_AT = 500
"""Prompts, to know how long they are."""
BYTES = 512
"""Entries of a vocabulary whose tokens are about a byte each."""


def estimate_rollouts(config: RLConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """As a training run on as many packed sequences as the longest replies fill, and the drawing beside."""
    sizes, _ = sizes_of_start(str(config.init_from), upstream)
    problems: list[str] = []
    reply = prompt_tokens(config, sizes, upstream, problems) + config.max_tokens
    rows = max(1, math.ceil(config.batch_size * config.group_size * reply / config.sequence_length))
    if config.pretraining is not None:
        rows += config.updates * config.pretraining_rows
    changes = {"batch_size": rows, "steps": config.steps * config.passes}
    found = estimate_training(config.model_copy(update=changes), upstream)
    found.seconds *= 1 + DRAWING
    found.problems.extend(problems)
    return found


def prompt_tokens(
    config: Drawing, sizes: ModelConfig, upstream: Mapping[str, Estimate], problems: list[str]
) -> float:
    """Of a prompt in the mean, as its characters say; the longest that may be where nothing is known."""
    longest = config.sequence_length - config.max_tokens
    characters = 1 if sizes.vocab_size <= BYTES else CHARACTERS
    found: list[float] = []
    if config.data.exists():
        try:
            for _, messages, _ in islice(read_prompts(config.data, config), LOOKED_AT):
                if messages:
                    found.append(sum(len(one["content"]) for one in messages) / characters)
        except UserError as error:
            problems.append(error.message)
    elif "row_bytes" in (told := upstream.get("data", Estimate()).outputs):
        found = [told["row_bytes"] / characters]
    found = [length for length in found if length <= longest]
    return sum(found) / len(found) if found else longest


def estimate_best_of_n(config: BestOfNConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """Reading each prompt once, and drawing all its replies at their longest."""
    sizes, problems = sizes_of_start(config.init_from, upstream)
    prompts = len(config.data.read_bytes().splitlines()) if config.data.is_file() else PROMPTS
    prompts = min(prompts, config.limit + config.held_out_prompts) if config.limit else prompts
    tokens = int(prompts * (prompt_tokens(config, sizes, upstream, problems) + config.n * config.max_tokens))
    here = machine()
    low = config.rollout_dtype == "bf16" or (config.rollout_dtype is None and here.bf16_native)
    flops = tokens * 2.0 * count.parameters(sizes)
    rate = 1e9 * (here.bf16_gflops if low else here.f32_gflops) * DRAWN_SHARE
    memory = (4 + 2 * (2 if low else 4)) * count.parameters(sizes)
    size = prompts * config.sequence_length * CHARACTERS
    outputs = {"bytes": int(size * (1 - config.held_out)), "model": sizes.model_dump()}
    return Estimate(tokens, flops, memory, flops / rate, outputs, problems)
