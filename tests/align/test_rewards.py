"""Rewards: rules, programs in the sandbox, servers, sums; and those that are none."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from danlu.align import rewards as reward_table
from danlu.align.config import GRPOConfig, RewardSource
from danlu.align.grpo import grpo
from danlu.align.rewards import Reply, SummedReward, checked
from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics

ASKED = [{"role": "user", "content": "2 + 2?"}]


@contextmanager
def server(answer: Callable[[dict[str, Any]], Any], port: int = 0) -> Iterator[int]:
    """Answers each request with what `answer` makes of its body; None breaks the connection off."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if said is None:
                self.connection.close()
                return
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    found = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    try:
        yield found.server_port
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def by_url(port: int, seconds: float = 5.0) -> reward_table.Reward:
    return SummedReward([RewardSource(url=f"http://127.0.0.1:{port}", seconds=seconds)])


def test_rules() -> None:
    replies = [
        Reply(ASKED, text, {"answer": "4"}, done)
        for text, done in (("It is 4.", True), ("4 or 5", False), (" 4\n", True))
    ]
    assert reward_table.exact_number(replies) == [1, 0, 1]
    assert reward_table.exact_text(replies) == [0, 0, 1]
    assert reward_table.ended(replies) == [1, 0, 1]
    assert reward_table.matches(r"or \d")(replies) == [0, 1, 0]


def test_a_sum_of_rewards() -> None:
    parts = [RewardSource(rule="exact_number", weight=2), RewardSource(rule="ended", weight=-1)]
    reward = SummedReward(parts)
    assert reward([Reply(ASKED, "4", {"answer": 4}, True)]) == [1]
    assert reward.parts([Reply(ASKED, "4", {"answer": 4}, False)]) == [(1, 0)]


def test_several_models_and_their_doubt(tmp_path: Path) -> None:
    """The mean, less so many standard deviations: what they agree on stays."""
    says = {"one": [1.0, 4.0], "two": [3.0, 4.0], "three": [5.0, 4.0]}
    for name in says:
        (tmp_path / name).mkdir()

    def load(ref: str) -> Any:
        return lambda prompts, texts: says[Path(ref).name]

    replies = [Reply(ASKED, "a"), Reply(ASKED, "b")]
    refs = [tmp_path / name for name in says]
    assert SummedReward([RewardSource(models=refs)], load)(replies) == [3, 4]
    found = SummedReward([RewardSource(models=refs, doubt=1.0)], load)(replies)
    assert found == pytest.approx([3 - (8 / 3) ** 0.5, 4])
    with pytest.raises(ValueError, match="at least 2"):
        RewardSource(models=refs[:1])


def test_programs_are_run_in_the_sandbox() -> None:
    """Right, wrong, none, without an end, and one that says it were right."""
    row = {
        "task_id": 1,
        "text": "Double a number.",
        "code": "def double(x):\n    return 2 * x\n",
        "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
        "test_setup_code": "",
    }
    texts = [
        "Here:\n```python\ndef double(x):\n    return x + x\n```",
        "```python\ndef double(x):\n    return x * x\n```",
        "I would add it to itself.",
        "```python\ndef double(x):\n    while True: pass\n```",
        "```python\nimport os\nprint('passed')\nos._exit(0)\n```",
    ]
    reward = SummedReward([RewardSource(rule="tests", seconds=3)])
    assert reward([Reply(ASKED, text, row) for text in texts]) == [1, 0, 0, 0, 0]
    with pytest.raises(UserError):
        reward([Reply(ASKED, "a", {"answer": "4"})])


def test_a_server_says_what_replies_are_worth() -> None:
    with server(lambda asked: {"rewards": [len(reply) for reply in asked["replies"]]}) as port:
        assert by_url(port)([Reply(ASKED, "four"), Reply(ASKED, "4")]) == [4, 1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rewards": [1]}, "gives 1 numbers for 2 replies"),
        ({"rewards": [1, None]}, "fails: TypeError"),
        ({"rewards": [1, float("nan")]}, "is nan for the reply '4'"),
        ({"scores": [1, 2]}, "answers '{\"scores\": \\[1, 2\\]}'"),
        ([1, 2], "answers"),
    ],
    ids=str,
)
def test_a_server_that_says_something_else(said: Any, message: str) -> None:
    with server(lambda _: said) as port, pytest.raises(UserError, match=message):
        by_url(port)([Reply(ASKED, "four"), Reply(ASKED, "4")])


def test_a_slow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.core.http.RETRIES", 0)
    with server(lambda _: time.sleep(1)) as port, pytest.raises(UserError, match="does not answer"):
        by_url(port, seconds=0.2)([Reply(ASKED, "4")])


def test_a_server_that_dies_in_the_middle(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with what to do, and goes on from its checkpoint when the server is back."""
    monkeypatch.setattr("danlu.core.http.RETRIES", 1)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Where is the {n}?"}) + "\n" for n in range(8)))
    asked = 0

    def dies(body: dict[str, Any]) -> Any:
        nonlocal asked
        asked += 1
        return lengths(body) if asked <= 6 else None

    def lengths(body: dict[str, Any]) -> Any:
        return {"rewards": [len(reply) for reply in body["replies"]]}

    def settings(out: str, port: int) -> GRPOConfig:
        return GRPOConfig.model_validate(
            {
                "data": data,
                "init_from": chat_model,
                "out": tmp_path / out,
                "rewards": [{"url": f"http://127.0.0.1:{port}"}],
                "steps": 8,
                "batch_size": 2,
                "group_size": 4,
                "max_tokens": 8,
                "sequence_length": 64,
                "held_out": 0.0,
                "checkpoint_every": 2,
                "dtype": "float32",
                "compile": "off",
            }
        )

    with server(lengths) as port:
        grpo(settings("whole", port))
    with server(dies, port), pytest.raises(UserError, match="does not answer") as caught:
        grpo(settings("cut", port))
    assert "goes on from the last checkpoint" in caught.value.remedy
    with server(lengths, port):
        grpo(settings("cut", port))
    rewards = [
        [row["reward"] for row in read_metrics(tmp_path / out) if "reward" in row] for out in ("whole", "cut")
    ]
    assert len(rewards[0]) == 8
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda replies: [float("nan")], "the reward mine is nan for the reply 'four'"),
        (lambda replies: [float("inf")], "is inf"),
        (lambda replies: [], "gives 0 numbers for 1 replies"),
        (lambda replies: 1 / 0, "fails: ZeroDivisionError"),
        (lambda replies: ["much"], "fails: ValueError"),
        (reward_table.exact_number, "needs 'answer' in each prompt's row"),
    ],
)
def test_rewards_that_are_none(reward: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(reward, [Reply(ASKED, "four 4" if reward is reward_table.exact_number else "four")], "mine")
