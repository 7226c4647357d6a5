"""The learning rate over the steps, as a multiple of its peak."""

import math

from danlu.train.config import ScheduleConfig


def learning_rate_scale(step: int, steps: int, config: ScheduleConfig) -> float:
    """Multiple of the peak learning rate for the update number `step` (0-based) of `steps`.

    Linear warm-up (the first update already moves), then
    - cosine: half a cosine from 1 to `final` (Loshchilov & Hutter 2017, eq. 5, without restarts);
    - wsd: 1, then linear to `final` over the last `decay` of the steps (Hu et al. 2024, MiniCPM, sec. 4);
    - constant: 1.
    """
    warmup = min(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "wsd":
        decay_steps = max(1, min(round(config.decay * steps), steps - warmup))
        progress = max(0.0, (step + 1 - (steps - decay_steps)) / decay_steps)
        return 1.0 - (1.0 - config.final) * progress
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
