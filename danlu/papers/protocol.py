"""What every reproduction shares: claims, verdicts, intervals, and how a result is written down.

An experiment states its rule in its docstring before the first run. A claim has one of three verdicts; a
null control that isn't null voids the experiment, and then no claim is judged.
"""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from danlu.core.config import flatten
from danlu.core.files import atomic_write
from danlu.core.show import console, show_result, show_value, table
from danlu.evaluate.intervals import Interval

Verdict = Literal["holds", "does not hold", "not testable"]


class Claim(BaseModel):
    """One sentence of a paper, and what came out."""

    claim: str
    verdict: Verdict
    value: float | None
    interval: Interval | None
    required: str
    """The rule that decides, in words."""


class Control(BaseModel):
    """Something that must come out as nothing; where `null` is false the experiment is void."""

    control: str
    null: bool
    value: float | None
    interval: Interval | None = None


class Result(BaseModel):
    """What `result.json` holds."""

    paper: str
    rule: str
    claims: list[Claim]
    controls: list[Control]
    seeds: list[int]
    seconds: float
    not_tested: str
    figures: dict[str, Any] = {}
    """Everything else that was measured."""
    void: bool = False


def judged(result: Result) -> Result:
    """The result, with no claim judged when a control is not null."""
    if all(control.null for control in result.controls):
        return result
    claims = [claim.model_copy(update={"verdict": "not testable"}) for claim in result.claims]
    return result.model_copy(update={"claims": claims, "void": True})


def at_most(interval: Interval, limit: float) -> Verdict:
    """Holds when the whole interval lies at or below `limit`."""
    return "holds" if interval[1] <= limit else "does not hold"


def at_least(interval: Interval, limit: float) -> Verdict:
    """Holds when the whole interval lies at or above `limit`."""
    return "holds" if interval[0] >= limit else "does not hold"


def write_result(result: Result, folder: Path) -> None:
    """`result.json` and `index.html`, which shows `plot.png` where the experiment has drawn one."""
    with atomic_write(folder / "result.json") as file:
        json.dump(result.model_dump(mode="json"), file, indent=2, ensure_ascii=False)
    plot = folder / "plot.png"
    with atomic_write(folder / "index.html") as file:
        file.write(page(result, plot.read_bytes() if plot.exists() else None))


def save_plot(figure: Any, folder: Path) -> None:
    """Writes a matplotlib figure as `plot.png`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    with atomic_write(folder / "plot.png", "wb") as file:
        file.write(buffer.getvalue())


def show(result: Result) -> None:
    """The verdicts on stdout, and every single figure; rule, plot and the rest are on the page."""
    if result.void:
        print("VOID: a control is not null; no claim is judged")
    rows: list[tuple[str, ...]] = [
        (claim.verdict, claim.claim, _number(claim.value, claim.interval), claim.required)
        for claim in result.claims
    ]
    rows += [
        ("null" if one.null else "NOT NULL", f"control: {one.control}", _number(one.value, one.interval), "")
        for one in result.controls
    ]
    console().print(table(result.paper, ("verdict", "claim", "measured", "required"), rows))
    show_result({**result.figures, "seconds": result.seconds})


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .4rem; vertical-align: top; border-bottom: 1px solid #ddd }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1rem }}
.holds {{ color: #06711f }} .not {{ color: #a11 }}
</style></head><body><h1>{title}</h1>{void}
<h2>Claims</h2><table><tr><th>claim<th>verdict<th>value<th>required</tr>{claims}</table>
<h2>Controls</h2><table><tr><th>control<th>null?<th>value</tr>{controls}</table>
{plot}<h2>Figures</h2><table>{figures}</table>
<h2>The rule, written before the first run</h2><pre>{rule}</pre>
<h2>Not tested</h2><p>{not_tested}</p><p>Seeds {seeds}; {seconds:.0f} seconds.</p></body></html>
"""


def page(result: Result, plot: bytes | None = None) -> str:
    """A self-contained HTML page of a result."""
    say = html.escape
    claims = [
        f'<tr><td>{say(c.claim)}<td class="{"holds" if c.verdict == "holds" else "not"}">{c.verdict}'
        f"<td>{_number(c.value, c.interval)}<td>{say(c.required)}</tr>"
        for c in result.claims
    ]
    controls = [
        f"<tr><td>{say(c.control)}<td>{'yes' if c.null else 'NO'}<td>{_number(c.value, c.interval)}</tr>"
        for c in result.controls
    ]
    image = ""
    if plot:
        image = f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(plot).decode()}">'
    return _PAGE.format(
        title=say(result.paper),
        void='<p class="not"><b>Void: a control is not null.</b></p>' if result.void else "",
        claims="".join(claims),
        controls="".join(controls),
        plot=image,
        figures="".join(
            f"<tr><td>{say(name.replace('_', ' '))}<td>{say(_plain(value))}</tr>"
            for name, value in flatten(result.figures).items()
        ),
        rule=say(result.rule),
        not_tested=say(result.not_tested),
        seeds=", ".join(map(str, result.seeds)),
        seconds=result.seconds,
    )


def _plain(value: Any) -> str:
    """A figure, or several, for people."""
    return ", ".join(map(show_value, value)) if isinstance(value, list | tuple) else show_value(value)


def _number(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")
