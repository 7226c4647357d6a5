import pytest

from danlu.core import progress
from danlu.core.progress import Progress, clock, track


@pytest.fixture
def now(monkeypatch):
    """A clock that is set by hand."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_off_a_terminal_a_plain_line_per_interval(now, capsys) -> None:
    with Progress("train", 100) as bar:
        for step in range(1, 101):
            now[0] += 0.5
            bar.update(step, loss=2.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6  # after 10, 20 … 50 seconds, and at the end
    assert lines[0] == "train  20/100 steps · loss 2 · 2.0 steps/s · ETA 0:40"
    assert lines[-1] == "train  100/100 steps · loss 2 · 2.0 steps/s · took 0:50"


def test_a_resumed_run_counts_only_its_own_steps(now, capsys) -> None:
    with Progress("train", 100) as bar:
        bar.begin_at(80)
        now[0] += 10
        bar.update(90)
    assert "1.0 steps/s · ETA 0:10" in capsys.readouterr().err


def test_on_a_terminal_one_line_is_written_over(now, capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("train", 2) as bar:
        now[0] += 1
        bar.update(1)
        bar.say("hello")
    assert capsys.readouterr().err.count("\n") == 2  # the message, and the last line


def test_track_yields_everything(capsys) -> None:
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert "3 items" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (187, "3:07"), (3765, "1:02:45")])
def test_clock(seconds, text) -> None:
    assert clock(seconds) == text
