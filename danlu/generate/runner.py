"""The model as the engine sees it: pieces of sequences in, the vectors of the tokens asked about out."""

import time
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from danlu.generate.blocks import Piece
from danlu.generate.draw import log_sums, top_logprobs
from danlu.generate.packed import Kind, PackedLinear, steady, substitute
from danlu.generate.paged import PagedCache, Step
from danlu.model.lora import LoraLinear
from danlu.model.transformer import Transformer

_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How many steps all optimisers of this process have made, since this file was loaded."""
    return _steps


SCORED_AT_ONCE = 2**25
"""Logits that are held while targets are scored."""


class Runner:
    """Runs any model, on any device, as the transformer stands: its live weights are the current ones.

    In float32, and on a GPU in bfloat16 too, these are what it computes with; else packed copies of them.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        exact: bool = False,
        kind: Kind | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        """`exact`: the deterministic mode; `kind`: of packed weights, None = no copies.

        `adapters`: names that roots 1, 2 … stand for; root 0 is the model as it is.
        """
        self.model, self.cache, self.exact = model, cache, exact
        scaling = model.config.rope_scaling
        self.whole = scaling is not None and scaling.kind in ("dynamic", "longrope")
        """Whether a sequence has to be read in one piece, and alone: angles hang on its length."""
        self.adapters = adapters
        self.state: Any = self._state()
        self.twin = model
        self.head: PackedLinear | None = None
        self.packing_seconds = 0.0
        """What the last packing took."""
        if kind is not None:
            begin = time.perf_counter()
            self.twin = substitute(model, kind, exact, len(adapters) > 0)
            self.twin.compute_dtype = torch.float32 if kind == "float32" else torch.bfloat16
            self.head = PackedLinear(lambda: model.head_weight, model.head_bias, kind, exact)
            self.packing_seconds = time.perf_counter() - begin

    @property
    def packed_bytes(self) -> int:
        """What copies of the weights take."""
        return sum(part.n_bytes for part in self._packed)

    @property
    def _packed(self) -> list[PackedLinear]:
        return [part for part in (*self.twin.modules(), self.head) if isinstance(part, PackedLinear)]

    def refresh(self) -> bool:
        """Whether the weights have changed since the last call; packs them again, in place."""
        state = self._state()
        if state == self.state:
            return False
        self.state = state
        begin = time.perf_counter()
        for part in self._packed:
            part.refresh()
        self.packing_seconds = time.perf_counter() - begin
        return True

    def _state(self) -> tuple[int, list[int], list[str | None]]:
        """Counts each change of the weights, by an optimiser or otherwise, and of the active adapters.

        PyTorch counts the changes of a tensor, but for those of fused optimisers and through `.data`.
        """
        parameters, adapted = self._parts
        return optimizer_steps(), [p._version for p in parameters], [layer.active for layer in adapted]

    @cached_property
    def _parts(self) -> tuple[list[nn.Parameter], list[LoraLinear]]:
        adapted = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        return list(self.model.parameters()), adapted

    def look_again(self) -> None:
        """Before new requests: the model may have got adapters, or other parameters."""
        parameters, _ = self.__dict__.pop("_parts")
        if any(old is not new for old, new in zip_longest(parameters, self._parts[0])):
            self.state = None

    @torch.no_grad()
    def run(
        self,
        pieces: Sequence[Piece],
        roots: Sequence[int],
        copies: Sequence[tuple[int, int]],
        wanted: Sequence[int],
    ) -> Tensor:
        """(wanted, D): what the output matrix is multiplied with. `copies`: blocks, before all else."""
        self.cache.copy(copies)
        step = Step(self.cache, pieces, self.exact)
        ids = torch.tensor([[token for piece in pieces for token in piece.tokens]], device=step.device)
        self._assign(pieces, roots, step.device)
        hidden = self.twin.hidden(ids, cache=step)[0]
        return (
            hidden
            if len(wanted) == len(hidden)
            else hidden[torch.tensor(wanted, dtype=torch.long, device=step.device)]
        )

    def _assign(self, pieces: Sequence[Piece], roots: Sequence[int], device: torch.device) -> None:
        """Tells the adapted matrices which tokens are whose."""
        if not self.adapters:
            return
        own = [root for piece, root in zip(pieces, roots, strict=True) for _ in piece.tokens]
        tokens = torch.tensor(own, device=device)
        rows = {name: (tokens == root).nonzero()[:, 0] for root, name in enumerate(self.adapters, start=1)}
        for layer in self._adapted:
            layer.rows = {name: mine for name, mine in rows.items() if len(mine) and name in layer.adapters}

    @cached_property
    def _adapted(self) -> list[LoraLinear]:
        return [module for module in self.twin.modules() if isinstance(module, LoraLinear)]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) float32."""
        if self.head is None:
            return self.model.logits(hidden).float()
        z, cap = self.head(hidden).float(), self.model.config.logit_softcap
        if not cap:
            return z
        return cap * (steady("tanh")(z / cap) if self.exact else (z / cap).tanh())

    @torch.no_grad()
    def score(
        self, hidden: Tensor, targets: Sequence[int], n_top: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[list[tuple[int, float]]]]:
        """Of each row its target's log-probability, whether it is the most probable token, and the `n_top`
        most probable ones.
        """
        ids = torch.tensor(targets, device=hidden.device)
        logprobs, greedy = [], []
        tops: list[list[tuple[int, float]]] = []
        size = max(1, SCORED_AT_ONCE // self.model.config.vocab_size)
        for rows, wanted in zip(hidden.split(size), ids.split(size), strict=True):
            logits = self.logits(rows)
            totals = log_sums(logits)
            logprobs.append(logits.gather(1, wanted[:, None])[:, 0] - totals)
            greedy.append(logits.argmax(1) == wanted)
            own = n_top[len(tops) : len(tops) + len(rows)]
            each = zip(logits, totals, own, strict=True) if any(own) else ()
            tops += [top_logprobs(row - total, n) for row, total, n in each] or [[] for _ in own]
        return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu(), tops
