"""`danlu sizes`: how large and how costly models are, the published by name and any that is at hand."""

from dataclasses import dataclass

from danlu.core.config import nearest
from danlu.core.errors import UserError
from danlu.core.show import console, show_result, show_size, table
from danlu.model import count
from danlu.model.checkpoint import sizes_of
from danlu.model.config import ModelConfig, SizesConfig
from danlu.model.sizes import SERIES, SIZES, fields_of


@dataclass
class Described:
    """One model. FLOPs are those of a token in a sequence of `length`; bytes of a bf16 cache and model."""

    name: str
    parameters: int
    active_parameters: int
    embedding_parameters: int
    length: int
    forward_flops: float
    training_flops: float
    weights_bytes: int
    cache_bytes: int
    """Of one sequence of `length` tokens."""
    training_bytes: int
    """Weights, gradients and AdamW's state in float32, and the activations of one sequence."""
    stated: str = ""
    """Parameters as the paper prints them, total and active."""
    note: str = ""
    paper: str = ""


def describe(config: SizesConfig) -> list[Described]:
    """The one that is asked for, or every named size. Raises UserError for neither name nor model."""
    if config.model is None:
        return [_named(name, config.length) for name in SIZES]
    if config.model in SIZES:
        return [_named(config.model, config.length)]
    try:
        return [_count(config.model, sizes_of(config.model), config.length)]
    except UserError as error:
        if "does not exist" not in error.message:
            raise
        hint = nearest(config.model, SIZES)
        raise UserError(f"{config.model}: neither a named size nor a model{hint}", "danlu sizes") from None


def _named(name: str, length: int | None) -> Described:
    made = _count(name, ModelConfig(**fields_of(name)), length)
    size = SIZES[name]
    made.stated = size.stated + (f", {size.stated_active} active" if size.stated_active else "")
    made.note = size.note + (f" ({size.without:,} parameters)" if size.without else "")
    made.paper = next(series.paper for series in SERIES if name in series.sizes)
    return made


def _count(name: str, sizes: ModelConfig, length: int | None) -> Described:
    length = min(length or sizes.max_positions, sizes.max_positions)
    return Described(
        name=name,
        parameters=count.parameters(sizes),
        active_parameters=count.active_parameters(sizes),
        embedding_parameters=count.embedding_parameters(sizes),
        length=length,
        forward_flops=count.flops_per_token(sizes, length, backward=False),
        training_flops=count.flops_per_token(sizes, length),
        weights_bytes=2 * count.parameters(sizes),
        cache_bytes=count.kv_cache_bytes(sizes, 1, length),
        training_bytes=count.training_memory(sizes, length),
    )


def show(made: list[Described]) -> None:
    """A table of many, or all figures of one."""
    if len(made) == 1:
        show_result(made[0])
        return
    rows = [
        (
            one.name,
            _short(one.parameters),
            _short(one.active_parameters),
            one.stated,
            f"{one.forward_flops:.2g}",
            show_size(one.weights_bytes),
            show_size(one.cache_bytes),
            show_size(one.training_bytes),
        )
        for one in made
    ]
    columns = (
        "size",
        "parameters",
        "active",
        "in the paper",
        "FLOPs a token",
        "in bf16",
        "cache",
        "to train",
    )
    console().print(table("", columns, rows))


def _short(number: int) -> str:
    """1,234,567,890 as 1.23B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)
