"""Real runs through the real command line, made once for all tests that look at them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_runs import DANLU, TINY, Quickstart, conversations, danlu

# Runs a command and writes its peak memory to a file. Linux counts a parent's peak as its child's, so the
# parent has to be smaller than pytest.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""


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
    started = time.monotonic()
    with open(cwd / "stdout", "w") as stdout, open(cwd / "stderr", "w") as stderr:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(cwd / "peak"), DANLU, "quickstart", "--runs", "kept"],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "160"},
            stdout=stdout,
            stderr=stderr,
        )
    seconds = time.monotonic() - started
    assert done.returncode == 0, (cwd / "stderr").read_text()[-5000:]
    peak = int((cwd / "peak").read_text()) * (1 if sys.platform == "darwin" else 1024)
    return Quickstart(cwd, (cwd / "stdout").read_text(), seconds, peak)
