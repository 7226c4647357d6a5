"""What the system lets a process use: against the system itself, and in made-up containers."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from danlu.core import host


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty control group that holds this process, on a machine of 64 cores and 64 GB."""
    monkeypatch.setattr(host, "_cgroup_folders", lambda controller: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    machine = psutil.virtual_memory()._replace(total=64 * 10**9, available=50 * 10**9)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: machine)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "250000 100000"}, 2),  # two and a half: two threads, or one would wait for the others
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 64),
        ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_of_a_container(group: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (group / name).write_text(text + "\n")
    assert host.cores() == cores


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 64, 50),
        ({"memory.max": "max", "memory.current": "1000"}, 64, 50),
        ({"memory.max": "8000000000", "memory.current": "3000000000"}, 8, 5),
        (
            {
                "memory.max": "8000000000",
                "memory.current": "7000000000",
                "memory.stat": "anon 1\ninactive_file 4000000000\n",  # cached files make room when asked
            },
            8,
            5,
        ),
        ({"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "5"}, 64, 50),
        ({"memory.limit_in_bytes": "4000000000", "memory.usage_in_bytes": "1000000000"}, 4, 3),
    ],
)
def test_memory_of_a_container(group: Path, files: dict[str, str], total: int, free: int) -> None:
    for name, text in files.items():
        (group / name).write_text(text + "\n")
    assert host.memory_bytes() == total * 10**9
    assert host.available_memory_bytes() == free * 10**9


@pytest.mark.parametrize(
    ("lines", "folders"),
    [
        (["0::/user/shell"], ["user/shell", "user", "."]),  # version 2: one tree for all controllers
        (["5:cpu,cpuacct:/box", "4:memory:/other"], ["cpu/box", "cpu"]),  # version 1: a tree for each
        (["4:memory:/"], []),
        ([], []),  # a system without control groups
    ],
)
def test_the_groups_of_a_process(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], folders: list[str]
) -> None:
    """As cgroups(7) describes /proc/self/cgroup."""
    monkeypatch.setattr(host, "_lines", lambda path: [line + "\n" for line in lines])
    assert host._cgroup_folders("cpu") == [Path("/sys/fs/cgroup") / folder for folder in folders]


def test_this_machine() -> None:
    assert 1 <= host.cores() <= len(os.sched_getaffinity(0))
    assert 0 < host.available_memory_bytes() <= host.memory_bytes() <= psutil.virtual_memory().total
    assert host.cpu_name()
    assert host.free_disk_bytes(Path("/nowhere/at/all")) == pytest.approx(
        psutil.disk_usage("/").free, rel=0.05
    )


def test_the_peak_is_counted_afresh() -> None:
    code = """
import psutil
from danlu.core.host import peak_rss_bytes, reset_peak_rss
block = bytearray(200_000_000)
del block
high = peak_rss_bytes()
reset_peak_rss()
print(high, peak_rss_bytes(), psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    high, after, resident = map(int, done.stdout.split())
    assert high > 200_000_000
    if after == high:
        pytest.skip("this system does not let a process reset its peak")
    assert after == pytest.approx(resident, rel=0.1)


def test_threads_are_limited_where_a_container_limits_cores(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    host.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    (group / "cpu.max").write_text("300000 100000\n")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    host.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["NUMBA_NUM_THREADS"] == "7"  # the user's own number stays
    monkeypatch.delenv("OMP_NUM_THREADS")
