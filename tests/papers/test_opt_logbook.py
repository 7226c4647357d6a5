"""The faults of the OPT experiment do what its rule says, once."""

import torch

from danlu.papers.opt_logbook import (
    FAULT_AT,
    POISONED,
    RATE_FACTOR,
    RATE_STEPS,
    STEPS,
    VOCABULARY,
    Poison,
    WrongRate,
)
from danlu.tokens.loader import Batch


def batch() -> Batch:
    ids = torch.arange(64).view(2, 32)
    positions = torch.arange(32).expand(2, -1)
    return Batch(ids, ids + 1, torch.ones(2, 32), positions, torch.zeros(2, 32, dtype=torch.int32))


def test_ten_batches_of_the_data_are_poisoned_and_stay_so() -> None:
    def poisoned(index: int) -> Batch:
        return Poison().batches(index, [batch()])[0]

    changed = [i for i in range(1, STEPS + 1) if not torch.equal(poisoned(i).ids, batch().ids)]
    assert changed == list(range(FAULT_AT + 1, FAULT_AT + POISONED + 1))
    assert torch.equal(poisoned(FAULT_AT + 1).ids, poisoned(FAULT_AT + 1).ids)
    assert not torch.equal(poisoned(FAULT_AT + 1).ids, poisoned(FAULT_AT + 2).ids)
    assert int(poisoned(FAULT_AT + 1).targets.max()) < VOCABULARY
    assert torch.equal(poisoned(FAULT_AT + 1).weights, batch().weights)


def test_the_wrong_rate_lasts_twenty_updates_whoever_goes_back() -> None:
    fault = WrongRate()
    steps = [*range(1, FAULT_AT + 8), *range(FAULT_AT - 20, STEPS)]  # the guard goes back once
    wrong = [number for number, step in enumerate(steps) if fault.learning_rate(step, 0.5) != 0.5]
    assert wrong == list(range(FAULT_AT, FAULT_AT + RATE_STEPS))
    assert WrongRate().learning_rate(FAULT_AT + 1, 0.5) == 0.5 * RATE_FACTOR
