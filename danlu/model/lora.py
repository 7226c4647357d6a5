"""Low-rank adaptation, applied to a model from outside: y = x Wᵀ + s · drop(x) Aᵀ Bᵀ with W frozen.

Hu et al. 2022 (LoRA, equation 3; s = α / r); Kalajdzievski 2023 (rsLoRA; s = α / √r); Liu et al. 2024
(DoRA, equation 5: W + s B A, its rows scaled to learnt lengths m).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.core.errors import UserError
from danlu.model.config import LoraConfig
from danlu.model.layers import Linear
from danlu.model.quantised import QuantisedLinear, unpack
from danlu.model.transformer import Transformer

Frozen = nn.Linear | QuantisedLinear
"""What an adapter stands on."""


class Adapter(nn.Module):
    """A, B and, with DoRA, the rows' lengths. B is zero at first, so that nothing changes."""

    def __init__(self, base: Frozen, config: LoraConfig) -> None:
        super().__init__()
        self.config = config
        device = next(base.parameters()).device
        self.a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.m = nn.Parameter(row_lengths(base.weight.float())) if config.dora else None

    def delta(self) -> Tensor:
        """s B A in float32."""
        return self.config.scale * (self.b.float() @ self.a.float())


class LoraLinear(nn.Module):
    """A frozen matrix with adapters, one of which is active."""

    def __init__(self, base: Frozen) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.rows: dict[str, Tensor] | None = None
        """Of one row of tokens (1, N, D), those of each adapter, in place of the active one for all."""

    def adapter(self, name: str) -> Adapter:
        return cast(Adapter, self.adapters[name])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.rows is not None:
            y = y.clone()
            for name, rows in self.rows.items():
                y[:, rows] = self._adapted(name, x[:, rows], y[:, rows])
            return y
        return y if self.active is None else self._adapted(self.active, x, y)

    def _adapted(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """What the base gives, y, with an adapter's change."""
        adapter = self.adapter(name)
        config = adapter.config
        dropped = F.dropout(x, config.dropout, self.training)
        change = F.linear(F.linear(dropped, adapter.a.to(x.dtype)), adapter.b.to(x.dtype)) * config.scale
        if adapter.m is None:
            return y + change
        # The length counts as a constant in the gradient (DoRA, section 4.3).
        lengths = row_lengths(self.base.weight.detach().float() + adapter.delta().detach())
        ratio = (adapter.m / lengths).to(x.dtype)
        plain = self.base(dropped) if config.dropout and self.training else y
        plain = plain if self.base.bias is None else plain - self.base.bias.to(x.dtype)
        return y + (ratio - 1) * plain + ratio * change

    def merged(self) -> Tensor:
        """The matrix with the active adapter in it, in float32."""
        weight = self.base.weight.float()
        if self.active is None:
            return weight
        adapter = self.adapter(self.active)
        weight = weight + adapter.delta()
        return weight if adapter.m is None else (adapter.m / row_lengths(weight))[:, None] * weight


def row_lengths(weight: Tensor) -> Tensor:
    """(n_out,) Euclidean length of each row."""
    return torch.linalg.vector_norm(weight, dim=1)


def adapted_layers(model: Transformer) -> dict[str, LoraLinear]:
    """The matrices that have adapters, by the name of the module in whose place they stand."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_adapter(model: Transformer, config: LoraConfig, name: str = "default") -> list[nn.Parameter]:
    """Puts a new adapter on every matrix that `targets` names, and makes it active. Freezes the rest.

    Returns the trained parameters. Raises UserError where nothing matches.
    """
    model.requires_grad_(False)
    bases = {f"{adapted}.base" for adapted in adapted_layers(model)}
    found = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, (Linear, QuantisedLinear, LoraLinear))
        and config.adapts(name_in_layer(module_name))
        and module_name not in bases
    ]
    if not found:
        raise UserError(
            f"no matrix matches {', '.join(config.targets)}", "patterns are like attention.q or ffn.*"
        )
    trained: list[nn.Parameter] = []
    for module_name in found:
        layer = model.get_submodule(module_name)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(cast(Frozen, layer))
            model.set_submodule(module_name, layer)
        adapter = layer.adapters[name] = Adapter(layer.base, config)
        layer.train(model.training)
        trained += adapter.parameters()
    use_adapter(model, name)
    return trained


def name_in_layer(module_name: str) -> str:
    """ "attention.q" of "layers.3.attention.q"; nothing for what is in no layer."""
    parts = module_name.split(".", 2)
    return parts[2] if parts[0] == "layers" and len(parts) == 3 else ""


def use_adapter(model: Transformer, name: str | None) -> None:
    """Makes an adapter the active one; None: the model as it was."""
    layers = adapted_layers(model)
    known = {adapter for layer in layers.values() for adapter in layer.adapters}
    if name is not None and name not in known:
        raise UserError(f'no adapter is called "{name}"', f"there are {', '.join(sorted(known)) or 'none'}")
    for layer in layers.values():
        layer.active = name if name is not None and name in layer.adapters else None


@contextmanager
def without_adapter(model: Transformer) -> Iterator[None]:
    """The model as it was, within the block."""
    active = {layer: layer.active for layer in adapted_layers(model).values()}
    for layer in active:
        layer.active = None
    try:
        yield
    finally:
        for layer, name in active.items():
            layer.active = name


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Writes the active adapter into the matrices, computed in float32, and takes all adapters off.

    A quantised base is unpacked, in all its matrices.
    """
    for name, layer in adapted_layers(model).items():
        if isinstance(layer.base, QuantisedLinear):
            model.set_submodule(name, layer.base.unpacked(layer.merged()))
        else:
            layer.base.weight.copy_(layer.merged())
            model.set_submodule(name, layer.base)
    unpack(model)
    model.requires_grad_(True)
