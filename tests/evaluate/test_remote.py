"""A model over HTTP: the same numbers as at hand, and a server that doesn't answer."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import save_random_model
from small_servers import ask, listening

from danlu.core.errors import UserError
from danlu.evaluate.config import EvalConfig
from danlu.evaluate.evaluate import evaluate
from danlu.evaluate.remote import ServedLM
from danlu.serve.app import make_app
from danlu.serve.config import ServeConfig
from danlu.serve.serve import load, warm_up
from danlu.tokens.bpe import train_bpe

FURNACE = Path(__file__).parents[2] / "recipes" / "tasks" / "furnace.yaml"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([FURNACE.with_suffix(".jsonl").read_text("utf-8")], 400)
    return save_random_model(tmp_path_factory.mktemp("served") / "model", tokenizer, noise=0.1)


@pytest.fixture(scope="module")
def port(saved: Path) -> Iterator[int]:
    config = ServeConfig(model=(f"random={saved}",), dtype="float32", cache_gb=0.1)
    catalogue = load(config)
    warm_up(catalogue)
    with listening(make_app(config, catalogue)) as found:
        yield found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logprobs(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "samples_furnace.jsonl").open()]
    return [float(one[0]) for row in rows for one in row["filtered_resps"]]


def test_over_http_the_numbers_are_the_same(saved: Path, port: int, tmp_path: Path) -> None:
    common: dict[str, Any] = {"tasks": (str(FURNACE),), "dtype": "float32"}
    here = evaluate(EvalConfig(model=str(saved), out=tmp_path / "here", **common))
    url = f"http://127.0.0.1:{port}/v1"
    there = evaluate(EvalConfig(model="random", url=url, out=tmp_path / "there", **common))
    assert logprobs(tmp_path / "there") == pytest.approx(logprobs(tmp_path / "here"), abs=1e-4)
    assert there["scores"] == here["scores"]


def test_answers_over_http(port: int) -> None:
    model = ServedLM(f"http://127.0.0.1:{port}", "random")
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    said = model._answer("Question: What is hot?\nAnswer:", settings)
    asked = {
        "model": "random",
        "prompt": "Question: What is hot?\nAnswer:",
        "max_tokens": 8,
        "temperature": 0,
    }
    expected = ask(port, "/v1/completions", asked).json["choices"][0]["text"].partition("\n")[0]
    assert said == expected


def test_what_the_server_says_is_told(port: int) -> None:
    with pytest.raises(UserError, match='serves no model "other"'):
        ServedLM(f"http://127.0.0.1:{port}", "other")
    model = ServedLM(f"http://127.0.0.1:{port}", "random")
    with pytest.raises(UserError, match="600 tokens"):
        model._score([1] * 599, [2])


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again, and then told with what to do."""
    monkeypatch.setattr("danlu.core.http.RETRIES", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    with pytest.raises(UserError, match="does not answer") as caught:
        ServedLM(f"http://127.0.0.1:{free}", "random")
    assert "goes on where it stopped" in caught.value.remedy
