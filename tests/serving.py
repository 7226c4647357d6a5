"""A real server, as a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx

ROOT = Path(__file__).parents[1]
SECONDS_TO_START = 240
"""The first start compiles kernels, on a loaded machine."""


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def said(self) -> str:
        return self.log.read_text("utf-8")

    def metric(self, name: str) -> float:
        """Of a metric, the sum over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", text, re.MULTILINE)
        assert found, f"no metric {name} in\n{text}"
        return sum(map(float, found))

    def settled(self) -> None:
        """Waits until nothing is being computed; then nothing may be held."""
        end = time.monotonic() + 30
        while self.metric("danlu_answers_pending") or self.metric("danlu_jobs_running"):
            assert time.monotonic() < end, "answers are still pending"
            time.sleep(0.05)
        assert self.metric("danlu_jobs_waiting") == 0
        assert self.metric("danlu_cache_blocks_in_use") == 0


@contextlib.contextmanager
def serving(*arguments: str, folder: Path, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`danlu serve` with these arguments, started in `folder`, where its log lies too; ended by SIGTERM."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "danlu.cli", "serve", *arguments, "--port", "0"]
    around = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=around, text=True)
    server = Server("", process, log)
    try:
        server.url = _wait(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _wait(server: Server) -> str:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert server.process.poll() is None, server.said()
        if found := re.search(r"chat in a browser +(http://\S+?)/\s", server.said()):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{found[1]}/health").status_code == 200:
                    return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{server.said()}")
