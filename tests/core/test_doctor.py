"""What this machine is: facts against the system's own."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from danlu.core import device, doctor
from danlu.core.doctor import installed_extras, show
from danlu.core.options import DoctorConfig
from danlu.core.stage import as_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no speed remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device._product_rate, "__defaults__", (0.02,))  # a short look is enough here
    device.machine.cache_clear()
    yield tmp_path
    device.machine.cache_clear()


def test_the_facts_are_the_systems() -> None:
    found = as_json(doctor.doctor(DoctorConfig()))
    machine = found["machine"]
    assert machine["cores"] <= len(os.sched_getaffinity(0))
    assert machine["memory_bytes"] <= psutil.virtual_memory().total or machine["gpu"]
    assert machine["f32_gflops"] > 0.1
    assert machine["bf16_gflops"] > 0.01
    assert found["threads"] == torch.get_num_threads()
    assert 0 < found["available_memory_bytes"] <= psutil.virtual_memory().total
    assert found["free_disk_bytes"] == pytest.approx(shutil.disk_usage(".").free, rel=0.05)
    assert found["has_compiler"] == (shutil.which("g++") is not None) or not found["has_compiler"]
    names = [finding["what"] for finding in found["findings"]]
    assert names[:8] == ["danlu", "torch", "cores", "speed", "memory", "disk", "GPU", "C++ compiler"]
    assert torch.__version__ in found["findings"][1]["found"]


def test_cores_are_those_that_the_process_may_use(cache: Path) -> None:
    command = [sys.executable, "-m", "danlu.cli", "doctor", "--json"]
    one = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, one)
    )
    assert json.loads(done.stdout)["machine"]["cores"] == 1


def test_the_speed_is_kept_and_doctor_measures_it_again(cache: Path) -> None:
    device.machine()
    (kept,) = (cache / "danlu").glob("speed-*.json")
    values = json.loads(kept.read_text())
    kept.write_text(json.dumps(values | {"f32_gflops": 1e-3, "bf16_gflops": 1e-3}))
    device.machine.cache_clear()
    assert device.machine().f32_gflops == 1e-3
    assert doctor.doctor(DoctorConfig()).machine.f32_gflops > 0.1
    assert json.loads(kept.read_text())["f32_gflops"] > 0.1


def test_a_cache_that_is_damaged_or_cannot_be_written_is_no_fault(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.machine()
    (kept,) = (cache / "danlu").glob("speed-*.json")
    kept.write_text("{")
    device.machine.cache_clear()
    assert device.machine().f32_gflops > 0.1
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    device.machine.cache_clear()
    assert device.machine().f32_gflops > 0.1


def test_extras_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = installed_extras()
    for name, packages in extras.items():
        assert packages
        for package, version in packages.items():
            where = (ROOT / "requirements-demo.txt").read_text() if name == "the demo" else project
            assert package in where
            assert version is None or version == importlib.metadata.version(package)
    lines = (ROOT / "requirements-demo.txt").read_text().splitlines()
    listed = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert extras["the demo"].keys() == listed
    assert {"test", "track", "lint"} <= extras.keys()


def test_what_is_missing_is_said_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("tensorboard", "chitchat-dataset"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    diagnosis = doctor.doctor(DoctorConfig())
    assert diagnosis.extras["track"] == {"tensorboard": None}
    uses = {finding.what: finding.use for finding in diagnosis.findings}
    assert uses["for track"] == "missing: tensorboard (pip install 'danlu[track]')"
    demo = "missing: chitchat-dataset (pip install --no-deps -r requirements-demo.txt)"
    assert uses["for the demo"] == demo
    monkeypatch.setenv("COLUMNS", "250")
    show(diagnosis)
    shown = capsys.readouterr().out
    assert demo in shown
    assert "nothing" in shown


def test_too_little_memory_or_disk_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.host, "available_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(doctor.host, "free_disk_bytes", lambda path: 10**9)
    diagnosis = doctor.doctor(DoctorConfig())
    warned = {finding.what for finding in diagnosis.findings if finding.warning}
    assert {"memory", "disk"} <= warned
    show(diagnosis)
    lines = capsys.readouterr().out.splitlines()
    assert any("1 GB free" in line and "⚠" in line for line in lines)
