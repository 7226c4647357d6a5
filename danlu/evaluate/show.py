"""Scores as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from danlu.core.show import console, show_size, table
from danlu.evaluate.compressors import LABELS


def show(result: Mapping[str, Any]) -> None:
    """Bits per byte, smallest first, and what the chat scores say."""
    out = console()
    if "scores" in result:
        out.print(score_table(result["scores"]))
        if result["cut_contexts"]:
            out.print(f"{result['cut_contexts']:,} contexts were too long, and lost their beginnings")
        out.print(f"Questions and answers: {result['report']}", soft_wrap=True)
    if "text" in result:
        out.print(text_table(result["text"]))
    if "memorisation" in result:
        out.print(memorisation_table(result["memorisation"]))
    if "bits_per_byte" in result:
        out.print(compression_table(result))
    if "chat_quality" in result:
        out.print(chat_table(result["chat_quality"]))
        examples = [(e["prompt"], e["reply"].strip()) for e in result["chat_quality"]["examples"][:6]]
        out.print(table("It talks back", ("you", "model"), examples))


def score_table(scores: Sequence[Mapping[str, Any]]) -> Any:
    rows = []
    for score in scores:
        low, high = score["interval"]
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        note = "no better than chance" if score["at_chance"] else ""
        value, interval = f"{score['value']:.4f}", f"{low:.3f} – {high:.3f}"
        seen = contaminated(score)
        rows.append((score["task"], score["metric"], value, interval, chance, str(score["n"]), *seen, note))
    more = ("in the training text",) if any("contaminated" in score for score in scores) else ()
    return table("Scores", ("task", "metric", "score", "95 %", "chance", "n", *more, ""), rows)


def contaminated(score: Mapping[str, Any]) -> tuple[str, ...]:
    """A cell of the share of questions that stand in the training text, and the score without them."""
    if "contaminated" not in score:
        return ()
    share = f"{score['contaminated']:.1%}"
    if not score["contaminated"] or score["clean"] is None:
        return (share,)
    return (f"{share}; without them {score['clean']:.4f}",)


def text_table(text: Mapping[str, Any]) -> Any:
    rows = [
        ("perplexity of a token", f"{text['perplexity']:.3f}"),
        ("nats a token", f"{text['nats_per_token']:.4f}"),
        ("bits a byte", f"{text['bits_per_byte']:.4f}"),
    ]
    title = f"{text['tokens']:,} tokens, windows of {text['window']:,}, {text['stride']:,} apart"
    return table(title, ("", ""), rows)


def memorisation_table(found: Mapping[str, Mapping[str, Any]]) -> Any:
    rows = []
    for part, label in (("train", "training text"), ("held_out", "held-out text")):
        one = found[part]
        low, high = one["interval"]
        share = f"{one['share']:.3f}"
        rows.append((label, share, f"{low:.3f} – {high:.3f}", f"{one['tokens']:.1f}", str(one["n"])))
    columns = ("", "word for word", "95 %", "tokens before the first other", "documents")
    return table("Continued by 50 tokens after 50", columns, rows)


def compression_table(result: Mapping[str, Any]) -> Any:
    alone, with_model = result["bits_per_byte"], result["bits_per_byte_with_model"]
    rows = [
        (LABELS[name], f"{bits:.3f}", f"{with_model[name]:.3f}")
        for name, bits in sorted(alone.items(), key=lambda item: item[1])
    ]
    title = f"Held-out text, {show_size(result['held_out_bytes'])}: bits per byte, fewer is better"
    own = f"and the model's own {show_size(result['model_bytes'])}"
    return table(title, ("", "the text alone", own), rows)


def chat_table(quality: Mapping[str, Any]) -> Any:
    columns = ("check", "found", "asked", "passed")
    rows = [tuple(check[column] for column in columns) for check in quality["checks"]]
    return table("Small talk, 20 prompts", columns, rows)
