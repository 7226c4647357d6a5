import pytest

from danlu.core.summary import summary

STAGE = {"name": "data", "done": True, "result": {}}
RUN = {
    "stages": [STAGE, STAGE | {"name": "pretrain"}],
    "seconds": 187,
    "peak_memory_bytes": 1_500_000_000,
    "machine": {"processor": "A Chip", "cores": 2},
}


def test_what_it_cost() -> None:
    assert summary(RUN) == ["2 stages took 3:07 min on A Chip, 2 cores, with at most 1.5 GB of memory."]
    alone = {**RUN, "stages": [STAGE | {"done": False}], "machine": {}}
    assert summary(alone) == ["1 stage took 3:07 min, with at most 1.5 GB of memory. Not finished: data."]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({}, "pretrain: 5.8 million parameters were trained on 1,802,240 tokens."),
        (
            {"held_out_loss": 4.119},
            "pretrain: 5.8 million parameters were trained on 1,802,240 tokens; "
            "the held-out loss is 4.12 nats a token.",
        ),
        (
            {"held_out_loss": 4.119, "held_out_loss_before": 6.5, "interventions": 1},
            "pretrain: 5.8 million parameters were trained on 1,802,240 tokens; the held-out loss went from "
            "6.50 to 4.12 nats a token. The loss-spike guard acted once.",
        ),
        (
            {"held_out_loss": 0.3, "held_out_loss_before": 0.7, "accuracy": 0.9, "accuracy_before": 0.446},
            "pretrain: 5.8 million parameters were trained on 1,802,240 tokens; the share of held-out pairs "
            "that it ranks rightly went from 44.6% to 90.0%.",
        ),
        (
            {"held_out_loss": None, "held_out_reward": 6.3, "held_out_reward_before": -2.8},
            "pretrain: 5.8 million parameters were trained on 1,802,240 tokens; the mean reward of a reply "
            "to a held-out prompt went from -2.80 to 6.30.",
        ),
        (
            {"interventions": 3},
            "pretrain: 5.8 million parameters were trained on 1,802,240 tokens. "
            "The loss-spike guard acted 3 times.",
        ),
    ],
)
def test_what_was_trained(result: dict[str, float], expected: str) -> None:
    trained = {"parameters": 5_795_072, "tokens": 1_802_240, **result}
    stage = STAGE | {"name": "pretrain", "result": trained}
    assert summary({**RUN, "stages": [stage]})[1:] == [expected]


def test_what_came_out() -> None:
    bits = {"model": 1.7, "gzip": 3.0, "xz": 2.0}
    figures = {**RUN, "bits_per_byte": bits, "labels": {"xz": "xz -9e"}}
    assert summary(figures)[1:] == [
        "On text it has never seen the model needs 1.70 bits per byte, 15% fewer than the best other "
        "compressor (xz -9e, 2.00)."
    ]
    figures |= {"bits_per_byte_with_model": bits | {"model": 126.0}}
    assert summary(figures)[2].startswith("Counting the model's own bytes it needs 126.00, and loses: ")
    figures |= {"bits_per_byte_with_model": bits | {"model": 1.9}}
    assert summary(figures)[2] == "Counting the model's own bytes it needs 1.90, and still wins."


def test_a_model_that_loses_is_said_to() -> None:
    figures = {**RUN, "bits_per_byte": {"model": 2.5, "xz": 2.0}}
    assert "2.50 bits per byte, 25% more than the best other compressor (xz, 2.00)" in summary(figures)[1]


def test_small_talk() -> None:
    passed = {"every reply ends": True, "no long copy": True}
    assert summary({**RUN, "chat_quality": {"passed": passed}})[1:] == ["Its small talk passes all 2 checks."]
    passed["no long copy"] = False
    assert summary({**RUN, "chat_quality": {"passed": passed}})[1:] == [
        "Its small talk passes 1 of 2 checks; not: no long copy."
    ]


def test_what_is_not_there_is_not_said() -> None:
    odd = {"bits_per_byte": 1.5, "bits_per_byte_with_model": None, "chat_quality": {}}
    assert len(summary({**RUN, **odd})) == 1
