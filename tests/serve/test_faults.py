"""Faults of the server's own: the one whose request it was hears of it, and nobody waits for ever."""

import time
from pathlib import Path
from typing import Any

import pytest
from small_servers import ask, listening, tiny_app

from danlu.generate.engine import Engine
from danlu.serve.worker import Worker

CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


def test_a_step_that_fails_is_told_and_the_next_request_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def fails_once(engine: Engine) -> Any:
        monkeypatch.setattr(Engine, "step", step)
        raise RuntimeError("of nobody's business")

    with listening(tiny_app(tmp_path)) as port:
        monkeypatch.setattr(Engine, "step", fails_once)
        found = ask(port, CHAT, ASKED)
        assert found.status == 500
        assert "business" not in found.body.decode()
        assert ask(port, CHAT, ASKED).status == 200
        assert ask(port, "/health").status == 200


def test_a_thread_that_fails_answers_what_ran_and_refuses_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(tiny_app(tmp_path)) as port:

        def fails(_: Worker) -> None:
            raise RuntimeError("of nobody's business")

        monkeypatch.setattr(Worker, "_tell", fails)
        begin = time.monotonic()
        found = ask(port, CHAT, ASKED)
        assert found.status == 500
        assert "business" not in found.body.decode()
        after = ask(port, CHAT, ASKED)
        assert (after.status, "started again" in after.json["error"]["message"]) == (503, True)
        assert ask(port, "/v1/embeddings", {"model": "tiny", "input": "Hi"}).status == 503
        assert (ask(port, "/health").status, ask(port, "/health").json["status"]) == (503, "failed")
        assert time.monotonic() - begin < 10
        assert "danlu_answers_pending 0.0" in ask(port, "/metrics").body.decode()
    assert "start the server again" in caplog.text
    assert "of nobody's business" in caplog.text, "the log says what it was"
