import json

from danlu.core.metrics import Metrics, read_metrics


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path) -> None:
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.log(step, loss=float(step))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    metrics = Metrics(tmp_path, resume_step=3)
    metrics.log(4, loss=40.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_new_run_starts_empty(tmp_path) -> None:
    Metrics(tmp_path).log(1, loss=1.0)
    Metrics(tmp_path)
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_gets_the_same_numbers(tmp_path) -> None:
    metrics = Metrics(tmp_path, tensorboard=True)
    for step in (1, 2):
        metrics.log(step, loss=step / 2, event="text is left out")
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
