"""The chat page for everybody: readers of screens, telephones, Chinese, the keyboard."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from chat_page import (
    CODE,
    PHONE,
    Site,
    answering,
    failing,
    sticks_out,
    stream,
    wait_for_answers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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
