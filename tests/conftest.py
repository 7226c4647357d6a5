"""Real runs through the real command line, made once for all tests that look at them."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from real_runs import DANLU, TINY, Quickstart, conversations, danlu

# How long an example takes says more about what else runs than about the property.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# A background job ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `tiny.yaml`, `chats.jsonl`, and the finished run in `runs/tiny`.

    For reading only; a test that changes something copies it.
    """
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "chats.jsonl").write_text(conversations(400, seed=1))
    done = danlu("run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """`danlu quickstart --runs kept`, run once for all tests that look at it: minutes."""
    cwd = tmp_path_factory.mktemp("quickstart")
    started, peak = time.monotonic(), 0
    with open(cwd / "stdout", "w") as stdout, open(cwd / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [DANLU, "quickstart", "--runs", "kept"],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "160"},
            stdout=stdout,
            stderr=stderr,
        )
        # Watched from outside: each stage has the system count its peak afresh.
        while process.poll() is None:
            peak = max(peak, peak_rss_bytes(process.pid))
            time.sleep(0.1)
    seconds = time.monotonic() - started
    assert process.returncode == 0, (cwd / "stderr").read_text()[-5000:]
    return Quickstart(cwd, (cwd / "stdout").read_text(), seconds, peak)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, for the pages of a module: while it is there, nothing else can run an event loop."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def peak_rss_bytes(process: int) -> int:
    """Peak resident memory of a process; 0 where the system doesn't tell, or the process has gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
