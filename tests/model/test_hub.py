"""Ids of the Hugging Face hub: its real client, on a cache filled by hand, and on a small hub of ours."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from danlu.core.errors import UserError
from danlu.model.checkpoint import load, resolve, save_model
from danlu.model.config import ModelConfig
from danlu.model.hub import is_hub_id
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import bpe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = ModelConfig(
    vocab_size=270, width=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_width=16, max_positions=32
)


def in_cache(home: Path) -> Transformer:
    """A model where the client keeps what it has fetched."""
    repository = home / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    model = Transformer(SIZES)
    save_model(model, repository / "snapshots" / COMMIT, bpe(["the cat"], 270))
    return model


def asked(ref: str, folder: Path, **environment: str) -> str:
    """What `resolve` says in a process of its own: the client reads its variables when it is imported."""
    code = (
        "import sys; from danlu.core.errors import UserError; from danlu.model.checkpoint import resolve\n"
        "try: print(resolve(sys.argv[1]))\nexcept UserError as error: print('error:', error)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, ref],
        env={**os.environ, "HF_HOME": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def equal(one: Transformer, other: Transformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_in_the_cache_is_loaded_offline(tmp_path: Path) -> None:
    model = in_cache(tmp_path)
    back, tokenizer = load(asked("some/model", tmp_path, HF_HUB_OFFLINE="1"))
    assert equal(model, back)
    assert tokenizer.encode("the") == bpe(["the cat"], 270).encode("the")
    assert "error: other/model: not a folder here" in asked("other/model", tmp_path, HF_HUB_OFFLINE="1")


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub: a repository's list of files, and each file."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/some/model/") or path == "/api/models/some/model":
            names = [{"rfilename": file.name} for file in self.folder.iterdir()]
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"}
                for f in self.folder.iterdir()
            ]
            answer = tree if "/tree/" in path else {"id": "some/model", "sha": COMMIT, "siblings": names}
            self.reply(json.dumps(answer).encode(), "application/json")
        elif path.startswith("/some/model/") and (self.folder / name).is_file():
            self.reply((self.folder / name).read_bytes(), "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("SomeHub", (Hub,), {"folder": tmp_path / "served"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def test_a_model_is_fetched_without_what_is_not_needed(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    model = Transformer(SIZES)
    save_model(model, tmp_path / "served", bpe(["the cat"], 270))
    (tmp_path / "served" / "modeling.py").write_text("raise SystemExit")
    folder = Path(asked("some/model", tmp_path, HF_ENDPOINT=hub[0]))
    assert "modeling.py" not in {file.name for file in folder.iterdir()}
    assert equal(model, load(folder)[0])
    found = asked("no/where", tmp_path, HF_ENDPOINT=hub[0])
    assert found.startswith("error: no/where: neither here nor on the Hugging Face hub")


def test_what_looks_like_a_folder_here_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/quikstart", "./some/model", "some/model/deeper", "./model", "smollm3"):
        assert not is_hub_id(name)
        with pytest.raises(UserError):
            resolve(name)
