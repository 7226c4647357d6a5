"""The models that are served, by name."""

import time
from dataclasses import dataclass, field

from danlu.generate.engine import Engine
from danlu.tokens.tokenizer import Tokenizer
from danlu.web.errors import HttpError


@dataclass(frozen=True)
class Served:
    """A model, or one of its adapters."""

    name: str
    ref: str
    """What it was loaded from."""
    engine: Engine
    adapter: str | None = None
    """Of the engine's, None = the model without any."""
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        return self.engine.model.config.max_positions

    def room(self, n_prompt: int) -> int:
        """Tokens that an answer may have: what is left of the context, and of the cache."""
        return max(0, min(self.context - n_prompt, self.engine.capacity - n_prompt))


class Catalogue:
    """All of them; the first one is meant where none is named."""

    def __init__(self, models: list[Served]) -> None:
        self.models = models

    def find(self, name: str | None) -> Served:
        """Raises HttpError for a name that isn't served."""
        if name is None:
            return self.models[0]
        for served in self.models:
            if served.name == name:
                return served
        known = ", ".join(served.name for served in self.models)
        raise HttpError(
            404, f'there is no model "{name[:100]}"; served: {known}', param="model", code="model_not_found"
        )

    @property
    def engines(self) -> list[Engine]:
        return list({id(served.engine): served.engine for served in self.models}.values())
