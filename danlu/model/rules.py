"""How a family's config.json says what a ModelConfig says: small rules that work in both directions.

A rule reads some of our fields out of a config.json and writes them into one. What a rule can't express it
writes as nearly as it can; `families.to_hf` reads the result back, and refuses what has changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from danlu.core.errors import UserError
from danlu.model.config import ModelConfig, RopeScaling

HF = Mapping[str, Any]


class Rule(Protocol):
    """Reads fields of a ModelConfig from a config.json, and writes them into one."""

    def read(self, hf: HF) -> dict[str, Any]: ...

    def write(self, config: ModelConfig) -> dict[str, Any]: ...


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One of our fields in one key; `default`: a value, or a function of the file, where it is absent."""

    ours: str
    theirs: str
    default: Any = None
    decode: Callable[[Any], Any] = _same
    encode: Callable[[Any], Any] = _same

    def read(self, hf: HF) -> dict[str, Any]:
        value = hf.get(self.theirs)
        if value is None:
            value = self.default(hf) if callable(self.default) else self.default
            if value is None:
                raise UserError(f"{self.theirs} is missing", "the config.json is incomplete")
        try:
            return {self.ours: self.decode(value)}
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise UserError(f"{self.theirs} is {value!r}", "danlu does not know that") from None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.encode(getattr(config, self.ours))}


def choice(ours: str, theirs: str, default: str, names: Mapping[str, str]) -> Key:
    """A key whose values have other names: {theirs: ours}."""
    back = {our: their for their, our in reversed(list(names.items()))}
    return Key(ours, theirs, default, lambda value: names[value], lambda value: back.get(value, ""))


def optional(ours: str, theirs: str, default: float = 0) -> Key:
    """A number where null means none, which is 0 with us; `default` where the key is absent."""
    return Key(
        ours, theirs, lambda hf: 0 if theirs in hf else default, lambda value: value, lambda v: v or None
    )


@dataclass(frozen=True)
class Width:
    """A width that with us is 0 where it is that of another field; `default` where the key is absent."""

    ours: str
    theirs: str
    whole: str
    default: Any

    def read(self, hf: HF) -> dict[str, Any]:
        return Key(self.ours, self.theirs, self.default).read(hf)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: getattr(config, self.ours) or getattr(config, self.whole)}


class Always:
    """What every model of the family does, and no key says."""

    def __init__(self, **fields: Any) -> None:
        """A field's value may be a function of the config.json."""
        self.fields = fields

    def read(self, hf: HF) -> dict[str, Any]:
        return {name: value(hf) if callable(value) else value for name, value in self.fields.items()}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class Only:
    """Keys that may have one value only: danlu knows no other."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys

    def read(self, hf: HF) -> dict[str, Any]:
        for key, known in self.keys.items():
            if (found := hf.get(key, known)) != known:
                raise UserError(f"{key} is {found!r}", f"danlu knows {known!r} only")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict(self.keys)


@dataclass(frozen=True)
class Rope:
    """Rotary angles: `rope_parameters` (transformers 5), or the keys of version 4 beside it.

    `partial`: the default of partial_rotary_factor, where the family has it. `theta_key` and `partial_key`
    are version 4's names. `nested`: angles of full and of sliding layers apart (Gemma 3).
    """

    theta: float = 10000.0
    partial: float | None = None
    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    nested: bool = False
    kinds: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3")

    def read(self, hf: HF) -> dict[str, Any]:
        given: HF = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        rope: HF = given.get("full_attention", given) if self.nested else given
        theta = rope.get("rope_theta") or hf.get(self.theta_key) or self.theta
        fields: dict[str, Any] = {"rope_theta": float(theta)}
        if self.nested:
            local = given.get("sliding_attention") or {}
            _plain_only(local)
            fields["local_rope_theta"] = float(
                local.get("rope_theta") or hf.get("rope_local_base_freq") or 10000.0
            )
        if self.partial is not None:
            share = rope.get("partial_rotary_factor", hf.get(self.partial_key, self.partial))
            head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
            fields["rope_width"] = int(head * share)
        kind = rope.get("rope_type", rope.get("type", "default"))
        kind = "longrope" if kind == "su" else kind  # its first name
        positions = hf.get("max_position_embeddings")
        if kind == "default":
            return fields
        if kind not in self.kinds:
            raise UserError(f"rope_type is {kind!r}", f"danlu knows {', '.join(('default', *self.kinds))}")
        original = (
            hf.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or positions
            or 2048
        )
        if kind == "dynamic":
            original = positions or 2048
            fields["max_positions"] = int(original * rope["factor"])
        fields["rope_scaling"] = _read_scaling(kind, rope, original, positions or original)
        return fields

    def write(self, config: ModelConfig) -> dict[str, Any]:
        head = config.head_width
        partial = {"partial_rotary_factor": (config.rope_width or head) / head}
        rope: dict[str, Any] = {
            "rope_theta": config.rope_theta,
            **({} if self.partial is None else partial),
            **_write_scaling(config.rope_scaling),
        }
        out: dict[str, Any] = {} if self.theta_key != "rope_theta" else {"rope_theta": config.rope_theta}
        if self.partial is not None:
            out[self.partial_key] = partial["partial_rotary_factor"]
        if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
            out["max_position_embeddings"] = config.rope_scaling.original
        if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
            out["original_max_position_embeddings"] = config.rope_scaling.original
        if self.nested:
            local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
            out["rope_local_base_freq"] = config.local_rope_theta
            return {**out, "rope_parameters": {"full_attention": rope, "sliding_attention": local}}
        return {**out, "rope_parameters": rope}


def _plain_only(rope: HF) -> None:
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"rope_type of sliding layers is {rope['rope_type']!r}", "danlu knows 'default' only there"
        )


def _read_scaling(kind: str, rope: HF, original: int, positions: int) -> RopeScaling:
    factor = rope.get("factor")
    if kind == "longrope":
        return RopeScaling(
            kind=kind,
            factor=max(1.0, factor or positions / original),
            original=original,
            attention=rope.get("attention_factor") or 0.0,
            short=tuple(map(float, rope["short_factor"])),
            long=tuple(map(float, rope["long_factor"])),
        )
    if factor is None:
        raise UserError(f"rope_type is {kind!r}, and factor is missing", "the config.json is incomplete")
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return RopeScaling(kind="llama3", factor=factor, original=original, low=low, high=high)
    if kind != "yarn":
        return RopeScaling(
            kind=kind,
            factor=factor,
            original=original if kind == "dynamic" else 0,
        )
    attention = rope.get("attention_factor") or 0.0
    if not attention and rope.get("mscale") and rope.get("mscale_all_dim"):
        from math import log

        up, down = (0.1 * rope[name] * log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        attention = up / down
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original=original,
        low=rope.get("beta_slow") or 1.0,
        high=rope.get("beta_fast") or 32.0,
        attention=attention,
        truncate=rope.get("truncate", True),
    )


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3", "longrope"):
        out["original_max_position_embeddings"] = scaling.original
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "longrope":
        out |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        out |= {"attention_factor": scaling.attention} if scaling.attention else {}
    if scaling.kind == "yarn":
        out |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        if scaling.attention:
            out["attention_factor"] = scaling.attention
    return out


@dataclass(frozen=True)
class Windows:
    """Sliding windows: `sliding_window`, and which layers have it.

    `switch`: a key that must be true for it to hold (Qwen). `pattern`: which layers have it where
    `layer_types` doesn't say; a function of the config.json to a list of flags.
    """

    default: int = 0
    switch: str | None = None
    pattern: Callable[[HF], list[bool]] | None = None

    def read(self, hf: HF) -> dict[str, Any]:
        window = hf.get("sliding_window", self.default) or 0
        if self.switch is not None and not hf.get(self.switch, False):
            window = 0
        if not window:
            return {"window": 0}
        if self.pattern is None:
            return {"window": window}
        kinds = hf.get("layer_types")
        flags = self.pattern(hf) if kinds is None else [kind == "sliding_attention" for kind in kinds]
        return {"window": window, "local_layers": tuple(flags)} if any(flags) else {"window": 0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        out: dict[str, Any] = {"sliding_window": config.window or None}
        if self.switch is not None:
            out[self.switch] = config.window > 0
        if self.pattern is not None:
            flags = [config.window_of(layer) > 0 for layer in range(config.n_layers)]
            out["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]
        return out
