"""`danlu merge`: an adapter written into its base, in float32, and the merged files compared with the two."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from danlu.core.errors import UserError
from danlu.core.files import read_text
from danlu.model.checkpoint import find_base, is_adapter, load, resolve, save_model
from danlu.model.config import MergeConfig
from danlu.model.lora import merge

TEXT = """\
The furnace has to be warm before anything goes into it, and it must not cool before the work is done.
"How long does it take?" she asked. "Nine days," said the old man, "or nine times nine; nobody has counted."
炼丹的人守着炉子，火候到了，丹就成了。
def mean(values: list[float]) -> float:
    return sum(values) / len(values)
In 1687 the price rose by 12.5 % to 3 shillings and 4 pence; in 1688 it fell again.
"""
"""What logits are compared on where no text is given: prose, speech, Chinese, code, numbers."""


def merge_adapter(config: MergeConfig) -> dict[str, Any]:
    """Writes a Hugging Face folder with the adapter in its matrices; returns the largest logit difference.

    The folder is read again for the comparison. Raises UserError, and leaves nothing, where a logit differs
    by more than `tolerance` of the largest one.
    """
    folder = resolve(config.adapter)
    if not is_adapter(folder):
        raise UserError(f"{folder} is no adapter", "give an adapter's folder, or the run that trained it")
    if config.out.exists():
        raise UserError(f"{config.out} is there already", "choose another folder with -o, or remove it")
    base, kept = find_base(folder)
    model, tokenizer = load(folder, dtype=torch.float32)
    text = TEXT if config.text is None else read_text(config.text)
    ids = tokenizer.encode_document(text)[: min(1024, model.config.max_positions)]
    before = _logits(model, ids)
    merge(model)
    save_model(model, config.out, tokenizer)
    merged, _ = load(config.out)
    largest = float((_logits(merged, ids) - before).abs().max())
    relative = largest / float(before.abs().max())
    if not relative <= config.tolerance:
        shutil.rmtree(config.out)
        raise UserError(
            f"the merged model's logits differ by up to {relative:.2g} of the largest, beyond the tolerance "
            f"{config.tolerance:.2g}: nothing is written",
            "keep the adapter beside its base, or raise tolerance if that is close enough for you",
        )
    result = {
        "out": str(config.out),
        "adapter": str(folder),
        "base": str(base),
        "base_kept_as": kept,
        "largest_difference": largest,
        "of_the_largest_logit": relative,
        "tolerance": config.tolerance,
        "compared_tokens": len(ids),
    }
    _record(config.out, result)
    return result


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))


def _record(folder: Path, result: dict[str, Any]) -> None:
    (folder / "merge.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    with open(folder / "README.md", "a", encoding="utf-8") as file:
        file.write(
            f"\nMerged in float32 from the adapter {result['adapter']} and its base {result['base']}. The "
            f"largest difference of a logit from theirs, on {result['compared_tokens']} tokens, is "
            f"{result['largest_difference']:.3g}, {result['of_the_largest_logit']:.1g} of the largest "
            "logit.\n"
        )
