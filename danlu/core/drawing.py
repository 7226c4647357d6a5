"""The lineage as a drawing in SVG: data at the top, results at the bottom, in the colours of the page."""

import itertools
from collections.abc import Sequence
from html import escape
from pathlib import Path

from danlu.core.lineage import Node

_COLUMN, _ROW, _WIDTH, _HEIGHT = 176, 100, 160, 56

Point = tuple[float, float]


def draw(results: Sequence[Node]) -> str:
    """One box for each artefact and an arrow from each input to what was made of it."""
    nodes = {node.path: node for result in results for node in result.walk()}
    edges = [(source.path, path) for path, node in nodes.items() for source in node.inputs.values()]
    rows = _rows(nodes, edges)
    chains = [[start, *_through(start, end, rows), end] for start, end in edges]
    places = _places(rows, chains)
    width = _COLUMN * (1 + max(x for x, _ in places.values()))
    height = _ROW * (1 + max(rows.values())) - (_ROW - _HEIGHT)
    arrows = "".join(_arrow([places[name] for name in chain]) for chain in chains)
    boxes = "".join(_box(node, places[path]) for path, node in nodes.items())
    return (
        f'<svg class="lineage" role="img" aria-label="{escape(_in_words(results), quote=True)}" '
        f'viewBox="0 -2 {width:.0f} {height + 4:.0f}" style="max-width:{width:.0f}px">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="currentColor"/></marker></defs>'
        f"{arrows}{boxes}</svg>"
    )


def _in_words(results: Sequence[Node]) -> str:
    """The drawing for those who don't see it."""
    made = [
        f"{Path(node.path).name} is made of {', '.join(Path(s.path).name for s in node.inputs.values())}"
        for result in results
        for node in result.walk()
        if node.inputs
    ]
    return "; ".join(dict.fromkeys(made)) or "no lineage"


def _rows(nodes: dict[str, Node], edges: list[tuple[str, str]]) -> dict[str, int]:
    """Row of each node: one below the lowest of its inputs. `nodes` come inputs first."""
    rows: dict[str, int] = {}
    for path in nodes:
        rows[path] = 1 + max((rows[start] for start, end in edges if end == path), default=-1)
    return rows


def _through(start: str, end: str, rows: dict[str, int]) -> list[str]:
    """Names of the waypoints that a long arrow passes, one in each row between its ends; put into `rows`."""
    names = [f"{start}→{end}@{row}" for row in range(rows[start] + 1, rows[end])]
    rows |= {name: rows[start] + 1 + number for number, name in enumerate(names)}
    return names


def _places(rows: dict[str, int], chains: Sequence[Sequence[str]]) -> dict[str, Point]:
    """(column, row) of all nodes and waypoints, so that arrows cross little and run straight.

    As Sugiyama, Tagawa and Toda (1981) do it: in each row the order is that of the neighbours' mean place;
    then each moves towards its neighbours as far as those beside it let it.
    """
    links: dict[str, list[tuple[str, float]]] = {name: [] for name in rows}
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            pull = 4.0 ** (("@" in upper) + ("@" in lower))  # long arrows want to be straight most
            links[upper].append((lower, pull))
            links[lower].append((upper, pull))
    layers = [[name for name in rows if rows[name] == row] for row in range(1 + max(rows.values()))]
    x = {name: float(number) for layer in layers for number, name in enumerate(layer)}
    for sweep in range(8):
        side = -1 if sweep % 2 == 0 else 1
        for layer in layers[::-side]:
            seen = {n: [x[o] for o, _ in links[n] if rows[o] == rows[n] + side] for n in layer}
            layer.sort(key=lambda n: sum(seen[n]) / len(seen[n]) if seen[n] else x[n])
            x |= {name: float(number) for number, name in enumerate(layer)}
    for _ in range(40):
        for layer in layers:
            pulls = {n: [(x[o], pull) for o, pull in links[n]] or [(x[n], 1e-3)] for n in layer}
            x |= _settle(layer, {name: _mean(pulls[name]) for name in layer})
    left = min(x.values())
    return {name: (x[name] - left, rows[name]) for name in rows}


def _mean(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(mean, weight) of (value, weight) pairs."""
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total, total


def _settle(layer: Sequence[str], wishes: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Places in this order that are nearest to the wishes (place, weight) and not too close to each other.

    With the room between them taken off, that is the regression on a rising sequence, by pooling neighbours.
    """
    offsets = [0.0]
    for one, other in itertools.pairwise(layer):
        offsets.append(offsets[-1] + (0.25, 0.65, 1.0)[("@" not in one) + ("@" not in other)])
    pools: list[tuple[float, float, int]] = []  # (place, weight, how many)
    for name, offset in zip(layer, offsets, strict=True):
        place, weight = wishes[name]
        pool = (place - offset, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            last = pools.pop()
            mean, weight = _mean([last[:2], pool[:2]])
            pool = (mean, weight, last[2] + pool[2])
        pools.append(pool)
    settled = [place for place, _, count in pools for _ in range(count)]
    return {name: place + offset for name, place, offset in zip(layer, settled, offsets, strict=True)}


def _centre(place: Point) -> Point:
    return (place[0] + 0.5) * _COLUMN, place[1] * _ROW + _HEIGHT / 2


def _arrow(places: Sequence[Point]) -> str:
    """From the lower edge of one box to the upper edge of another, straight where it passes boxes."""
    (x, y), *between, (last_x, last_y) = [_centre(place) for place in places]
    passed = [(wx, wy + half) for wx, wy in between for half in (-_HEIGHT / 2, _HEIGHT / 2)]
    points = [(x, y + _HEIGHT / 2), *passed, (last_x, last_y - _HEIGHT / 2 - 2)]
    line = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        line += f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"
    return f'<path class="edge" d="{line}" marker-end="url(#arrow)"/>'


def _box(node: Node, place: Point) -> str:
    x, y = _centre(place)
    kind = "data" if node.verb is None else "changed" if node.changed else "stage"
    name, verb = Path(node.path).name, node.verb or "data"
    first = -9 if node.sha256 else -3
    name = name if len(name) <= 20 else name[:19] + "…"
    return (
        f'<g class="{kind}" transform="translate({x:.0f} {y:.0f})"><title>{escape(node.path)}</title>'
        f'<rect x="{-_WIDTH / 2}" y="{-_HEIGHT / 2}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
        f'<text y="{first}" class="name">{escape(name)}</text><text y="{first + 16}">{escape(verb)}</text>'
        f'<text y="{first + 30}" class="hash">{node.sha256[:12]}</text></g>'
    )
