"""Models of the Hugging Face hub, by their id. The only place in danlu that goes to the network for a model.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by the library. Imports no torch.
"""

import re
from pathlib import Path

from danlu.core.errors import UserError

_WEIGHTS = "*.safetensors"
_FILES = ["*.json", "*.model", "*.tiktoken", "merges.txt", "*.jinja"]


def is_hub_id(ref: str) -> bool:
    """Whether it can only be an id: owner/name, and no folder here is called like the owner."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", ref) is not None and not Path(ref.split("/")[0]).exists()


def fetch(ref: str) -> Path:
    """The folder of a model in the hub's cache, fetched where it isn't there. Raises UserError."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(huggingface_hub.snapshot_download(ref, allow_patterns=[*_FILES, _WEIGHTS]))
        if not any(folder.glob(_WEIGHTS)):  # an old model
            folder = Path(huggingface_hub.snapshot_download(ref, allow_patterns=[*_FILES, "*.bin"]))
    except GatedRepoError:
        raise UserError(f"{ref}: its owner lets in by request", "ask there, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{ref}: neither here nor on the Hugging Face hub", "check the name; a private one needs HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{ref}: not a folder here, and not to be had from the Hugging Face hub: {first}",
            "check the name and the network, or fetch it elsewhere and name its folder",
        ) from None
    return folder
