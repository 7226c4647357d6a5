"""The chat page: what fails is told, and what attacks is only text."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from chat_page import (
    answering,
    conversation,
    failing,
    said,
    send,
    stream,
    wait_for_answers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

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
