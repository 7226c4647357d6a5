import math
import random

import pytest

from danlu.train.config import GuardConfig
from danlu.train.guard import Alarm, Guard


def clean_loss(step: int, noise: random.Random, spread: float) -> float:
    """A steep early descent, then a slow one, with heavy-tailed noise as small batches have it."""
    return (
        1.8 + 7.5 * math.exp(-step / 15) + 1.2 * math.exp(-step / 150) + spread * noise.gauss(0, 1) ** 3 / 3
    )


def clean_norm(step: int, noise: random.Random) -> float:
    """Grows and falls during warm-up, then wanders."""
    return (0.4 + 6 * math.exp(-step / 10)) * math.exp(0.3 * noise.gauss(0, 1))


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.3])
def test_clean_curves_raise_no_alarm(spread: float) -> None:
    for seed in range(10):
        noise, guard = random.Random(seed), Guard(GuardConfig())
        alarms = [
            guard.observe(step, clean_loss(step, noise, spread), clean_norm(step, noise))
            for step in range(1, 1001)
        ]
        assert not any(alarms)


def run_up(guard: Guard, steps: int) -> None:
    noise = random.Random(1)
    for step in range(1, steps + 1):
        assert guard.observe(step, clean_loss(step, noise, 0.05), clean_norm(step, noise)) is None


def test_a_spike_is_seen_after_patience_and_dated_from_its_onset() -> None:
    guard = Guard(GuardConfig(patience=3))
    run_up(guard, 200)
    assert guard.observe(201, 5.0, 0.5) is None
    assert guard.observe(202, 5.0, 0.5) is None
    alarm = guard.observe(203, 5.0, 0.5)
    assert alarm is not None
    assert (alarm.step, alarm.onset) == (203, 201)


def test_one_odd_batch_is_no_spike_and_leaves_no_trace_in_the_statistics() -> None:
    guard = Guard(GuardConfig())
    run_up(guard, 200)
    usual = guard.loss.usual()
    assert guard.observe(201, 50.0, 0.5) is None
    assert guard.loss.usual() == usual


def test_exploding_gradient_norms_alarm_without_the_loss() -> None:
    guard = Guard(GuardConfig())
    run_up(guard, 200)
    alarms = [guard.observe(step, 2.1, 500.0) for step in range(201, 204)]
    assert alarms[-1] is not None
    assert "gradient norm" in alarms[-1].reason


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)])
def test_nan_alarms_at_once_even_when_off(loss: float, norm: float) -> None:
    assert Guard(GuardConfig(remedy="off")).observe(1, loss, norm) is not None
    assert Guard(GuardConfig()).observe(1, loss, norm) is not None


def test_off_means_no_alarm_for_a_finite_spike() -> None:
    guard = Guard(GuardConfig(remedy="off"))
    run_up(guard, 100)
    assert not any(guard.observe(step, 9.0, 0.5) for step in range(101, 150))


def feed(guard: Guard, steps: range, loss: float) -> None:
    for step in steps:
        assert guard.observe(step, loss, 0.5) is None


def test_opt_goes_back_and_is_cautious_until_the_trouble_is_over() -> None:
    guard = Guard(GuardConfig(remedy="opt", lr_factor=0.3, clip_factor=0.1, lr_steps=4))
    run_up(guard, 200)
    state = guard.state_dict()
    assert (guard.learning_rate_scale, guard.clip_scale) == (1.0, 1.0)
    action = guard.act(Alarm(203, 201, "spike"), [100, 150, 175, 200])
    assert action is not None
    assert (action.target, action.skip) == (200, 0)
    guard.load_statistics(state)
    feed(guard, range(201, 211), 9.0)  # the bad data again
    feed(guard, range(211, 214), 2.0)
    assert (guard.learning_rate_scale, guard.clip_scale) == (0.3, 0.1)
    feed(guard, range(214, 215), 2.0)
    assert (guard.learning_rate_scale, guard.clip_scale) == (1.0, 1.0)


def test_opt_lowers_further_then_goes_further_back_when_it_has_not_helped() -> None:
    guard = Guard(GuardConfig(remedy="opt", lr_factor=0.5, clip_factor=0.5, rollback=20, grace=20))
    targets = []
    for alarm in (Alarm(203, 201, "spike"), Alarm(223, 202, "spike"), Alarm(243, 202, "spike")):
        action = guard.act(alarm, [150, 175, 200])
        assert action is not None
        targets.append((action.target, guard.learning_rate_scale, guard.clip_scale))
    assert targets == [(200, 0.5, 0.5), (200, 0.25, 0.25), (175, 0.125, 0.125)]
    later = guard.act(Alarm(900, 898, "another spike"), [850])
    assert later is not None
    assert guard.learning_rate_scale == 0.5


@pytest.mark.parametrize("remedy", ["opt", "palm"])
def test_a_remedy_is_judged_by_the_mean_of_its_last_steps(remedy: str) -> None:
    """A level that no single step would give away, since it lies within their spread."""

    def after_going_back(level: float) -> Alarm | None:
        noise, guard = random.Random(0), Guard(GuardConfig.model_validate({"remedy": remedy, "grace": 20}))
        run_up(guard, 200)
        state = guard.state_dict()
        assert guard.act(Alarm(203, 201, "spike"), [150]) is not None
        guard.load_statistics(state)
        median, sigma = guard.loss.usual()
        assert level < guard.config.threshold
        alarms = [
            guard.observe(step, median + level * sigma + 0.01 * noise.gauss(0, 1), 0.5)
            for step in range(151, 301)
        ]
        assert [alarm.step for alarm in alarms if alarm] in ([], [223])
        return next((alarm for alarm in alarms if alarm), None)

    assert after_going_back(0.5) is None
    alarm = after_going_back(3.0)
    assert alarm is not None
    assert "has not helped" in alarm.reason
    assert alarm.onset == 214


def test_what_was_damaged_since_going_back_is_dated_from_its_first_abnormal_step() -> None:
    guard = Guard(GuardConfig(remedy="palm", grace=20))
    run_up(guard, 200)
    state = guard.state_dict()
    guard.act(Alarm(203, 201, "spike"), [160])
    guard.load_statistics(state)
    usual = guard.loss.usual()[0]
    alarms = [guard.observe(step, 9.0 if step < 181 else 1.2 * usual, 0.5) for step in range(161, 224)]
    assert [alarm for alarm in alarms[:-1] if alarm] == []
    assert alarms[-1] is not None
    assert (alarms[-1].step, alarms[-1].onset) == (223, 161)


def test_palm_goes_back_and_skips_the_batches_around_the_spike() -> None:
    guard = Guard(GuardConfig(remedy="palm", rollback=20, skip_after=20))
    action = guard.act(Alarm(203, 201, "spike"), [150, 175, 200])
    assert action is not None
    assert (action.target, action.skip) == (175, 203 - 175 + 20)
    assert (guard.learning_rate_scale, guard.clip_scale) == (1.0, 1.0)


def test_goes_to_the_oldest_clean_checkpoint_when_none_is_early_enough() -> None:
    action = Guard(GuardConfig(rollback=20)).act(Alarm(203, 201, "spike"), [190, 195, 202])
    assert action is not None
    assert action.target == 190


def test_no_action_without_a_clean_checkpoint_or_beyond_the_limit() -> None:
    assert Guard(GuardConfig()).act(Alarm(203, 201, "spike"), [202]) is None
    guard = Guard(GuardConfig(max_interventions=1))
    assert guard.act(Alarm(203, 201, "spike"), [150]) is not None
    assert guard.act(Alarm(303, 301, "spike"), [150]) is None


def test_grace_after_going_back_but_not_for_nan() -> None:
    guard = Guard(GuardConfig(remedy="opt", grace=20, window=50))
    run_up(guard, 200)
    state = guard.state_dict()
    guard.act(Alarm(203, 201, "spike"), [175])
    guard.load_statistics(state)
    assert not any(guard.observe(step, 6.0, 0.5) for step in range(176, 223))
    alarm = guard.observe(223, 6.0, 0.5)
    assert alarm is not None
    assert alarm.onset == 176
    assert guard.observe(210, math.nan, 0.5) is not None


def test_state_round_trips_through_json() -> None:
    import json

    guard = Guard(GuardConfig(remedy="opt"))
    run_up(guard, 100)
    guard.observe(101, 9.0, 0.5)
    guard.act(Alarm(101, 101, "spike"), [50])
    other = Guard(GuardConfig(remedy="opt"))
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    assert other.learning_rate_scale == guard.learning_rate_scale == 0.1
