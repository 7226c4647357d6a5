"""What reinforcement learning will cost here, for `danlu plan`."""

from collections.abc import Mapping

from danlu.align.config import RLConfig
from danlu.core.verbs import Estimate
from danlu.train.estimate import estimate_training

DRAWING = 1.0
"""Time in which replies are drawn, as a multiple of that in which they are learnt from."""
CHARACTERS = 4
"""Of a prompt's row, in a token."""


def estimate_rollouts(config: RLConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """As a training run on as many packed sequences as the longest replies fill, and the drawing beside."""
    prompt = config.sequence_length - config.max_tokens
    if config.data.is_file() and (text := config.data.read_bytes()).strip():
        prompt = min(prompt, len(text) // CHARACTERS // len(text.splitlines()))
    replies = config.batch_size * config.group_size
    rows = max(1, -(-replies * (prompt + config.max_tokens) // config.sequence_length))
    changes = {"batch_size": rows, "steps": config.steps * config.passes}
    found = estimate_training(config.model_copy(update=changes), upstream)
    found.seconds *= 1 + DRAWING
    return found
