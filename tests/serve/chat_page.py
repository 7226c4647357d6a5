"""The chat page in a real browser, on a real server with a real small model, for the tests of this room."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from danlu.core.errors import UserError
from danlu.data.preferences import check_preference
from danlu.model.aliases import packaged

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}

CODE = """Here is *one* way:

```python
def double(x: int) -> int:
    \"\"\"Twice as much.\"\"\"
    return 2 * x  # a long comment that is much wider than a telephone, so that the code must scroll by itself
```

| name | value | another column | and one more column |
|------|-------|----------------|---------------------|
| `x`  | 21    | somethingverylongwithoutaspace | somethingevenlongerwithoutaspace |

1. first
2. second, see [the manual](https://example.org/manual)

> quoted"""


@dataclass
class Site:
    """The server, as the tests know it."""

    url: str
    preferences: Path

    def rows(self) -> list[dict[str, Any]]:
        """What the page's thumbs have written, each of it checked."""
        if not self.preferences.exists():
            return []
        return [check_preference(json.loads(line), "row") for line in self.preferences.open()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    try:
        packaged("smollm2")
    except UserError:
        pytest.skip("smollm2 is not installed")
    folder = tmp_path_factory.mktemp("site")
    preferences = folder / "preferences.jsonl"
    with serving("smollm2", "--preferences", str(preferences), folder=folder) as server:
        yield Site(server.url, preferences)


@dataclass
class Watched:
    """What a page did that it should not."""

    page: Any
    elsewhere: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    forgives: str = r"$^"
    """What it may say: a request that the test lets fail is said by the browser."""


@pytest.fixture
def open_page(site: Site, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page in a browser of its own; whatever it does wrong fails the test at its end."""
    opened: list[tuple[Any, Watched]] = []

    def open_one(
        *, storage: dict[str, Any] | None = None, before: Callable[[Any], None] | None = None, **options: Any
    ) -> Any:
        context = browser.new_context(
            **{"viewport": DESKTOP, "locale": "en-GB", "reduced_motion": "reduce", **options}
        )
        context.set_default_timeout(60_000)
        kept = {key: json.dumps(value) for key, value in (storage or {}).items()}
        kept.setdefault("danlu.settings", json.dumps({"first": {"max_tokens": 60}}))
        # Only at first: a reload finds what the page kept.
        context.add_init_script(
            f"""if (!localStorage.getItem("seeded")) {{
                const kept = {json.dumps(kept)};
                for (const key of Object.keys(kept)) localStorage.setItem(key, kept[key]);
                localStorage.setItem("seeded", "yes");
            }}"""
        )
        page = context.new_page()
        watched = Watched(page)
        page.watched = watched
        page.on(
            "request",
            lambda asked: (
                asked.url.startswith((site.url, f"blob:{site.url}")) or watched.elsewhere.append(asked.url)
            ),
        )
        page.on("console", lambda said: said.type == "error" and watched.said.append(said.text))
        page.on("pageerror", lambda error: watched.said.append(str(error)))
        page.on("dialog", lambda dialog: (watched.dialogs.append(dialog.message), dialog.dismiss()))
        opened.append((context, watched))
        if before:
            before(page)
        page.goto(site.url)
        return page

    yield open_one
    for context, watched in opened:
        assert watched.elsewhere == []
        assert watched.dialogs == []
        assert [text for text in watched.said if not re.search(watched.forgives, text)] == []
        context.close()


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


# What is done again and again


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_for_answers(page: Any, n: int = 1) -> Any:
    """All answers of the branch, once there are `n` and all are whole."""
    page.wait_for_function(
        "n => document.querySelectorAll('.answer[aria-busy=false]').length === n"
        " && !document.querySelector('.answer[aria-busy=true]')",
        arg=n,
    )
    return page.locator(".answer")


def said(answer: Any) -> str:
    return str(answer.locator(".formatted").text_content())


def stream(*pieces: str, finish: str = "stop") -> str:
    """An answer of the server as it streams, each piece one token."""
    base = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "smollm2"}
    chunks: list[dict[str, Any]] = []
    for piece in pieces:
        one = {"token": piece, "logprob": math.log(0.5), "bytes": list(piece.encode())}
        top = [one, *({"token": f"other{n}", "logprob": -3.0 - n, "bytes": None} for n in range(4))]
        logprobs = {"content": [{**one, "top_logprobs": top}]}
        chunks.append({"index": 0, "delta": {"content": piece}, "logprobs": logprobs})
    chunks.append({"index": 0, "delta": {}, "finish_reason": finish})
    events = [json.dumps({**base, "choices": [chunk]}) for chunk in chunks]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


@contextmanager
def answering(page: Any, *bodies: str) -> Iterator[list[dict[str, Any]]]:
    """The server's chat answers are these, in turn; yields what was asked."""
    asked: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json)
        body = bodies[(len(asked) - 1) % len(bodies)]
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    yield asked
    page.unroute("**/v1/chat/completions", answer)


def failing(page: Any, pattern: str, status: int, message: str) -> Callable[[Any], None]:
    def fail(route: Any) -> None:
        route.fulfill(status=status, json={"error": {"message": message}})

    page.watched.forgives = r"Failed to load resource"
    page.route(pattern, fail)
    return fail


def conversation(*texts: str, **more: Any) -> dict[str, Any]:
    """What the page keeps of user, assistant, user, …"""
    nodes: dict[str, Any] = {}
    ids = ["root", *(f"n{number}" for number in range(len(texts)))]
    for number, name in enumerate(ids):
        below = ids[number + 1 : number + 2]
        role = "root" if number == 0 else ("user", "assistant")[(number - 1) % 2]
        nodes[name] = {
            "id": name,
            "parent": ids[number - 1] if number else None,
            "role": role,
            "content": texts[number - 1] if number else "",
            "children": below,
            "shown": below[0] if below else None,
        }
        if role == "assistant":
            nodes[name] |= {"model": "smollm2", "reason": "stop"}
    kept = {"version": 1, "id": "c1", "title": "", "system": "", "made": 1, "changed": 1, "nodes": nodes}
    return {**kept, **more}


def kept_answers(page: Any) -> list[str]:
    """The answers of the only conversation, as the browser keeps them: in Markdown."""
    kept = page.evaluate(
        """JSON.parse(Object.entries(localStorage).find(([key]) => key.startsWith("danlu.chat."))[1])"""
    )
    return [node["content"] for node in kept["nodes"].values() if node["role"] == "assistant"]


def sticks_out(page: Any) -> list[str]:
    """What is wider than the window, where it does not scroll by itself."""
    return page.evaluate(
        """() => {
        const wide = document.documentElement.scrollWidth > innerWidth ? ["the page"] : [];
        const outside = [...document.querySelectorAll("body *")].filter(e => {
            const box = e.getBoundingClientRect();
            return box.width && (box.right > innerWidth + 1 || box.left < -1)
                && !e.closest(".unseen, .skip, .wide, pre, #tip");
        });
        return [...wide, ...outside.map(e => e.outerHTML.slice(0, 100))];
        }"""
    )
