"""Checkpoints: everything a run needs to go on to the bit, written in the background.

`checkpoints/step-00000100/` holds the weights and the optimiser as a PyTorch distributed checkpoint (so
that a sharded run's checkpoint loads on one process and the other way round) and `state.json`: step,
loader, guard, random generators of every process, config and data fingerprint. Weights that are not trained
are left out. It is written under a temporary name, synced, then renamed: a folder of that name is complete.
"""

import base64
import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from danlu.core.errors import UserError
from danlu.core.files import make_folder, os_errors, read_text
from danlu.model import parallel

NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})
_FULL = 1_000_000  # bytes free below which a failed write is put down to a full disk


class Checkpointer:
    """Writes, lists, loads and prunes the checkpoints of one run. All methods are collective."""

    def __init__(self, folder: Path, keep: int) -> None:
        # What dcp says of every save without torchrun.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self.folder = folder
        self.keep = keep
        self.pending: Future[None] | None = None
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Its own group: the background write must not mix with the collectives of the training step.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if parallel.is_main():
            make_folder(folder)
            for leftover in folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)
        parallel.barrier()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; waits for the one being written."""
        self.wait()
        return parallel.agree(self._complete())

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Any,
        state: dict[str, Any],
        kept: Mapping[str, torch.Tensor] = NOTHING,
    ) -> None:
        """Takes a snapshot now and writes it in the background.

        `state` is JSON-able, one a process; `kept`: further tensors, the same in every process.
        """
        self.wait()
        states = parallel.gather(state)
        temporary = self.folder / f".step-{step:08}.tmp"
        if parallel.is_main():
            self._require_space(_tensor_bytes(model) + sum(one.nbytes for one in kept.values()))
            shutil.rmtree(temporary, ignore_errors=True)
            make_folder(temporary)
        parallel.barrier()
        written = dcp.async_save(
            _weights_and_moments(model, optimizer) | {"kept": dict(kept)},
            storage_writer=dcp.FileSystemWriter(temporary),
            process_group=self.group,
            no_dist=self.group is None,
        )
        self.pending = self.worker.submit(self._finish, step, temporary, states, written)

    def _finish(self, step: int, temporary: Path, states: list[dict[str, Any]], written: Any) -> None:
        written.result()
        if not parallel.is_main():
            return
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            json.dump({"step": step, "processes": states}, file)
            file.flush()
            os.fsync(file.fileno())
        final = self._path(step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync_folder(self.folder)
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(self._path(old))

    def wait(self) -> None:
        """Until the write under way is on the disk. Raises UserError when it failed (disk full …)."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        error = pending.exception()
        if error is None:
            return
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        full = full or shutil.disk_usage(self.folder).free < _FULL  # torch hides the errno
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        if full:
            raise UserError(
                f"{self.folder}: the disk is full, the checkpoint could not be written",
                "free some space and run the same command again: it resumes from the checkpoint before",
            ) from error
        with os_errors(self.folder):
            raise error

    def check(self) -> None:
        """Raises the error of a background write that has failed, without waiting."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def read_state(self, step: int) -> dict[str, Any]:
        """This process's `state` of a checkpoint. Raises UserError for another number of processes."""
        path = self._path(step) / "state.json"
        states = json.loads(read_text(path))["processes"]
        if len(states) != parallel.world_size():
            raise UserError(
                f"{path.parent}: written by {len(states)} processes, this run has {parallel.world_size()}",
                "resume with as many processes, or start a new run with init_from",
            )
        return states[parallel.rank()]

    def load(
        self, step: int, model: nn.Module, optimizer: Any, kept: Mapping[str, torch.Tensor] = NOTHING
    ) -> None:
        """Puts the tensors of a checkpoint into `model`, `optimizer` and `kept`."""
        load_weights_and_moments(self._path(step), model, optimizer, kept)

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints that are newer than `step`."""
        self.wait()
        if parallel.is_main():
            for newer in self._complete():
                if newer > step:
                    shutil.rmtree(self._path(newer))
        parallel.barrier()

    def close(self) -> None:
        """Ends the background thread without raising; call `wait` before, where all went well."""
        self.worker.shutdown(wait=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _complete(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: the disk is full: a checkpoint takes {needed / 1e6:,.0f} MB, "
                f"{free / 1e6:,.0f} MB are free",
                "free some space and run the same command again: it resumes",
            )


def load_weights_and_moments(
    folder: Path, model: nn.Module, optimizer: Any, kept: Mapping[str, torch.Tensor] = NOTHING
) -> None:
    """Reads a distributed checkpoint into `model` and `optimizer`, sharded or not, and `kept`, in place."""
    state = _weights_and_moments(model, optimizer) | {"kept": dict(kept)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(model),
    )


def _weights_and_moments(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=_options(model))
    return {"model": weights, "optimizer": moments}


def _options(model: nn.Module) -> StateDictOptions:
    """Of frozen weights nothing is kept, so nothing of them is looked for."""
    frozen = not all(p.requires_grad for p in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _tensor_bytes(model: nn.Module) -> int:
    """Bytes of the trained weights and of two moments for each."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, JSON-able."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _to_text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
