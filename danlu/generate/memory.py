"""Memory for what is read over and over: from the system, in large pages where it has them."""

import math
import mmap

import torch
from torch import Tensor


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros. On a processor nothing is taken before it is written to.

    (PyTorch writes to all of it, and so does malloc where it has been told to keep what was freed.) Each
    jump to another small page costs a walk through tables, longer than the read itself.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = max(1, math.prod(shape) * dtype.itemsize)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
