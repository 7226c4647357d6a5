"""The `openai` client against the real server and the real small model."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from serving import Server, serving

import danlu
from danlu.core.errors import UserError
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams

pytestmark = pytest.mark.slow

MODEL = "smollm2"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
CAT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 30}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        danlu.load(MODEL)
    except UserError as error:
        pytest.skip(str(error))
    with serving(MODEL, "--dtype", "float32", folder=tmp_path_factory.mktemp("server")) as server:
        yield server
        server.settled()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The same computation, at hand."""
    model, tokenizer = danlu.load(MODEL, dtype=torch.float32)
    return Engine(model, tokenizer, dtype="float32", deterministic=True)


def test_models(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == [MODEL]


def test_chat_is_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=20, logprobs=True, top_logprobs=3
    )
    expected = engine.chat(FRANCE, SamplingParams(max_tokens=20, temperature=0, logprobs=3))
    [choice] = found.choices
    assert "Paris" in choice.message.content
    assert choice.message.content == expected.text
    assert choice.finish_reason == "stop"
    assert found.usage.prompt_tokens == len(engine.prompt_ids(FRANCE))
    assert found.usage.completion_tokens == len(expected.ids)
    # The stop token is none of the text's.
    said = choice.logprobs.content
    assert [token.logprob for token in said] == pytest.approx(expected.logprobs[:-1], abs=1e-6)
    assert "".join(token.token for token in said) == choice.message.content
    assert bytes(byte for token in said for byte in token.bytes).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 3 for token in said)
    assert all(max(top.logprob for top in token.top_logprobs) >= token.logprob for token in said)


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    wanted: Any = {"model": MODEL, "messages": FRANCE, "max_tokens": 30, "seed": 3, "temperature": 1.2}
    wanted |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**wanted)
    chunks = list(
        client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[0].delta.role == "assistant"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len([piece for piece in pieces if piece.delta.content]) > 3, "it comes piece by piece"
    logprobs = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
    assert logprobs == whole.choices[0].logprobs.content
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_seed_decides_and_without_one_answers_differ(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str]:
        found = client.chat.completions.create(model=MODEL, messages=FRANCE, max_tokens=24, n=3, **more)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    first = ask(seed=7, temperature=1.5)
    assert first == ask(seed=7, temperature=1.5)
    assert len(set(first)) == 3
    assert ask(temperature=1.5) != ask(temperature=1.5)


def test_stop_and_length(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, **more).choices[0]

    stopped = ask(stop=["France"])
    assert stopped.message.content == "The capital of "
    assert stopped.finish_reason == "stop"
    short = ask(max_tokens=3)
    assert short.finish_reason == "length"
    assert ask(max_completion_tokens=3).message.content == short.message.content


def test_logit_bias_bans_and_forces(client: openai.OpenAI, engine: Engine) -> None:
    [paris] = engine.tokenizer.encode(" Paris", mid_text=True)
    banned = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=20, logit_bias={str(paris): -100}
    )
    assert "Paris" not in banned.choices[0].message.content
    forced = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=3, logit_bias={str(paris): 100}
    )
    assert forced.choices[0].message.content == " Paris Paris Paris"


def test_json_schema_is_followed(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "cat", "schema": CAT, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Invent a cat."}],
            response_format=form,
            seed=seed,
            max_tokens=200,
        )
        cat = json.loads(found.choices[0].message.content)
        assert set(cat) == {"name", "age"}
        assert isinstance(cat["age"], int)


def test_vllm_s_additions(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> str:
        return (
            client.chat.completions.create(model=MODEL, messages=FRANCE, max_tokens=12, extra_body=more)
            .choices[0]
            .message.content
        )

    assert ask(guided_regex="(yes|no)") in ("yes", "no")
    assert ask(guided_choice=["Lyon (1)", "Nice [2]"]) in ("Lyon (1)", "Nice [2]")
    assert isinstance(json.loads(ask(guided_json={"type": "integer", "maximum": 9})), int)
    greedy = ask(top_k=1)
    assert greedy == ask(min_p=1.0) == ask(top_k=1, cache_salt="mine")
    assert len(ask(ignore_eos=True, top_k=1)) > len(greedy)


def test_tools(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        found = client.chat.completions.create(
            model=MODEL, messages=asked, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=60
        ).choices[0]
        [call] = found.message.tool_calls
        assert found.finish_reason == "tool_calls"
        assert call.function.name == "get_weather"
        assert list(json.loads(call.function.arguments)) == ["city"]
    streamed = client.chat.completions.create(
        model=MODEL,
        messages=asked,
        tools=[WEATHER],
        tool_choice="required",
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    calls = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or []]
    assert [(one.function.name, one.function.arguments) for one in calls] == [
        ("get_weather", call.function.arguments)
    ]
    # The result goes back, and the model answers in words.
    turn = found.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees"}
    after = client.chat.completions.create(
        model=MODEL,
        messages=[*asked, turn, result],
        tools=[WEATHER],
        tool_choice="none",
        temperature=0,
        max_tokens=40,
    ).choices[0]
    assert after.message.content
    assert after.message.tool_calls is None


def test_completions_echo_logprobs_and_offsets(client: openai.OpenAI, engine: Engine) -> None:
    text = "The naïve café in 北京 is"
    found = client.completions.create(
        model=MODEL, prompt=text, max_tokens=6, temperature=0, echo=True, logprobs=2
    ).choices[0]
    ids = engine.prompt_ids(text)
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=2, prompt_logprobs=2)
    [expected] = engine.generate([text], params)
    assert found.text == text + expected.text
    logprobs = found.logprobs
    assert len(logprobs.tokens) == len(ids) + len(expected.ids)
    assert logprobs.token_logprobs[0] is None
    values = [*expected.prompt_logprobs, *expected.logprobs]
    assert logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-6)
    for token, place, after in zip(
        logprobs.tokens, logprobs.text_offset, [*logprobs.text_offset[1:], len(found.text)], strict=True
    ):
        if not token.startswith("bytes:"):
            assert found.text[place:after] == token
    assert any(token.startswith("bytes:") for token in logprobs.tokens), "parts of 北 or 京"


def test_completions_of_several_prompts_and_ids(client: openai.OpenAI, engine: Engine) -> None:
    texts = ["One two three", "The sky is"]
    found = client.completions.create(model=MODEL, prompt=texts, max_tokens=5, temperature=0, n=1)
    ids = [engine.prompt_ids(text) for text in texts]
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=5, temperature=0)
    assert [choice.text for choice in found.choices] == [choice.text for choice in by_ids.choices]
    expected = engine.generate(texts, SamplingParams(max_tokens=5, temperature=0))
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert found.usage.prompt_tokens == sum(map(len, ids))
    streamed = client.completions.create(
        model=MODEL, prompt=texts, max_tokens=5, temperature=0, stream=True, echo=True
    )
    pieces = ["", ""]
    for chunk in streamed:
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [text + one.text for text, one in zip(texts, expected, strict=True)]


def test_best_of_is_the_likeliest(client: openai.OpenAI) -> None:
    wanted: Any = {"model": MODEL, "prompt": "The sky is", "max_tokens": 8, "seed": 5, "temperature": 1.5}
    wanted["logprobs"] = 0
    all_of_them = client.completions.create(**wanted, n=4)
    means = [
        sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in all_of_them.choices
    ]
    best = client.completions.create(**wanted, best_of=4)
    assert best.choices[0].text == all_of_them.choices[means.index(max(means))].text
    assert best.usage.completion_tokens == all_of_them.usage.completion_tokens


def test_only_reading_a_prompt(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt="One two three", max_tokens=0, echo=True, logprobs=1
    )
    assert found.choices[0].text == "One two three"
    assert len(found.choices[0].logprobs.tokens) == found.usage.prompt_tokens
    assert found.usage.completion_tokens == 0


def test_embeddings(client: openai.OpenAI, engine: Engine) -> None:
    texts = ["a cat", "a kitten", "the stock market fell"]
    found = client.embeddings.create(model=MODEL, input=texts)
    rows = np.array([one.embedding for one in found.data])
    expected = engine.embed(texts).numpy()
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    np.testing.assert_allclose([one.embedding for one in plain.data], rows, rtol=1e-6)
    raw = client.embeddings.with_raw_response.create(model=MODEL, input="a cat", encoding_format="base64")
    assert len(base64.b64decode(json.loads(raw.text)["data"][0]["embedding"])) == 4 * rows.shape[1]


def test_tokenize_and_back(server: Server, engine: Engine) -> None:
    import httpx2 as httpx

    text = "The naïve café"
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == engine.prompt_ids(text)
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"]}).json()
    assert back["prompt"] == text
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": FRANCE}).json()
    assert chat["tokens"] == engine.prompt_ids(FRANCE), "what is served is what was trained"


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"model": "gpt-4"}, 404, "smollm2"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 10**9}, 400, "8192"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context"),
        ({"extra_body": {"temprature": 1}}, 400, 'did you mean "temperature"'),
    ],
)
def test_errors_are_the_client_s_own(client: openai.OpenAI, changes: Any, status: int, told: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": FRANCE, "max_tokens": 3, **changes})
    assert caught.value.status_code == status
    assert told in caught.value.message


def test_a_stream_that_is_closed_ends_its_work(client: openai.OpenAI, server: Server) -> None:
    before = server.metric("danlu_generated_tokens_total")
    with client.chat.completions.create(
        model=MODEL, messages=FRANCE, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.settled()
    assert server.metric("danlu_generated_tokens_total") - before < 1000
