import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.train.config import ScheduleConfig
from danlu.train.schedule import learning_rate_scale


def scales(steps: int, **values: object) -> list[float]:
    config = ScheduleConfig.model_validate(values)
    return [learning_rate_scale(step, steps, config) for step in range(steps)]


def test_cosine_equals_torch_scheduler() -> None:
    """Against LinearLR followed by CosineAnnealingLR."""
    steps, warmup, final = 60, 10, 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1 - warmup, final),
        ],
        milestones=[warmup],
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert scales(steps, warmup=warmup, final=final) == pytest.approx(expected)


def test_wsd_is_flat_then_falls_to_final() -> None:
    values = scales(100, name="wsd", warmup=10, decay=0.2, final=0.0)
    assert values[9:80] == [1.0] * 71
    assert values[80:] == pytest.approx([1 - k / 20 for k in range(1, 21)])


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    final=st.floats(0, 1),
    name=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_any_schedule_rises_once_and_stays_within_bounds(
    steps: int, warmup: int, final: float, name: str
) -> None:
    values = scales(steps, name=name, warmup=warmup, final=final)
    top = min(warmup, steps)
    assert all(0 <= v <= 1 + 1e-12 and math.isfinite(v) for v in values)
    assert values[:top] == sorted(values[:top])
    assert values[max(0, top - 1) :] == sorted(values[max(0, top - 1) :], reverse=True)
    if name != "constant" and warmup < steps - 1:
        assert values[-1] == pytest.approx(final)
