"""Tools: the form of a call is learnt from the template, calls are written in it and read back from it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from danlu.core.errors import UserError
from danlu.tokens.chat import render_prompt, render_text
from danlu.tokens.tokenizer import Tokenizer
from danlu.tokens.tools import OWN, Call, ToolFormat, call_schema, read_calls, tool_format, with_tools

TAGGED = """\
{%- if tools -%}
<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' }}
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% elif not (tools and loop.first and message.role == 'system') -%}
<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""Calls between tags, as Hermes and Qwen write them."""

BARE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{% if message.tool_calls -%}
{%- set call = message.tool_calls[0].function -%}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""A call is the whole reply, as Llama 3.1 writes it."""

LISTED = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if loop.first and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% if message.tool_calls -%}
[TOOL_CALLS] [{% for call in message.tool_calls %}{{ ', ' if not loop.first -}}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson -}}
, "id": "{{ call.id }}"}{% endfor %}]
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""A list of calls behind a sign, as Mistral writes them."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}},
]
ASKED = [{"role": "user", "content": "Hot?"}]
NAMES = {"weather", "clock"}


def talk(*names: str) -> list[dict[str, Any]]:
    calls = [
        {"id": f"call{n:05}", "type": "function", "function": {"name": name, "arguments": {"city": "北京"}}}
        for n, name in enumerate(names)
    ]
    results = [{"role": "tool", "content": "21 °C", "tool_call_id": call["id"]} for call in calls]
    return [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (TAGGED, ToolFormat("<tool_call>", "</tool_call>")),
        (BARE, ToolFormat("", "", "parameters")),
        (LISTED, ToolFormat("[TOOL_CALLS]", "")),
    ],
    ids=["tagged", "bare", "listed"],
)
def test_the_form_is_learnt_and_its_calls_are_read(
    tokenizer: Tokenizer, template: str, form: ToolFormat
) -> None:
    own = with_template(tokenizer, template)
    assert tool_format(own) == form
    prompt = render_text(ASKED, own, True, TOOLS)
    assert "Of a city" in prompt
    written = render_text(talk("weather")[:2], own, False, TOOLS).removeprefix(prompt)
    said, calls = read_calls(written.split("<|im_end|>")[0], form, NAMES)
    assert (said.strip(), calls) == ("", [Call("weather", {"city": "北京"})])


@pytest.mark.parametrize("template", [TAGGED, BARE, LISTED], ids=["tagged", "bare", "listed"])
def test_prompts_with_tools_are_those_of_transformers(
    tokenizer: Tokenizer, template: str, tmp_path: Path
) -> None:
    own = with_template(tokenizer, template)
    own.save_folder(tmp_path / "t")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    for messages in (ASKED, talk("weather")):
        found = theirs.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True)
        assert render_prompt(messages, own, TOOLS) == found["input_ids"]


def test_two_calls_and_what_is_said_beside_them(tokenizer: Tokenizer) -> None:
    text = (
        'Let me see.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    )
    said, calls = read_calls(text, tool_format(with_template(tokenizer, TAGGED)), NAMES)
    assert said == "Let me see."
    assert calls == [Call("clock", {}), Call("weather", {"city": "Rome"})]


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "<tool_call>",
        '<tool_call>{"name": "weather", "arguments": ',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>" + "[" * 100_000,
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read_calls(text, OWN, NAMES) == (text, [])


@given(st.text(max_size=80))
def test_any_text_is_read_without_a_fault(text: str) -> None:
    for form in (OWN, ToolFormat("", "", "parameters")):
        said, calls = read_calls(text, form, NAMES)
        assert (said, calls) == (text, [])


def test_a_template_without_tools_gets_them_described(tokenizer: Tokenizer) -> None:
    form = tool_format(tokenizer)
    assert form == OWN
    messages = with_tools([{"role": "system", "content": "Be brief."}, *talk("weather")], TOOLS, form)
    text = render_text(messages, tokenizer, True)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be brief.")
    assert "Of a city" in text
    assert read_calls(messages[2]["content"], form, NAMES) == ("", [Call("weather", {"city": "北京"})])
    assert "21 °C" in messages[3]["content"]
    render_prompt(messages, tokenizer)  # and it can be tokenised


def test_a_call_is_held_to_the_schema_of_its_tool() -> None:
    from llguidance import LLMatcher

    schema = call_schema(TOOLS, OWN)
    assert LLMatcher.validate_grammar(f"%llguidance {{}}\nstart: %json {json.dumps(schema)}\n") == ""
    names = [option["properties"]["name"]["const"] for option in schema["anyOf"]]
    assert names == ["weather", "clock"]


def test_shared_definitions_stand_where_they_are_looked_up() -> None:
    parameters = {
        "type": "object",
        "properties": {"when": {"$ref": "#/$defs/Day"}},
        "$defs": {"Day": {"enum": ["today"]}},
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("a", "b")
    ]
    assert call_schema(tools, OWN)["$defs"] == {"Day": {"enum": ["today"]}}
    tools[1] = copy.deepcopy(tools[1])
    tools[1]["function"]["parameters"]["$defs"]["Day"] = {"enum": ["never"]}
    with pytest.raises(UserError, match="Day"):
        call_schema(tools, OWN)


@pytest.mark.parametrize("place", ["description", "argument"])
def test_a_tool_that_spells_a_special_token_is_refused(tokenizer: Tokenizer, place: str) -> None:
    own = with_template(tokenizer, TAGGED)
    tools, messages = copy.deepcopy(TOOLS), talk("weather")
    if place == "description":
        tools[0]["function"]["description"] = "see <|im_end|>"
    else:
        messages[1]["tool_calls"][0]["function"]["arguments"]["city"] = "<|im_end|>"
    with pytest.raises(UserError, match="special token"):
        render_prompt(messages, own, tools)
