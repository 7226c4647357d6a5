"""The command as a user starts and ends it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from serving import ROOT, serving
from some_texts import TEXTS

from danlu.core.errors import UserError
from danlu.model.checkpoint import save_adapted, save_model
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.lora import add_adapter
from danlu.model.transformer import Transformer
from danlu.serve.config import ServeConfig, split_name
from danlu.serve.vllm import vllm_command
from danlu.tokens.bpe import train_bpe

SIZES = ModelConfig(
    vocab_size=480, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=96, max_positions=1024
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two adapters that change it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    tokenizer, model = train_bpe(iter(TEXTS * 4), 480), Transformer(SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, root / "tiny", tokenizer)
    add_adapter(model, LoraConfig(rank=4), "default")
    for name in ("one", "two"):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora" in key or ".adapters." in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        save_adapted(model, root / name, tokenizer, root / "tiny", "none")
    return root


def chat(url: str, **more: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_started_and_ended(folder: Path, tmp_path: Path) -> None:
    """One server from start to end: what it prints, what it answers, that it ends well."""
    with serving(str(folder / "tiny"), folder=tmp_path) as server:
        name = f"{folder.name}/tiny"
        assert f"Serving {name}" in server.said()
        assert re.search(r"OpenAI's API +http://localhost:\d+/v1", server.said())
        assert chat(server.url, model=name).status_code == 200
        assert "<title>" in httpx.get(f"{server.url}/").text
        server.settled()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "nothing unfinished" in server.said()
        assert "Traceback" not in server.said()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_finished_first(folder: Path, tmp_path: Path, number: int) -> None:
    with serving(f"tiny={folder / 'tiny'}", folder=tmp_path) as server:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(30)
        server.process.send_signal(number)
        reader.join(60)
        assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
        last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_adapters_answer_under_their_names_in_one_batch(folder: Path, tmp_path: Path) -> None:
    adapters = [part for name in ("one", "two") for part in ("--adapter", f"{name}={folder / name}")]
    with serving(f"tiny={folder / 'tiny'}", *adapters, "--dtype", "float32", folder=tmp_path) as server:
        cards = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("tiny", None),
            ("one", "tiny"),
            ("two", "tiny"),
        ]
        texts: dict[str, str] = {}

        def ask(name: str) -> None:
            found = chat(server.url, model=name, max_tokens=40, temperature=0, ignore_eos=True).json()
            texts[name] = found["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=[name]) for name in ("tiny", "one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(texts.values())) == 3
        server.settled()
    for name in ("one", "two"):  # each alone, as a model of its own
        with serving(f"alone={folder / name}", "--dtype", "float32", folder=tmp_path) as server:
            found = chat(server.url, model="alone", max_tokens=40, temperature=0, ignore_eos=True).json()
            assert found["choices"][0]["message"]["content"] == texts[name]


@pytest.mark.slow
def test_keys(folder: Path, tmp_path: Path) -> None:
    with serving(f"tiny={folder / 'tiny'}", folder=tmp_path, env={"DANLU_API_KEY": "secret"}) as server:
        assert chat(server.url).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        headers = {"authorization": "Bearer secret"}
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert found.status_code == 200
        assert "secret" not in server.said()


@pytest.mark.slow
def test_too_many_are_refused_and_the_rest_is_answered(folder: Path, tmp_path: Path) -> None:
    with serving(f"tiny={folder / 'tiny'}", "--max-pending", "4", folder=tmp_path) as server:
        found: list[int] = []

        def ask() -> None:
            found.append(chat(server.url, max_tokens=300, ignore_eos=True).status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {200, 429}
        assert found.count(200) >= 4
        assert chat(server.url).status_code == 200
        assert chat(server.url, n=5).status_code == 400
        server.settled()


def run(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "danlu.cli", "serve", *arguments]
    around = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=around, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_what_can_t_be_served_is_said(folder: Path, tmp_path: Path) -> None:
    tiny = str(folder / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["nowhere"], "nowhere"),
            ([tiny, "--port", port], "--port"),
            ([tiny, "--host", "256.1.1.1"], "host"),
            ([tiny, f"tiny={tiny}", f"tiny={tiny}"], "NAME=PATH"),
            ([tiny, "--adapter", f"x={tiny}"], "adapter"),
            ([tiny, "--engine", "vllm"], "vLLM is not installed"),
        ]
        for arguments, told in cases:
            found = (
                run(*arguments, "--port", "0", cwd=tmp_path)
                if "--port" not in arguments
                else run(*arguments, cwd=tmp_path)
            )
            assert found.returncode == 2, (arguments, found.stderr)
            assert told in found.stderr
            assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("smollm2", "smollm2", "smollm2"),
        ("runs/quickstart", "quickstart", "runs/quickstart"),
        ("runs/quickstart/chat", "quickstart/chat", "runs/quickstart/chat"),
        ("models/a.b.gguf", "a.b", "models/a.b.gguf"),
        ("mine=/data/x=y", "mine", "/data/x=y"),
        ("HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2"),
    ],
)
def test_names(given: str, name: str, path: str) -> None:
    assert split_name(given) == (name, path)


def test_vllm_gets_the_same_model_names_and_address(folder: Path) -> None:
    tiny = str(folder / "tiny")
    config = ServeConfig(model=(f"mine={tiny}",), adapter=(f"one={folder / 'one'}",), port=9000, dtype="bf16")
    assert vllm_command(config, ["k"]) == [
        *("vllm", "serve", tiny, "--served-model-name", "mine"),
        *("--host", "127.0.0.1", "--port", "9000", "--dtype", "bfloat16", "--api-key", "k"),
        *("--enable-lora", "--lora-modules", f"one={folder / 'one'}"),
    ]
    with pytest.raises(UserError, match="one model"):
        vllm_command(ServeConfig(model=(tiny, tiny)))
    with pytest.raises(UserError, match="int8"):
        vllm_command(ServeConfig(model=(tiny,), dtype="int8"))
