"""A run in a few plain sentences: what was done, what came out, and what did not."""

from collections.abc import Mapping, Sequence
from typing import Any

from danlu.core.progress import clock
from danlu.core.show import show_size


def summary(figures: Mapping[str, Any]) -> list[str]:
    """`figures`: what `report.collect` has gathered. Says only what the figures hold."""
    sentences = [_cost(figures)]
    sentences += [text for stage in figures["stages"] for text in _training(stage)]
    sentences += _compression(figures)
    sentences += _chat(figures)
    return sentences


def _cost(figures: Mapping[str, Any]) -> str:
    stages: Sequence[Mapping[str, Any]] = figures["stages"]
    unfinished = [stage["name"] for stage in stages if not stage["done"]]
    machine = figures["machine"]
    where = f" on {machine['processor']}, {machine['cores']} cores" if machine else ""
    count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    text = f"{count} took {clock(figures['seconds'])} min{where}"
    text += f", with at most {show_size(figures['peak_memory_bytes'])} of memory."
    return text + (f" Not finished: {', '.join(unfinished)}." if unfinished else "")


_MEASURES = (
    ("accuracy", "the share of held-out pairs that it ranks rightly {}", ".1%"),
    ("held_out_reward", "the mean reward of a reply to a held-out prompt {}", ".2f"),
    ("held_out_loss", "the held-out loss {} nats a token", ".2f"),
)
"""What a result says of unseen data: the first that there is."""


def _training(stage: Mapping[str, Any]) -> list[str]:
    result = stage["result"]
    if "parameters" not in result or "tokens" not in result:
        return []
    text = (
        f"{stage['name']}: {result['parameters'] / 1e6:,.1f} million parameters were trained on "
        f"{result['tokens']:,} tokens"
    )
    for name, what, form in _MEASURES:
        before, after = result.get(f"{name}_before"), result.get(name)
        if after is not None:
            came = f"is {after:{form}}" if before is None else f"went from {before:{form}} to {after:{form}}"
            text += f"; {what.format(came)}"
            break
    count = result.get("interventions", 0)
    times = "once" if count == 1 else f"{count} times"
    guard = f" The loss-spike guard acted {times}." if count else ""
    return [text + "." + guard]


def _compression(figures: Mapping[str, Any]) -> list[str]:
    bits = figures.get("bits_per_byte")
    if not isinstance(bits, Mapping) or len(bits) < 2 or "model" not in bits:
        return []
    labels = figures.get("labels", {})
    others = {name: value for name, value in bits.items() if name != "model"}
    best = min(others, key=lambda name: others[name])
    less = 1 - bits["model"] / others[best]
    verdict = f"{less:.0%} fewer than" if less >= 0 else f"{-less:.0%} more than"
    sentences = [
        f"On text it has never seen the model needs {bits['model']:.2f} bits per byte, {verdict} the best "
        f"other compressor ({labels.get(best, best)}, {others[best]:.2f})."
    ]
    whole = figures.get("bits_per_byte_with_model")
    if isinstance(whole, Mapping) and "model" in whole:
        wins = whole["model"] < min(value for name, value in whole.items() if name != "model")
        sentences.append(
            f"Counting the model's own bytes it needs {whole['model']:.2f}, and "
            + ("still wins." if wins else "loses: the text is too short to pay for the model.")
        )
    return sentences


def _chat(figures: Mapping[str, Any]) -> list[str]:
    quality = figures.get("chat_quality")
    passed = quality.get("passed") if isinstance(quality, Mapping) else None
    if not isinstance(passed, Mapping):
        return []
    failed = [name for name, good in passed.items() if not good]
    if not failed:
        return [f"Its small talk passes all {len(passed)} checks."]
    good = len(passed) - len(failed)
    return [f"Its small talk passes {good} of {len(passed)} checks; not: {', '.join(failed)}."]
