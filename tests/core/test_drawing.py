"""The drawing of a lineage: every box and arrow where it belongs, whatever the graph."""

import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from danlu.core.drawing import draw
from danlu.core.lineage import Node

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


def graph(seed: int, size: int) -> list[Node]:
    """The results of a random run: each node is made of up to three earlier ones."""
    chance = random.Random(seed)
    nodes: list[Node] = []
    for number in range(size):
        sources = chance.sample(nodes, min(len(nodes), chance.randint(0, 3)))
        verb = "verb" if sources else None
        node = Node(f"run/n{number}", verb, f"{number:064x}", "as it was")
        node.inputs = {f"in{i}": source for i, source in enumerate(sources)}
        nodes.append(node)
    read = {id(source) for node in nodes for source in node.inputs.values()}
    return [node for node in nodes if id(node) not in read]


def quickstart() -> list[Node]:
    """The shape of the shipped recipe."""
    reads = {
        "chitchat": [],
        "data": ["chitchat"],
        "tokenizer": ["data"],
        "text-tokens": ["data", "tokenizer"],
        "chat-tokens": ["data", "tokenizer"],
        "pretrain": ["text-tokens"],
        "chat": ["chat-tokens", "pretrain"],
        "scores": ["pretrain", "data", "chat", "chat-tokens"],
    }
    nodes: dict[str, Node] = {}
    for name, sources in reads.items():
        made_of = {source: nodes[source] for source in sources}
        nodes[name] = Node(name, "verb" if sources else None, "", "as it was", inputs=made_of)
    return [nodes["scores"]]


def parse(svg: str) -> tuple[ElementTree.Element, dict[str, Box], list[list[tuple[float, float]]]]:
    """(root, {path: (left, top, right, bottom)}, arrows as many points on them)."""
    root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
    boxes = {}
    for group in root.iter(f"{SVG}g"):
        x, y = map(float, re.findall(r"-?[\d.]+", group.attrib["transform"]))
        rect = group.find(f"{SVG}rect")
        title = group.find(f"{SVG}title")
        assert rect is not None
        assert title is not None
        left, top = x + float(rect.attrib["x"]), y + float(rect.attrib["y"])
        size = float(rect.attrib["width"]), float(rect.attrib["height"])
        boxes[title.text or ""] = (left, top, left + size[0], top + size[1])
    arrows = [curve(path.attrib["d"]) for path in root.findall(f"{SVG}path")]
    return root, boxes, arrows


def curve(d: str) -> list[tuple[float, float]]:
    """Points along a path of cubic Bézier curves."""
    start, *pieces = re.findall(r"[MC][^MC]+", d)
    points = [tuple(map(float, start[1:].split()))]
    for piece in pieces:
        x1, y1, x2, y2, x3, y3 = map(float, piece[1:].split())
        (x0, y0) = points[-1]
        for step in range(1, 21):
            t = step / 20
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            x = sum(w * v for w, v in zip(weights, (x0, x1, x2, x3), strict=True))
            y = sum(w * v for w, v in zip(weights, (y0, y1, y2, y3), strict=True))
            points.append((x, y))
    return points


GRAPHS = [quickstart(), *(graph(seed, size) for seed in range(20) for size in (1, 4, 9, 16))]


@pytest.mark.parametrize("results", GRAPHS)
def test_boxes_keep_apart_and_arrows_join_the_right_ones(results: list[Node]) -> None:
    root, boxes, arrows = parse(draw(results))
    nodes = {node.path: node for result in results for node in result.walk()}
    assert boxes.keys() == nodes.keys()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for path, (left, top, right, bottom) in boxes.items():
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        for other, box in boxes.items():
            apart = left >= box[2] or box[0] >= right or top >= box[3] or box[1] >= bottom
            assert apart or other == path
    joined = []
    for arrow in arrows:
        (x0, y0), (x1, y1) = arrow[0], arrow[-1]
        ends = [
            (source, target)
            for source, a in boxes.items()
            for target, b in boxes.items()
            if abs(x0 - (a[0] + a[2]) / 2) <= 1 and abs(y0 - a[3]) <= 1
            if abs(x1 - (b[0] + b[2]) / 2) <= 1 and 0 <= b[1] - y1 <= 3
        ]
        assert len(ends) == 1
        joined += ends
        inside = [
            path
            for path, (left, top, right, bottom) in boxes.items()
            if any(left < x < right and top < y < bottom for x, y in arrow)
        ]
        assert inside == [], f"the arrow {ends[0]} runs through {inside}"
        assert all(0 <= x <= width for x, _ in arrow)
    wanted = [(source.path, node.path) for node in nodes.values() for source in node.inputs.values()]
    assert sorted(joined) == sorted(wanted)


def test_what_a_box_says() -> None:
    data = Node("outside/<raw> & more.jsonl", None, "ab" * 32, "data")
    made = Node("runs/x/a-very-long-name-of-a-stage", "data prepare", "cd" * 32, "changed", ["x was changed"])
    made.inputs = {"source": data}
    root, _, _ = parse(draw([made]))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert texts == ["<raw> & more.jsonl", "data", "ab" * 6, "a-very-long-name-of…", "data prepare", "cd" * 6]
    kinds = [group.attrib["class"] for group in root.iter(f"{SVG}g")]
    assert kinds == ["data", "changed"]
    assert root.attrib["role"] == "img"
    assert (
        root.attrib["aria-label"] == "a-very-long-name-of-a-stage is made of <raw> & more.jsonl"
    )  # for those who don't see it
    assert Path(data.path).name in root.attrib["aria-label"]
