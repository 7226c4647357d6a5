"""What an objective makes of held-out data, while training."""

from collections.abc import Iterable, Iterator

import torch

from danlu.model import parallel
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.objective import Objective


def evaluate(
    objective: Objective,
    model: Transformer,
    batches: Iterable[Batch],
    device: torch.device,
    way: parallel.Way = "ddp",
) -> dict[str, float]:
    """The objective's figures of `batches`, each counted once, spread over processes with data of their own.

    Empty where there is nothing to count.
    """
    share = parallel.data_processes(way) > 1
    total: list[float] = []
    with torch.no_grad():
        for batch, counts in _share(batches) if share else ((batch, True) for batch in batches):
            found = [value * counts for value in objective.sums(model, batch.to(device))]
            total = [a + b for a, b in zip(total or [0.0] * len(found), found, strict=True)]
    if share and total:
        total = parallel.sum_over_ranks(total)
    return objective.figures(total) if total else {}


def _share(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This process's part of the batches, as many in every process: (batch, whether it counts).

    Sharded models need every process in every forward pass, so the last ones are run without counting.
    """
    rank, size = parallel.rank(), parallel.world_size()
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group[rank], True
            group = []
    if group:
        yield group[min(rank, len(group) - 1)], rank < len(group)
