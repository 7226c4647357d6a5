"""The chat page: answers, their versions and tokens, and judging them."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from chat_page import (
    CODE,
    Site,
    answering,
    failing,
    kept_answers,
    said,
    send,
    stream,
    wait_for_answers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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
