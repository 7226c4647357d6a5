"""The chat page in a real browser, on a real server with a real small model."""

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
from danlu.data.conversations import check_messages, require_reply
from danlu.data.preferences import check_preference
from danlu.model.aliases import packaged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

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

ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<svg onload=alert(3)><circle/></svg>",
    "[link](javascript:alert(4))",
    "![picture](https://evil.example/5.png)",
    "<iframe srcdoc='<script>parent.hacked = 6</script>'></iframe>",
    '```"><script>alert(7)</script>\ncode</code></pre><script>window.hacked = 7</script>\n```',
    "<a href=\"data:text/html,<script>alert(8)</script>\" onclick='alert(8)'>click</a>",
    '<style>@import "https://evil.example/9.css"; body { display: none }</style>',
    '<form action="https://evil.example/10"><button formaction="javascript:alert(10)">go</button></form>',
]


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


# Talking


def test_an_answer_streams_and_is_measured(page: Any) -> None:
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Tell me about the sea.")
    body = asked.value.post_data_json
    assert body["messages"] == [{"role": "user", "content": "Tell me about the sea."}]
    assert body["stream"] is True
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.95, 60)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    # Part of it is there before the rest.
    page.wait_for_function(
        "() => document.querySelector('.answer[aria-busy=true] .formatted')?.textContent.length > 3"
    )
    answer = wait_for_answers(page).first
    assert len(said(answer)) > 20
    stats = answer.locator(".stats").inner_text()
    assert re.search(
        r"\b\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · (ended by itself|cut: )", stats
    )
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('smollm2 has answered: ')"
    )


def test_escape_and_the_button_stop_an_answer(open_page: Callable[..., Any]) -> None:
    page = open_page(storage={"danlu.settings": {"first": {"max_tokens": 1500, "temperature": 1.2}}})
    stops: list[Callable[[], None]] = [
        lambda: page.keyboard.press("Escape"),
        lambda: page.get_by_role("button", name="Stop").click(),
    ]
    for number, stop in enumerate(stops, 1):
        send(page, "Write a story of many chapters, as long as you can.")
        page.wait_for_function(
            "() => document.querySelector('.answer[aria-busy=true] .formatted')?.textContent.length > 10"
        )
        stop()
        answer = wait_for_answers(page, number).nth(number - 1)
        assert "stopped by you" in answer.locator(".stats").inner_text()
        assert int(re.search(r"(\d+) tokens", answer.locator(".stats").inner_text())[1]) < 1500  # type: ignore[index]
        page.get_by_role("button", name="Send").wait_for()
    # What it had said goes on being part of the conversation.
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Go on.")
    roles = [message["role"] for message in asked.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    page.keyboard.press("Escape")
    wait_for_answers(page, 3)


def test_another_answer_is_another_version(page: Any) -> None:
    with answering(page, stream("first"), stream("second")) as asked:
        send(page, "Hi")
        wait_for_answers(page)
        page.get_by_role("button", name="Answer again").click()
        page.locator(".answer", has_text="second").wait_for()
    assert asked[0]["messages"] == asked[1]["messages"]
    answer = page.locator(".answer")
    assert "version 2 of 2" in answer.inner_text()
    answer.get_by_role("button", name="Previous version").click()
    assert said(page.locator(".answer")) == "first"
    # The keyboard stays where it was, on the button that can still be used.
    assert page.evaluate("document.activeElement.ariaLabel") == "Next version"
    page.keyboard.press("Enter")
    assert said(page.locator(".answer")) == "second"
    assert page.locator(".answer").count() == 1


def test_an_edited_message_is_another_branch(page: Any) -> None:
    with answering(page, *(stream(f"answer {number}") for number in range(1, 5))) as asked:
        send(page, "One")
        wait_for_answers(page, 1)
        send(page, "Two")
        wait_for_answers(page, 2)
        page.get_by_role("button", name="Edit", exact=True).first.click()
        editor = page.get_by_label("Edit the message")
        assert editor.input_value() == "One"
        editor.fill("Uno")
        editor.press("Enter")
        page.locator(".answer", has_text="answer 3").wait_for()
    assert asked[2]["messages"] == [{"role": "user", "content": "Uno"}]
    assert page.locator("article").count() == 2
    page.locator(".question").get_by_role("button", name="Previous version").click()
    assert page.locator(".said").all_inner_texts() == ["One", "Two"]
    assert [said(one) for one in page.locator(".answer").all()] == ["answer 1", "answer 2"]
    # Escape leaves the message as it was, and stops nothing else.
    page.get_by_role("button", name="Edit", exact=True).first.click()
    page.get_by_label("Edit the message").fill("Eins")
    page.keyboard.press("Escape")
    assert page.locator(".said").all_inner_texts() == ["One", "Two"]
    page.reload()
    assert page.locator(".said").all_inner_texts() == ["One", "Two"]
    assert "version 1 of 2" in page.locator(".question").first.inner_text()


def test_markdown_and_code(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    pieces = re.findall(r"(?s).{1,9}", CODE)
    with answering(page, stream(*pieces)):
        send(page, "Code, please")
        answer = wait_for_answers(page).first
    answer.locator("blockquote").wait_for()
    assert answer.locator("em").inner_text() == "one"
    assert answer.locator(".code .k").first.inner_text() == "def"
    assert answer.locator(".code .head span").first.inner_text() == "python"
    assert answer.locator("table td").first.inner_text() == "x"
    assert answer.locator("a").get_attribute("target") == "_blank"
    answer.get_by_role("button", name="Copy code").click()
    page.wait_for_function("() => document.getElementById('status').textContent === 'Copied'")
    code = page.evaluate("navigator.clipboard.readText()")
    assert code.startswith("def double(x: int) -> int:\n")
    assert code.endswith("by itself")
    answer.get_by_role("button", name="Copy", exact=True).click()
    page.wait_for_function("async text => await navigator.clipboard.readText() === text", arg=CODE)


def test_settings_are_sent_and_wrong_ones_are_not(page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    values = {
        "Temperature": "0.2",
        "Top p": "0.5",
        "Top k": "20",
        "Min p": "0.05",
        "Repetition penalty": "1.1",
    }
    values |= {"Max tokens": "7", "Seed": "11", "Stop": "END\nTHE END", "System prompt": "Be brief."}
    for label, value in values.items():
        one = page.get_by_role("dialog").get_by_label(label, exact=True)
        one.fill(value)
        described = one.get_attribute("aria-describedby").split()[-1]
        assert len(page.locator(f"#{described}").inner_text()) > 30
    page.get_by_label("Temperature").fill("3")
    assert page.get_by_label("Temperature").get_attribute("aria-invalid") == "true"
    assert page.get_by_text("A number from 0 to 2.").is_visible()
    page.keyboard.press("Escape")
    with answering(page, stream("ok")) as asked:
        send(page, "Hi")
        wait_for_answers(page)
    sent = {
        "temperature": 0.2, "top_p": 0.5, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
        "max_tokens": 7, "seed": 11, "stop": ["END", "THE END"],
    }  # fmt: skip
    assert {key: asked[0][key] for key in sent} == sent
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.locator("#system-text").inner_text() == "Be brief."
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset to defaults").click()
    assert page.get_by_label("Temperature").input_value() == "0.7"
    page.get_by_role("button", name="Close").click()
    with page.expect_response("**/v1/chat/completions") as answered:
        page.get_by_role("button", name="Answer again").click()
    assert answered.value.status == 200  # the real server knows all that is sent
    body = answered.value.request.post_data_json
    assert (body["temperature"], body["top_p"]) == (0.7, 0.95)
    assert not {"top_k", "min_p", "seed", "stop", "max_tokens"} & body.keys()
    page.keyboard.press("Escape")
    wait_for_answers(page, 1)


def test_the_server_takes_every_setting(open_page: Callable[..., Any]) -> None:
    first = {"temperature": 0, "top_p": 0.5, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    first |= {"max_tokens": 12, "seed": 11, "stop": ["\u00a7"]}
    page = open_page(storage={"danlu.settings": {"first": first}})
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Count to a hundred.")
    assert first.items() <= asked.value.post_data_json.items()
    stats = wait_for_answers(page).first.locator(".stats").inner_text()
    assert "cut: its length limit was reached" in stats
    assert stats.startswith("12 tokens")


# Tokens


def test_tokens_show_their_alternatives(page: Any) -> None:
    bodies: list[str] = []

    def pass_on(route: Any) -> None:
        """A browser doesn't keep a stream's body for long."""
        answered = route.fetch()
        bodies.append(answered.text())
        route.fulfill(response=answered)

    page.route("**/v1/chat/completions", pass_on)
    send(page, "What is the capital of France?")
    answer = wait_for_answers(page).first
    events = [line[6:] for line in bodies[0].split("\n") if line.startswith("data: {")]
    tokens = [
        token
        for event in events
        for choice in json.loads(event)["choices"]
        for token in (choice.get("logprobs") or {}).get("content", [])
    ]
    answer.get_by_role("button", name="Tokens").click()
    options = answer.get_by_role("option")
    assert options.count() == len(tokens) > 2
    shown = "".join(options.all_text_contents()).replace("↵\n", "\n")
    assert shown == "".join(token["token"] for token in tokens)
    tip = page.get_by_role("tooltip")

    def told(number: int) -> None:
        token = tokens[number]
        rows = tip.locator(".row").all_inner_texts()
        assert len(rows) == 6  # itself, and five that were considered
        for row, one in zip(rows, [token, *token["top_logprobs"]], strict=True):
            name = one["token"].replace("\n", "↵").replace(" ", "␣")
            percent = 100 * math.exp(one["logprob"])
            assert row.startswith(name)
            if percent > 0.1:
                found = re.search(r"([\d.]+) %", row)
                assert found is not None
                assert abs(float(found[1]) - percent) < 0.51

    options.nth(1).hover()
    told(1)
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    # One stop of the Tab key, arrows within.
    answer.get_by_role("button", name="Tokens").focus()
    for _ in range(30):
        if page.evaluate("document.activeElement.role") == "option":
            break
        page.keyboard.press("Shift+Tab")
    told(0)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    told(2)
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert "%" in options.nth(2).get_attribute("aria-label")
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    # The less likely, the stronger: the classes are in the order of probability.
    classes = [int(one.get_attribute("class")[1]) for one in options.all()]
    by_chance = sorted(zip(tokens, classes, strict=True), key=lambda pair: -pair[0]["logprob"])
    assert [one for _, one in by_chance] == sorted(classes)
    answer.get_by_role("button", name="Tokens").click()
    assert answer.get_by_role("option").count() == 0
    assert answer.locator(".formatted").is_visible()


# Judging


def test_thumbs_write_judged_rows(page: Any, site: Site) -> None:
    before = len(site.rows())
    send(page, "Say something kind.")
    answer = wait_for_answers(page).first
    content = kept_answers(page)[0]
    up, down = (answer.get_by_role("button", name=name) for name in ("Good answer", "Bad answer"))
    up.click()
    page.wait_for_function(
        "() => document.querySelector('.kept').textContent === 'Kept in preferences.jsonl.'"
    )
    assert (up.get_attribute("aria-pressed"), down.get_attribute("aria-pressed")) == ("true", "false")
    prompt = [{"role": "user", "content": "Say something kind."}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": content}], "label": True}
    assert site.rows()[before:] == [{**row, "model": "smollm2"}]
    up.click()  # it is kept already
    down.click()
    page.wait_for_function("() => document.querySelector('.kept').textContent.includes('earlier')")
    assert (up.get_attribute("aria-pressed"), down.get_attribute("aria-pressed")) == ("false", "true")
    assert [one["label"] for one in site.rows()[before:]] == [True, False]
    page.reload()
    assert page.get_by_role("button", name="Bad answer").get_attribute("aria-pressed") == "true"


def test_a_judgement_that_is_not_kept_is_told(page: Any, site: Site) -> None:
    before = site.rows()
    with answering(page, stream("Hello")):
        send(page, "Hi")
        answer = wait_for_answers(page).first
    failing(page, "**/page/preference", 500, "No space left on device")
    answer.get_by_role("button", name="Good answer").click()
    kept = answer.locator(".kept.bad")
    kept.wait_for()
    assert kept.inner_text() == "The judgement was not kept. The server failed. No space left on device"
    assert answer.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "false"
    assert site.rows() == before


def test_two_models_side_by_side(open_page: Callable[..., Any], site: Site) -> None:
    page = open_page(
        storage={
            "danlu.settings": {
                "own": True,
                "first": {"max_tokens": 30, "temperature": 0},
                "other": {"max_tokens": 30, "temperature": 1.8, "top_p": 1},
            }
        }
    )
    before = len(site.rows())
    page.get_by_label("Compare with").select_option("smollm2")
    asked: list[dict[str, Any]] = []
    page.on("request", lambda one: "completions" in one.url and asked.append(one.post_data_json))
    send(page, "Write a line about rain.")
    answers = wait_for_answers(page, 2)
    left, right = (one.bounding_box() for one in answers.all())
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert [one["temperature"] for one in asked] == [0, 1.8]
    assert asked[0]["messages"] == asked[1]["messages"]
    first, second = kept_answers(page)
    assert first != second
    answers.nth(1).get_by_role("button", name="This one is better").click()
    page.wait_for_function("() => document.querySelectorAll('.kept')[1].textContent.startsWith('Kept in')")
    assert site.rows()[before:] == [
        {
            "prompt": [{"role": "user", "content": "Write a line about rain."}],
            "chosen": [{"role": "assistant", "content": second}],
            "rejected": [{"role": "assistant", "content": first}],
        }
    ]
    pressed = [one.get_by_role("button", name="This one is better") for one in answers.all()]
    assert [one.get_attribute("aria-pressed") for one in pressed] == ["false", "true"]
    # The conversation goes on with it.
    page.get_by_label("Compare with").select_option("")
    with page.expect_request("**/v1/chat/completions") as next_asked:
        send(page, "And snow?")
    assert next_asked.value.post_data_json["messages"][1]["content"] == second
    wait_for_answers(page, 3)


# Conversations


def test_conversations_are_kept_named_and_deleted(page: Any) -> None:
    with answering(page, stream("Hello.")):
        send(page, "The first one")
        wait_for_answers(page)
        page.get_by_role("button", name="New conversation").click()
        assert page.locator("article").count() == 0
        send(page, "The second one")
        wait_for_answers(page)
    entries = page.locator("#list .open")
    assert entries.all_inner_texts() == ["The second one", "The first one"]
    page.reload()
    assert page.get_by_role("heading", level=1).inner_text() == "The second one"
    entries.nth(1).click()
    assert page.locator(".said").all_inner_texts() == ["The first one"]
    page.locator(".answer em, .answer p", has_text="Hello.").wait_for()
    page.get_by_role("button", name="Rename “The first one”").click()
    page.get_by_label("Name", exact=True).fill("Renamed")
    page.keyboard.press("Enter")
    page.locator("h1", has_text="Renamed").wait_for()
    page.get_by_role("button", name="Delete “Renamed”").click()
    page.keyboard.press("Escape")
    assert entries.count() == 2
    page.get_by_role("button", name="Delete “Renamed”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('#list .open').length === 1")
    assert entries.all_inner_texts() == ["The second one"]
    assert page.locator("article").count() == 0
    page.reload()
    assert entries.all_inner_texts() == ["The second one"]


def test_leaving_the_page_keeps_what_was_said(open_page: Callable[..., Any]) -> None:
    page = open_page(storage={"danlu.settings": {"first": {"max_tokens": 1500, "temperature": 1.2}}})
    send(page, "Write a story of many chapters, as long as you can.")
    page.wait_for_function(
        "() => document.querySelector('.answer[aria-busy=true] .formatted')?.textContent.length > 40"
    )
    page.reload()
    answer = wait_for_answers(page).first
    assert len(said(answer)) > 40
    assert "interrupted" in answer.locator(".stats").inner_text()
    assert answer.locator(".failed").is_hidden()
    assert answer.get_by_role("button", name="Tokens").count() == 0  # those are not kept
    # The server has noticed: it has nothing left to do.
    page.wait_for_function(
        "async () => /^danlu_answers_pending 0/m.test(await (await fetch('/metrics')).text())"
    )


def test_another_tab_sees_what_changes(page: Any, site: Site) -> None:
    other = page.context.new_page()
    other.goto(site.url)
    with answering(page, stream("Hello.")):
        send(page, "From one tab")
        wait_for_answers(page)
    other.locator("#list .open", has_text="From one tab").wait_for()
    other.get_by_role("button", name="Rename").click()
    other.get_by_label("Name", exact=True).fill("Named in the other")
    other.keyboard.press("Enter")
    page.locator("h1", has_text="Named in the other").wait_for()


BROKEN = [
    "c.version = 2", "c.nodes = null", "delete c.nodes.root", "c.title = 7", "c.made = 'now'",
    "n.role = 'system'", "n.content = null", "n.children = ['n9']", "n.shown = null", "n.parent = 'n9'",
    "n.children = ['n0']; n.shown = 'n0'", "n.children = ['n1', 'n1']", "c.nodes.n1.id = 'other'",
    "c.nodes.stray = {...n, id: 'stray', children: [], shown: null}", "n.stats = {tokens: 'x'}",
    "n.model = 5",
]  # fmt: skip


def test_what_is_no_conversation_is_not_taken_for_one(page: Any) -> None:
    kept = conversation("Hi", "Hello", "Bye")
    table = ", ".join(f"{json.dumps(change)}: (c, n) => {{ {change} }}" for change in BROKEN)
    check = f"""async ([kept, change]) => {{
        const changes = {{"": () => {{}}, {table}}};
        const tree = await import("/static/tree.js");
        const c = structuredClone(kept);
        changes[change](c, c.nodes.n0);
        return tree.isConversation(c);
    }}"""
    assert page.evaluate(check, [kept, ""]) is True
    for change in BROKEN:
        assert page.evaluate(check, [kept, change]) is False, change


def test_export_is_ready_for_fine_tuning(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="All", exact=True).click()
    assert page.get_by_text("There is nothing to export").is_visible()
    bodies = [stream("one"), stream("two", " ", "lines\n", "„Ü“ 你好"), stream("three")]
    with answering(page, *bodies):
        send(page, "Hi")
        wait_for_answers(page)
        page.get_by_role("button", name="Answer again").click()
        page.locator(".answer", has_text="two").wait_for()
        page.get_by_role("button", name="New conversation").click()
        page.get_by_role("button", name="Settings").click()
        page.locator("#system").fill("Be kind.")
        page.keyboard.press("Escape")
        send(page, "Again")
        wait_for_answers(page)
    expected = [
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Again"},
            {"role": "assistant", "content": "three"},
        ],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "two lines\n„Ü“ 你好"},
        ],
    ]
    for name, wanted in (("This one", expected[:1]), ("All", expected)):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        assert download.value.suggested_filename == "conversations.jsonl"
        download.value.save_as(tmp_path / "conversations.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "conversations.jsonl").open()]
        found = [check_messages(row["messages"], "row") for row in rows]
        for messages in found:
            require_reply(messages, "row")
        assert sorted(found, key=len) == sorted(wanted, key=len)


def test_what_cannot_be_read_or_kept_is_told(open_page: Callable[..., Any]) -> None:
    good = conversation("Hi", "Hello")
    loop = conversation("Hi", "Hello", id="c2")
    loop["nodes"]["n1"] |= {"children": ["n0"], "shown": "n0"}
    page = open_page(storage={"danlu.chat.c1": good, "danlu.chat.c2": loop, "danlu.chat.c3": "nonsense"})
    assert page.get_by_text("2 stored conversations can't be read.").is_visible()
    assert page.locator("#list .open").all_inner_texts() == ["Hi"]
    assert page.evaluate("localStorage.getItem('danlu.chat.c3')") == '"nonsense"'
    page.locator(".notice").get_by_role("button", name="Delete").click()
    assert page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('danlu.chat'))") == [
        "danlu.chat.c1"
    ]
    page.evaluate(
        """() => {
        // As full as it gets: a browser keeps about five million characters.
        for (let size = 4_000_000; size >= 1; size = Math.floor(size / 2))
            try {
                for (let n = 0; ; n++) localStorage.setItem(`fill${size}-${n}`, "x".repeat(size));
            } catch {}
        }"""
    )
    with answering(page, stream("Hello again, at length. " * 20)):
        send(page, "Hi again")
        wait_for_answers(page, 2)
    page.get_by_text("The browser's storage is full: “Hi” is not kept.").wait_for()
    assert "Hello again" in said(page.locator(".answer").nth(1))


# When it fails


def test_failures_are_told_and_can_be_tried_again(page: Any) -> None:
    cases: list[tuple[int, str]] = [
        (429, "The server has too much to do just now. 256 answers are unfinished"),
        (503, "The server is shutting down, or not ready. 256 answers are unfinished"),
        (400, "The server refused the request. 256 answers are unfinished"),
    ]
    for status, text in cases:
        fail = failing(page, "**/v1/chat/completions", status, "256 answers are unfinished")
        page.get_by_role("button", name="New conversation").click()
        send(page, "Hi")
        page.locator(".failed", has_text=text).wait_for()
        page.unroute("**/v1/chat/completions", fail)
    page.context.set_offline(True)
    page.get_by_role("button", name="Try again").click()
    page.locator(".failed", has_text="The server can't be reached.").wait_for()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    wait_for_answers(page)
    page.wait_for_function("() => document.querySelector('.answer .formatted').textContent.length > 3")
    assert page.locator(".failed:visible").count() == 0
    assert page.get_by_role("button", name="Previous version").count() == 0  # it took the failed one's place
    with answering(page, stream("half an").replace("data: [DONE]\n\n", "")):
        page.get_by_role("button", name="Answer again").click()
        page.locator(".failed", has_text="The connection ended before the answer was whole.").wait_for()
    assert said(page.locator(".answer")) == "half an"


def test_two_messages_in_a_row_are_never_sent(page: Any) -> None:
    fail = failing(page, "**/v1/chat/completions", 500, "no")
    send(page, "Lost")
    page.locator(".failed", has_text="The server failed.").wait_for()
    page.unroute("**/v1/chat/completions", fail)
    with answering(page, stream("ok")) as asked:
        send(page, "Asked otherwise")
        page.locator(".answer", has_text="ok").wait_for()
    assert asked[0]["messages"] == [{"role": "user", "content": "Asked otherwise"}]


def test_a_key_is_asked_for(open_page: Callable[..., Any]) -> None:
    def guard(page: Any) -> None:
        def check(route: Any) -> None:
            if route.request.headers.get("authorization") == "Bearer secret":
                route.continue_()
            else:
                route.fulfill(status=401, json={"error": {"message": "wrong API key"}})

        page.route(re.compile("/(v1|page)/"), check)
        page.watched.forgives = "Failed to load resource.*401"

    kept = {"danlu.chat.c1": conversation("Hi", "*Hello*")}
    page = open_page(before=guard, storage=kept)
    dialog = page.get_by_role("dialog", name="API key")
    dialog.wait_for()
    assert page.get_by_role("dialog").count() == 1
    page.get_by_label("API key", exact=True).last.fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("That key was not accepted.").wait_for()
    page.get_by_label("API key", exact=True).last.fill("secret")
    page.keyboard.press("Enter")
    page.locator("#model option[value=smollm2]").wait_for(state="attached")
    page.locator(".answer em", has_text="Hello").wait_for()
    page.reload()
    page.locator(".answer em", has_text="Hello").wait_for()
    assert dialog.count() == 0
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_models_that_do_not_chat_cannot_be_chosen(open_page: Callable[..., Any]) -> None:
    cards = [
        {"id": "plain", "chats": False, "max_model_len": 256},
        {"id": "talks", "chats": True, "max_model_len": 256},
        {"id": "tuned", "chats": True, "max_model_len": 256, "parent": "talks"},
    ]

    def listed(page: Any) -> None:
        page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards}))

    page = open_page(before=listed)
    options = page.get_by_label("Model", exact=True).locator("option")
    options.nth(2).wait_for(state="attached")
    assert options.all_inner_texts() == ["plain (only completes texts)", "talks", "tuned (adapter of talks)"]
    assert options.first.is_disabled()
    assert page.get_by_label("Model", exact=True).input_value() == "talks"
    assert page.get_by_text("Models without a chat template only complete texts").is_visible()


# Safety


def test_attacks_are_shown_and_not_run(open_page: Callable[..., Any]) -> None:
    kept = conversation(*(text for attack in ATTACKS for text in (attack, attack)), title=ATTACKS[1])
    page = open_page(storage={"danlu.chat.c1": kept})
    whole = "\n\n".join(ATTACKS)
    with answering(page, stream(*whole)):
        send(page, whole)
        wait_for_answers(page, len(ATTACKS) + 1)
    page.wait_for_function("() => !document.querySelector('.formatted.plain')")
    page.get_by_role("button", name="Tokens").last.click()
    page.get_by_role("option").first.focus()
    page.get_by_role("button", name="Tokens").last.click()
    assert page.locator(".said").all_inner_texts()[: len(ATTACKS)] == ATTACKS
    for attack, answer in zip(ATTACKS, page.locator(".answer").all(), strict=False):
        text = said(answer)
        for part in re.findall(r"hacked = \d|alert\(\d\)|evil\.example|[<>]script", attack):
            # Of a picture only its description is shown, and where it is: behind a link.
            links = " ".join(link.get_attribute("href") or "" for link in answer.locator("a").all())
            assert part in text + links
    assert page.locator("h1").inner_text() == ATTACKS[1]
    found = page.evaluate(
        """() => {
        const inside = [...document.querySelectorAll("#thread *, #list *, h1 *")];
        const bad = "script img iframe style form object embed link meta base circle".split(" ");
        const goes = ["href", "src", "action", "formaction"];
        return {
            hacked: typeof window.hacked,
            scripts: [...document.scripts].map(one => one.getAttribute("src")),
            elements: inside.map(e => e.localName).filter(name => bad.includes(name)),
            handlers: inside.flatMap(e => e.getAttributeNames())
                .filter(name => name.startsWith("on") || name === "style"),
            links: [...document.querySelectorAll("*")].flatMap(e => goes.map(name => e.getAttribute(name)))
                .filter(value => value !== null && !/^(https?:|mailto:|\\/|#)/.test(value)),
            shown: getComputedStyle(document.body).display,
        };
        }"""
    )
    assert found == {
        "hacked": "undefined",
        "scripts": ["/shared/theme.js", "/static/main.js"],
        "elements": [],
        "handlers": [],
        "links": [],
        "shown": "grid",
    }


# For everybody


STATES: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": PHONE},
    "phone, dark, Chinese": {"viewport": PHONE, "color_scheme": "dark", "locale": "zh-CN"},
    "Chinese": {"locale": "zh-CN"},
}


def assert_accessible(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    severe = [
        (one["id"], node["html"][:200], node["failureSummary"][:300])
        for one in violations
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
    assert severe == []


@pytest.mark.parametrize("state", STATES)
def test_everybody_can_use_it(open_page: Callable[..., Any], state: str) -> None:
    """axe-core finds nothing severe, and nothing sticks out, whatever is open."""
    is_phone = "viewport" in STATES[state]
    settings = {"second": "smollm2", "own": True, "first": {"max_tokens": 60}}
    page = open_page(storage={"danlu.settings": settings}, **STATES[state])
    page.wait_for_function("() => document.getElementById('second').value === 'smollm2'")

    def check() -> None:
        assert sticks_out(page) == []
        assert_accessible(page)

    check()
    with answering(page, stream(*re.findall(r"(?s).{1,9}", CODE)), stream("a" * 300, " and so on")):
        page.locator("#message").fill("Code, please, and a-word-that-is-long-" + "x" * 200)
        page.keyboard.press("Enter")
        wait_for_answers(page, 2)
        page.locator(".answer blockquote").wait_for()
    check()
    page.get_by_role("button", name=re.compile("^(Tokens|词元)$")).first.click()
    page.locator("[role=option]").nth(3).focus()
    assert page.locator("#tip").is_visible()
    check()
    page.locator("#open-settings").click()
    check()
    page.keyboard.press("Escape")
    page.locator(".question .actions button:visible").last.click()
    check()
    page.keyboard.press("Escape")
    failing(page, "**/v1/chat/completions", 429, "busy")
    page.locator("#message").fill("Hi")
    page.keyboard.press("Enter")
    page.locator(".failed:visible").first.wait_for()
    check()
    if is_phone:
        page.locator("#open-nav").click()
        assert page.locator("#nav").is_visible()
        check()
        page.keyboard.press("Escape")
        assert not page.locator("#nav").is_visible()
        assert page.evaluate("document.activeElement.id") == "open-nav"


def test_dark_and_light_are_remembered(open_page: Callable[..., Any]) -> None:
    def paper(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page = open_page(color_scheme="dark")
    assert paper(page) == "rgb(20, 23, 28)"
    page.get_by_role("button", name="Light colours").click()
    assert paper(page) == "rgb(255, 255, 255)"
    page.reload()
    assert paper(page) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="Dark colours").click()
    assert paper(page) == "rgb(20, 23, 28)"
    assert paper(open_page(color_scheme="light")) == "rgb(255, 255, 255)"


def test_chinese_throughout(open_page: Callable[..., Any]) -> None:
    page = open_page(locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    texts = page.evaluate("import('/static/texts.js').then(module => module.texts)")
    assert texts["en"].keys() == texts["zh"].keys()
    same = {name for name, text in texts["en"].items() if texts["zh"][name] == text}
    assert same == {"top_p", "top_k", "min_p"}
    for name, text in texts["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", texts["zh"][name])), name
    page.get_by_label("消息", exact=True).fill("你好")
    page.keyboard.press("Enter")
    wait_for_answers(page)
    page.get_by_role("button", name="设置").click()
    # Nothing but names is left in English.
    left = page.evaluate(
        """() => {
        const found = [];
        for (const e of document.querySelectorAll("body *")) {
            if (e.closest(".formatted, #language, .brand, script")) continue;
            const own = [...e.childNodes].filter(n => n.nodeType === Node.TEXT_NODE).map(n => n.data);
            const told = ["aria-label", "title", "placeholder"].map(name => e.getAttribute(name) ?? "");
            found.push(...own, ...told);
        }
        return found.filter(text => /[a-z]{2}/i.test(text) && !/[\\u4e00-\\u9fff]/.test(text));
        }"""
    )
    assert set(left) <= {"smollm2", "Top p", "Top k", "Min p"}
    page.get_by_role("button", name="关闭").click()
    page.get_by_role("button", name="English").click()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("button", name="Answer again").is_visible()
    page.reload()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("button", name="Settings").is_visible()


def test_the_keyboard_is_enough(page: Any, site: Site) -> None:
    before = len(site.rows())
    page.locator("#model option").first.wait_for(state="attached")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message field"
    assert page.get_by_text("Skip to the message field").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    wait_for_answers(page)
    assert page.locator(".said").inner_text() == "Two\nlines"
    assert page.evaluate("document.activeElement.id") == "message"

    def go_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Shift+Tab")
            focused = page.evaluate(
                "[document.activeElement.ariaLabel ?? document.activeElement.textContent,"
                " getComputedStyle(document.activeElement).outlineStyle, document.activeElement.id]"
            )
            # It is seen where the keyboard is; around the message, it is the frame that shows it.
            assert focused[1] != "none" or focused[2] == "message"
            if focused[0] == name:
                return
        raise AssertionError(f"the Tab key does not come to {name}")

    go_to("Good answer")
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelector('.kept').textContent.startsWith('Kept in')")
    assert len(site.rows()) == before + 1
    go_to("Edit")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("Changed")
    page.keyboard.press("Enter")
    page.locator(".said", has_text="Changed").wait_for()
    wait_for_answers(page)
    go_to("Settings")
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Settings").wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_enter_of_an_input_method_does_not_send(page: Any) -> None:
    page.locator("#model option").first.wait_for(state="attached")
    page.get_by_label("Message", exact=True).fill("ni hao")
    with answering(page, stream("ok")) as asked:
        for composing in ("isComposing: true", "keyCode: 229"):
            page.evaluate(
                f"document.getElementById('message').dispatchEvent(new KeyboardEvent('keydown',"
                f" {{key: 'Enter', bubbles: true, cancelable: true, {composing}}}))"
            )
        assert page.locator("article").count() == 0
        page.keyboard.press("Enter")
        wait_for_answers(page)
    assert len(asked) == 1
