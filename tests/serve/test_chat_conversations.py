"""The chat page: conversations are kept, shared between tabs, and exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_page import (
    Site,
    answering,
    conversation,
    said,
    send,
    stream,
    wait_for_answers,
)

from danlu.data.conversations import check_messages, require_reply

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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
