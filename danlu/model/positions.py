"""Where a token is: rotary angles with their stretchings, and ALiBi's slopes.

Su et al. 2021 (RoPE); Chen et al. 2023 (linear interpolation); Peng et al. 2023 (YaRN, and NTK-aware
scaling in section 3); Ding et al. 2024 (LongRoPE); Grattafiori et al. 2024 (Llama 3); Press et al. 2022
(ALiBi).
"""

import math
from functools import cache

import torch
from torch import Tensor

from danlu.model.config import ModelConfig, RopeScaling

Rotation = tuple[Tensor, Tensor]


def rotary(config: ModelConfig, layer: int, positions: Tensor) -> Rotation | None:
    """cos and sin (…, 1, rotated / 2) in float32 of `layer`'s angles, one axis for the heads.

    None where the layer doesn't rotate. The angles are float64, so that they are as exact at position
    100,000 as at 1.
    """
    rope = config.rope_theta_of(layer)
    if rope is None:
        return None
    theta, scaling = rope
    width = config.rope_width or config.head_width
    if scaling is not None and scaling.kind in ("dynamic", "longrope"):
        frequencies, factor = rope_frequencies(theta, width, scaling, int(positions.max()) + 1)
        frequencies = frequencies.to(positions.device)
    else:
        frequencies, factor = _frequencies_on(positions.device, theta, width, scaling)
    angles = positions[..., None, None] * frequencies
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rope_frequencies(
    theta: float, width: int, scaling: RopeScaling | None = None, longest: int = 0
) -> tuple[Tensor, float]:
    """Angles per position (width / 2,) in float64, and the factor of the rotated vectors.

    Plain: θ^(-2i / width). `longest`: tokens of the sequence, which `dynamic` and `longrope` go by.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    if scaling is None:
        return theta**-exponents, 1.0
    if scaling.kind == "dynamic":
        stretch = scaling.factor * max(longest, scaling.original) / scaling.original - (scaling.factor - 1)
        return (theta * stretch ** (width / (width - 2))) ** -exponents, 1.0
    plain = theta**-exponents
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "longrope":
        divisors = scaling.long if longest > scaling.original else scaling.short
        return plain / torch.tensor(divisors, dtype=torch.float64), longrope_factor(scaling)
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)  # of the whole context
        kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / scaling.factor), 1.0
    low, high = (_yarn_bound(turns, width, theta, scaling) for turns in (scaling.high, scaling.low))
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1).double()
    return plain * (kept + (1 - kept) / scaling.factor), yarn_factor(scaling)


@cache
def _frequencies_on(
    device: torch.device, theta: float, width: int, scaling: RopeScaling | None
) -> tuple[Tensor, float]:
    """Made once: a copy to a GPU in every step would stall it, and can't be part of a CUDA graph."""
    frequencies, factor = rope_frequencies(theta, width, scaling)
    return frequencies.to(device), factor


def _yarn_bound(turns: float, width: int, theta: float, scaling: RopeScaling) -> float:
    """The index of the frequency that turns so often in the original context (YaRN, equation 17)."""
    bound = width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    if scaling.truncate:
        bound = math.floor(bound) if turns == scaling.high else math.ceil(bound)
    return max(bound, 0) if turns == scaling.high else min(bound, width - 1)


def yarn_factor(scaling: RopeScaling) -> float:
    """The factor of queries and keys (YaRN, equation 22: √(1/t) = 0.1 ln s + 1)."""
    return scaling.attention or 0.1 * math.log(scaling.factor) + 1


def longrope_factor(scaling: RopeScaling) -> float:
    """The factor of queries and keys (LongRoPE, section 3.3, as Phi-3's code has it)."""
    if scaling.attention or scaling.factor <= 1:
        return scaling.attention or 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original))


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Turns the pairs (x_i, x_{i + n/2}) of the first n entries of x (B, T, H, head).

    cos and sin (B or 1, T, 1, n / 2).
    """
    if rotation is None:
        return x
    cos, sin = rotation
    rotated = 2 * cos.shape[-1]
    a, b = x[..., :rotated].float().chunk(2, dim=-1)
    y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return y if rotated == x.shape[-1] else torch.cat((y, x[..., rotated:]), dim=-1)


@cache
def alibi_slopes(n_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """(H,) float32: what a head's score loses a token of distance. Press et al. 2022, section 3.

    2^(-8/n), 2^(-16/n), … for n a power of two; else those of the power below, and then every other one of
    the power above.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes, device=device)
