"""What the operating system lets this process use: cores, memory, disk. Imports no torch."""

import os
import platform
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Processor cores that this process may use: its affinity, and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _cgroup_folders("cpu")]
    return max(1, min([allowed, *(int(quota) for quota in quotas if quota is not None)]))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit."""
    limits = [_memory_limit(folder) for folder in _cgroup_folders("memory")]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def available_memory_bytes() -> int:
    """Memory that is free for this process now; what the system could reclaim counts as free."""
    free = [psutil.virtual_memory().available]
    for folder in _cgroup_folders("memory"):
        limit, used = _memory_limit(folder), _memory_used(folder)
        if limit is not None and used is not None:
            free.append(max(0, limit - used))
    return min(free)


def free_disk_bytes(path: Path) -> int:
    """Free space where `path` is, or would be made."""
    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def cpu_name() -> str:
    """The processor's name, e.g. "AMD EPYC 9V74"."""
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def has_compiler() -> bool:
    """Whether torch.compile can work here: it needs a C++ compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, since its start or since `reset_peak_rss`."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Starts counting the peak of resident memory afresh, where the system (Linux) can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def limit_threads() -> None:
    """Tells OpenMP and numba about a container's CPU quota, which they don't see; call before they load.

    Without a quota, and where the user has set a number, nothing changes.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity and cores() < len(affinity(0)):
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, str(cores()))


def _cgroup_folders(controller: str) -> list[Path]:
    """The control groups that hold this process, innermost first; of version 1 and of version 2."""
    folders = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, name = line.strip().split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        inner = root / name.lstrip("/")
        folders += [folder for folder in [inner, *inner.parents] if folder.is_relative_to(root)]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores' worth of processor time that a control group may use."""
    both = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(
        folder / "cpu.cfs_period_us"
    )
    if len(both) != 2 or not both[0].isdigit():  # "max", or -1: no limit
        return None
    return max(1.0, int(both[0]) / int(both[1]))


def _memory_limit(folder: Path) -> int | None:
    words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    return int(words[0]) if words and words[0].isdigit() else None


def _memory_used(folder: Path) -> int | None:
    words = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
    if not words:
        return None
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    cache = next((int(pair[1]) for pair in pairs if pair[0] in ("inactive_file", "total_inactive_file")), 0)
    return int(words[0]) - cache


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel's; none where this system has no such file."""
    try:
        return path.read_text("utf-8").splitlines()
    except OSError:
        return []
