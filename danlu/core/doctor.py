"""`danlu doctor`: what this machine is, and what danlu will use of it."""

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from danlu import __version__
from danlu.core import host
from danlu.core.device import Machine, choose_dtype, forget_speed, machine
from danlu.core.errors import UserError
from danlu.core.options import DoctorConfig
from danlu.core.sandbox.host import Backend, Jail
from danlu.core.show import console, show_size, table
from danlu.core.toolchains import TOOLCHAINS, Toolchain

_DEMO = ("chitchat-dataset", "pyspellchecker")
"""The packages of requirements-demo.txt, which carry what the quickstart needs."""


@dataclass(frozen=True)
class Finding:
    """One thing about this machine."""

    what: str
    found: str
    use: str
    """What danlu makes of it, or what to do."""
    warning: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All of it."""

    findings: list[Finding]
    machine: Machine
    threads: int
    available_memory_bytes: int
    free_disk_bytes: int
    has_compiler: bool
    extras: dict[str, dict[str, str | None]]
    """{extra: {package: version, None where it is missing}}"""


def doctor(config: DoctorConfig) -> Diagnosis:
    """Looks at the machine; all that it runs are two products of matrices and a jail, a second each."""
    forget_speed()
    here = machine()
    extras = installed_extras()
    findings = [
        Finding("danlu", f"{__version__}, Python {platform.python_version()}", platform.platform(terse=True)),
        _torch(here),
        _cores(here),
        _speed(here),
        _memory(here),
        _disk(),
        _gpu(here),
        _compiler(),
        *(_extra(name, packages) for name, packages in extras.items()),
        _sandbox(),
        *map(_toolchain, TOOLCHAINS.values()),
    ]
    return Diagnosis(
        findings,
        here,
        torch.get_num_threads(),
        host.available_memory_bytes(),
        host.free_disk_bytes(Path.cwd()),
        host.has_compiler(),
        extras,
    )


def _torch(here: Machine) -> Finding:
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPU"
    if torch.version.cuda and here.gpu is None:
        use = "a CUDA build, and no GPU is found: the CPU build is gigabytes smaller (docs/install.md)"
        return Finding("torch", f"{torch.__version__}, {build}", use, warning=True)
    return Finding("torch", f"{torch.__version__}, {build}", "as it should be")


def _cores(here: Machine) -> Finding:
    total, threads = os.cpu_count() or here.cores, torch.get_num_threads()
    return Finding("cores", f"{here.cores} of {total}, {host.cpu_name()}", f"{threads} threads")


def _speed(here: Machine) -> Finding:
    ratio = here.bf16_gflops / here.f32_gflops
    kind = "in hardware" if here.bf16_native else "emulated"
    found = f"{here.f32_gflops:,.0f} GFLOP/s in float32, {here.bf16_gflops:,.0f} in bfloat16 ({kind})"
    dtype = str(choose_dtype()).removeprefix("torch.")
    slow = here.bf16_native and ratio < 1.1
    remark = "; slower than such hardware should be: is something else running?" if slow else ""
    return Finding("speed", found, f"computes in {dtype}, {ratio:.1f} × float32's rate{remark}", slow)


def _memory(here: Machine) -> Finding:
    total, free = host.memory_bytes(), host.available_memory_bytes()
    use = "`danlu plan RECIPE` says what a run will need"
    return Finding("memory", f"{show_size(total)}, {show_size(free)} free", use, warning=free < 4e9)


def _disk() -> Finding:
    free = host.free_disk_bytes(Path("runs"))
    return Finding(
        "disk", f"{show_size(free)} free", f"runs are written to {Path('runs').absolute()}", free < 2e9
    )


def _gpu(here: Machine) -> Finding:
    if here.gpu is None:
        return Finding("GPU", "none", "everything runs on the processor")
    count = torch.cuda.device_count()
    use = "used; several: `torchrun --nproc-per-node gpu -m danlu.cli …`" if count > 1 else "used"
    return Finding("GPU", f"{count} × {here.gpu}, {show_size(here.memory_bytes)}", use)


def _compiler() -> Finding:
    if host.has_compiler():
        return Finding("C++ compiler", "found", "torch.compile is used where it pays")
    use = "torch.compile is not used; training is slower, nothing else changes"
    return Finding("C++ compiler", "not found, or Python's headers are missing", use)


def installed_extras() -> dict[str, dict[str, str | None]]:
    """danlu's optional packages, by extra; and those that carry demonstration data."""
    extras: dict[str, dict[str, str | None]] = {"the demo": {package: _version(package) for package in _DEMO}}
    for requirement in importlib.metadata.requires("danlu") or []:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found:
            package, extra = found.groups()
            extras.setdefault(extra, {})[package] = _version(package)
    return extras


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str, packages: dict[str, str | None]) -> Finding:
    missing = [package for package, version in packages.items() if version is None]
    present = [f"{package} {version}" for package, version in packages.items() if version is not None]
    install = "--no-deps -r requirements-demo.txt" if name == "the demo" else f"'danlu[{name}]'"
    use = f"missing: {', '.join(missing)} (pip install {install})" if missing else "all there"
    return Finding(f"for {name}", ", ".join(present) or "nothing", use)


def _sandbox() -> Finding:
    """Whether a jail holds here: it is tried, a second."""
    backend: Backend = "bubblewrap" if shutil.which("bwrap") else "namespaces"
    try:
        Jail(backend, 99).close()
    except (UserError, OSError) as error:
        return Finding("sandbox", backend, f"no code can be run: {str(error).splitlines()[0]}", warning=True)
    return Finding("sandbox", backend, "holds: what models write can be run (danlu eval code)")


def _toolchain(chain: Toolchain) -> Finding:
    if missing := chain.missing():
        return Finding(f"for {chain.name}", f"{', '.join(missing)} not found", f"Debian's {chain.package}")
    libraries = chain.missing_libraries()
    use = f"some tests need {' and '.join(libraries)}" if libraries else "all there"
    return Finding(f"for {chain.name}", ", ".join(chain.programs), use)


def show(diagnosis: Diagnosis) -> None:
    """The findings as a table, on stdout."""
    rows = [(f.what, f.found, "⚠ " * f.warning + f.use) for f in diagnosis.findings]
    shown = table("", ("", "this machine", "danlu"), rows)
    for row, finding in zip(shown.rows, diagnosis.findings, strict=True):
        row.style = "yellow" if finding.warning else None
    console().print(shown)
