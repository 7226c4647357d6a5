"""What reinforcement learning will cost here, for `danlu plan`."""

from collections.abc import Mapping

from danlu.align.config import BestOfNConfig, RLConfig
from danlu.core.device import machine
from danlu.core.errors import UserError
from danlu.core.verbs import Estimate
from danlu.model import count
from danlu.model.checkpoint import sizes_of
from danlu.model.config import ModelConfig
from danlu.train.estimate import estimate_training

DRAWING = 1.0
"""Time in which replies are drawn, as a multiple of that in which they are learnt from."""
CHARACTERS = 4
"""Of a prompt's row, in a token."""
DRAWN_SHARE = 0.2
"""Of the machine's matrix-product rate, while replies are drawn: of sixteen together `benchmarks/generate.py`
measures 751 tokens a second, at 270 million operations each, where products run at 984 GFLOP/s."""
PROMPTS = 1000
"""Where they come from another stage, which doesn't say how many."""


def estimate_rollouts(config: RLConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """As a training run on as many packed sequences as the longest replies fill, and the drawing beside."""
    prompt = config.sequence_length - config.max_tokens
    if config.data.is_file() and (text := config.data.read_bytes()).strip():
        prompt = min(prompt, len(text) // CHARACTERS // len(text.splitlines()))
    replies = config.batch_size * config.group_size
    rows = max(1, -(-replies * (prompt + config.max_tokens) // config.sequence_length))
    if config.pretraining is not None:
        rows += config.updates * config.pretraining_rows
    changes = {"batch_size": rows, "steps": config.steps * config.passes}
    found = estimate_training(config.model_copy(update=changes), upstream)
    found.seconds *= 1 + DRAWING
    return found


def estimate_best_of_n(config: BestOfNConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """Reading each prompt once, and drawing all its replies at their longest."""
    problems: list[str] = []
    sizes = ModelConfig()
    if "init_from" in upstream and "model" in upstream["init_from"].outputs:
        sizes = ModelConfig(**upstream["init_from"].outputs["model"])
    elif config.init_from is not None:
        try:
            sizes = sizes_of(config.init_from)
        except UserError as error:
            problems.append(f"{error.message}; its size is guessed")
    prompts = len(config.data.read_bytes().splitlines()) if config.data.is_file() else PROMPTS
    prompts = min(prompts, config.limit + config.held_out_prompts) if config.limit else prompts
    tokens = prompts * (config.sequence_length - config.max_tokens + config.n * config.max_tokens)
    here = machine()
    low = config.rollout_dtype == "bf16" or (config.rollout_dtype is None and here.bf16_native)
    flops = tokens * 2.0 * count.parameters(sizes)
    rate = 1e9 * (here.bf16_gflops if low else here.f32_gflops) * DRAWN_SHARE
    memory = (4 + 2 * (2 if low else 4)) * count.parameters(sizes)
    size = prompts * config.sequence_length * CHARACTERS
    outputs = {"bytes": int(size * (1 - config.held_out)), "model": sizes.model_dump()}
    return Estimate(tokens, flops, memory, flops / rate, outputs, problems)
