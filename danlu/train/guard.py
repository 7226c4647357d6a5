"""The loss-spike guard: sees a spike, and goes back to before it by one of two published remedies.

- OPT-175B (Zhang et al. 2022, sec. 2.5 and the logbook): restart from an earlier checkpoint with a lower
  learning rate for a while, and with lower gradient clipping (they went from 1.0 to 0.3). The clipping
  matters where bad data is met again: Adam's mean squared gradient remembers it long after.
- PaLM (Chowdhery et al. 2022, sec. 5.1): restart from a checkpoint about 100 steps before the spike and
  skip the batches around it; the spikes did not come back with the same weights and other data.

The guard only decides; the loop owns checkpoints and data. Its state travels in the checkpoint, so that a
killed run meets the same alarm again and acts the same way.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from danlu.train.config import GuardConfig

_LEAST_GRADIENT_RISE = math.log(4)
_FEWEST = 10  # values that a judgement needs


@dataclass(frozen=True)
class Alarm:
    """A spike: found at `step`, begun at `onset` (updates are counted from 1)."""

    step: int
    onset: int
    reason: str
    fatal: bool = False
    """Whether going on as it is would be pointless (NaN)."""


@dataclass(frozen=True)
class Action:
    """What the loop has to do: load the checkpoint of step `target`, drop `skip` batches, go on."""

    target: int
    skip: int
    text: str


class Signal:
    """A number per step and what is usual for it, judged by its recent clean values."""

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window)

    def usual(self) -> tuple[float, float]:
        """Median, and standard deviation (not a robust one: small batches have heavy tails)."""
        return float(np.median(self.values)), float(np.std(self.values))

    def is_high(self, value: float, sigmas: float, least: float) -> bool:
        """Whether `value` lies over the usual by `sigmas` deviations and by `least`."""
        if len(self.values) < _FEWEST:
            return False
        median, sigma = self.usual()
        return value > median + max(sigmas * sigma, least)


@dataclass
class Decisions:
    """What the guard has decided so far; unlike its statistics, this outlives going back."""

    interventions: int = 0
    grace_until: int = 0
    """No new alarm before this step, at which the remedy is judged."""
    usual: tuple[float, float] = (math.nan, math.nan)
    """Median and deviation of the loss before the alarm, which the remedy is judged by."""
    suspect: int | None = None
    """First abnormal step since going back, until the remedy is judged."""
    level: int = 0
    """opt: how often it had to be lowered in a row."""
    cautious: bool = False
    """opt: whether learning rate and clipping are lowered now …"""
    cautious_until: int = 0
    """… at least up to this step, and then until `lr_steps` normal steps in a row:"""
    calm: int = 0


class Guard:
    """Watches loss and gradient norm; `observe` every step, `act` on an alarm.

    A step is abnormal when its loss (or the logarithm of its gradient norm) stands far above the recent
    clean steps, in standard deviations and in absolute terms; `patience` abnormal steps in a row are a
    spike, one odd batch is none. Falling losses never alarm: their median lies above them. NaN alarms at
    once. Abnormal steps don't enter the statistics.

    After going back a remedy has `grace` steps. Then it is judged by the mean of the last steps, which shows
    damage that no single step would: where it hasn't helped, the guard goes further back.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.loss = Signal(config.window)
        self.gradient = Signal(config.window)
        self.recent: deque[float] = deque(maxlen=_FEWEST)
        self.onset: int | None = None
        self.decisions = Decisions()

    def observe(self, step: int, loss: float, gradient_norm: float) -> Alarm | None:
        """Takes in one step; returns an alarm when something has to be done about it."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return Alarm(step, self.onset or step, f"{name} {value} at step {step}", fatal=True)
        log_norm = math.log(max(gradient_norm, 1e-30))
        high = self._what_is_high(loss, log_norm)
        self.recent.append(loss)
        self._note(step, abnormal=high is not None)
        if high is None:
            self.loss.values.append(loss)
            self.gradient.values.append(log_norm)
        if self.config.remedy == "off" or self.spent:
            return None
        if step <= self.decisions.grace_until:
            return self._judge(step) if step == self.decisions.grace_until else None
        if self.onset is None or step - self.onset + 1 < self.config.patience:
            return None
        return Alarm(step, self.onset, f"{high} at step {step}, above the usual since step {self.onset}")

    def _note(self, step: int, abnormal: bool) -> None:
        """Keeps count of abnormal steps in a row, and of normal ones since a remedy."""
        decisions = self.decisions
        if not abnormal:
            self.onset = None
            if step > decisions.cautious_until:
                decisions.calm += 1
                decisions.cautious &= decisions.calm < self.config.lr_steps
            return
        self.onset = self.onset or step
        decisions.calm = 0
        if step <= decisions.grace_until:
            decisions.suspect = decisions.suspect or step
            decisions.cautious = decisions.level > 0

    def _judge(self, step: int) -> Alarm | None:
        """Whether the remedy has helped: an alarm where the last steps lie above the usual on average."""
        suspect, self.decisions.suspect = self.decisions.suspect, None
        n, mean = len(self.recent), sum(self.recent) / len(self.recent)
        median, sigma = self.decisions.usual
        excess = max(self.config.threshold * sigma, self.config.rise * abs(median)) / math.sqrt(n)
        if not mean > median + excess:
            return None
        text = f"loss {mean:.4g} on average of the {n} steps up to {step} (usual {median:.4g} ± {sigma:.2g})"
        return Alarm(step, suspect or step - n + 1, f"{text}: the remedy has not helped")

    @property
    def spent(self) -> bool:
        """Whether the guard has used up its interventions."""
        return self.decisions.interventions >= self.config.max_interventions

    def _what_is_high(self, loss: float, log_norm: float) -> str | None:
        sigmas = self.config.threshold
        if not self.loss.values:
            return None
        median, sigma = self.loss.usual()
        if self.loss.is_high(loss, sigmas, self.config.rise * abs(median)):
            return f"loss {loss:.4g} (usual {median:.4g} ± {sigma:.2g})"
        if self.gradient.is_high(log_norm, sigmas, _LEAST_GRADIENT_RISE):
            return f"gradient norm {math.exp(log_norm):.3g} (usual {math.exp(self.gradient.usual()[0]):.3g})"
        return None

    def act(self, alarm: Alarm, checkpoints: Sequence[int]) -> Action | None:
        """The remedy: which of the `checkpoints` (steps, ascending) to go back to, and how to go on.

        None when there is none to go back to, or the guard is off or has used up its interventions.
        """
        clean = [step for step in checkpoints if step < alarm.onset]
        decisions, config = self.decisions, self.config
        again = alarm.step <= decisions.grace_until
        decisions.grace_until, decisions.suspect = alarm.step + config.grace, None
        if not again and self.loss.values:
            decisions.usual = self.loss.usual()
        if config.remedy == "off" or self.spent or not clean:
            return None
        decisions.interventions += 1
        if config.remedy == "opt":
            decisions.level = decisions.level + 1 if again else 1
            decisions.cautious, decisions.cautious_until, decisions.calm = True, alarm.onset, 0
            target = _newest(clean, alarm.onset - config.rollback * max(0, decisions.level - 2))
            skip = 0
            lr, clip = config.lr_factor**decisions.level, config.clip_factor**decisions.level
            how = f"learning rate × {lr:.3g} and clipping × {clip:.3g} until {config.lr_steps} normal steps"
        else:
            target = _newest(clean, alarm.onset - config.rollback)
            skip = alarm.step - target + config.skip_after
            how = f"the next {skip} batches are skipped"
        text = f"{alarm.reason}. Back to the checkpoint of step {target}; {how} (remedy {config.remedy})"
        return Action(target, skip, text)

    @property
    def learning_rate_scale(self) -> float:
        """What the schedule's learning rate is multiplied by for the next update."""
        return self.config.lr_factor**self.decisions.level if self.decisions.cautious else 1.0

    @property
    def clip_scale(self) -> float:
        """What the largest gradient norm is multiplied by for the next update."""
        return self.config.clip_factor**self.decisions.level if self.decisions.cautious else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": list(self.loss.values),
            "gradient": list(self.gradient.values),
            "recent": list(self.recent),
            "onset": self.onset,
            "decisions": asdict(self.decisions),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_statistics(state)
        decisions = state["decisions"]
        self.decisions = Decisions(**{**decisions, "usual": tuple(decisions["usual"])})

    def load_statistics(self, state: dict[str, Any]) -> None:
        """Takes the statistics of a checkpoint, not its decisions: for going back because of an alarm."""
        self.loss.values = deque(state["loss"], self.config.window)
        self.gradient.values = deque(state["gradient"], self.config.window)
        self.recent = deque(state["recent"], _FEWEST)
        self.onset = state["onset"]


def _newest(checkpoints: Sequence[int], before: int) -> int:
    """The newest checkpoint before a step; the oldest one where none is that early."""
    early = [step for step in checkpoints if step < before]
    return early[-1] if early else checkpoints[0]
