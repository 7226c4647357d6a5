"""Which device and dtype danlu computes with, and how fast they are."""

import contextlib
import functools
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from danlu.core import host
from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.host import peak_rss_bytes

__all__ = ["Machine", "choose_device", "choose_dtype", "has_native_bf16", "machine", "peak_rss_bytes"]


@dataclass(frozen=True)
class Machine:
    """What danlu computes on: a GPU where there is one, else the processor."""

    device: str
    """"cpu" or "cuda"."""
    name: str
    """Of the processor or GPU."""
    cores: int
    """Processor cores that this process may use."""
    memory_bytes: int
    """Of the device, and within what a container allows."""
    bf16_native: bool
    bf16_gflops: float
    """Measured rate of a product of square matrices in bfloat16, 1e9 operations a second."""
    f32_gflops: float
    gpu: str | None = None


def choose_device(name: str = "auto") -> torch.device:
    """auto: a GPU where there is one. Raises UserError where the device asked for isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and torch finds no GPU", "set device=cpu, or see `danlu doctor`")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def choose_dtype(name: str = "auto", device: torch.device | None = None) -> torch.dtype:
    """auto: bfloat16 where the device has it in hardware, else float32.

    It hangs on what the device is, never on a measured speed, so that a resumed run computes the same.
    """
    if name == "auto":
        name = "bf16" if has_native_bf16(device or choose_device()) else "float32"
    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@functools.cache
def machine() -> Machine:
    """This machine, with its speed: measured once (a second), then kept in the user's cache folder."""
    device = choose_device()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    name = gpu or host.cpu_name()
    f32, bf16 = _speed(device, name)
    memory = host.memory_bytes()
    if gpu is not None:
        memory = torch.cuda.get_device_properties(device).total_memory
    return Machine(
        device=device.type,
        name=name,
        cores=host.cores(),
        memory_bytes=memory,
        bf16_native=has_native_bf16(device),
        bf16_gflops=bf16,
        f32_gflops=f32,
        gpu=gpu,
    )


def forget_speed() -> None:
    """Has the speed measured again: it may have been taken while another program was at work."""
    machine.cache_clear()
    for path in cache_folder().glob("speed-*.json"):
        path.unlink(missing_ok=True)


def _speed(device: torch.device, name: str) -> tuple[float, float]:
    """Rates of float32 and bfloat16 products in 1e9 operations a second, from the cache or measured."""
    setting = f"{name} {torch.get_num_threads()} {torch.__version__} {torch.backends.cuda.matmul.allow_tf32}"
    path = cache_folder() / f"speed-{hashlib.sha256(setting.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # not measured yet, or not readable
        kept = json.loads(path.read_text("utf-8"))
        return kept["f32_gflops"], kept["bf16_gflops"]
    f32, bf16 = (_product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    # A cache that can't be written only costs a second next time.
    with contextlib.suppress(OSError, UserError), atomic_write(path) as file:
        json.dump({"setting": setting, "f32_gflops": f32, "bf16_gflops": bf16}, file, indent=2)
    return f32, bf16


def _product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Best rate of products of square matrices within a time, 1e9 operations a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def cache_folder() -> Path:
    """Where danlu keeps what it may measure or build again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "danlu"
