"""Many requests at once against each one alone: nothing that others do may change an answer."""

import random
from typing import Any

import pytest
import torch

from danlu.core.errors import UserError
from danlu.generate import packed
from danlu.generate.engine import Completion, Engine, Request
from danlu.generate.kernels import POSITIONS
from danlu.generate.paged import Step
from danlu.generate.sampling import SamplingParams
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.lora import add_adapter, use_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 330,
    "width": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_width": 96,
    "max_positions": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "qkv_bias": True, "head_width": 32},
    "windows": {"window": 24, "local_layers": (True, False)},
    "forgets": {"window": 24},
    "odd": {"width": 72, "n_heads": 6, "n_kv_heads": 3, "ffn_width": 100},
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "ffn": "gelu_tanh",
        "qkv_bias": True,
        "n_kv_heads": 4,
    },
    "bloom": {"positions": "alibi", "norm": "layernorm", "ffn": "gelu", "n_kv_heads": 4},
    "gemma": {"norm_place": "both", "attention_softcap": 5.0, "logit_softcap": 3.0, "ffn": "geglu_tanh"},
    "experts": {"n_experts": 4, "n_active": 2},
}


def make(name: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SIZES, **MODELS[name]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def some_requests(n: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Some begin alike; some are greedy, some draw."""
    draw = random.Random(seed)
    common = [[draw.randrange(330) for _ in range(length)] for length in (16, 40, 75)]
    found = []
    for number in range(n):
        ids = [draw.randrange(330) for _ in range(draw.randint(1, 50))]
        if draw.random() < 0.5:
            ids = draw.choice(common) + ids
        temperature = draw.choice([0.0, 1.0])
        params = SamplingParams(
            max_tokens=draw.randint(1, 25), temperature=temperature, top_p=0.9, seed=number, stop_ids=(3,)
        )
        found.append((ids, params))
    return found


def run(
    engine: Engine, requests: list[tuple[list[int], SamplingParams]], seed: int
) -> list[Completion | None]:
    """They come at random times, a few at once, and some are cancelled: None."""
    draw = random.Random(seed)
    waiting, running = list(enumerate(requests)), []
    found: list[Completion | None] = [None] * len(requests)
    while waiting or running:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                number, (ids, params) = waiting.pop(0)
                running.append((number, engine.submit(ids, params)))
        engine.step()
        for number, request in [*running]:
            if request.done:
                found[number] = request.wait()
            elif draw.random() < 0.004:
                request.cancel()
                assert request.completion.finish_reason == "cancelled"
            else:
                continue
            running.remove((number, request))
    return found


def leaks(engine: Engine) -> int:
    return sum(lane.tables.blocks.in_use for lane in engine.scheduler.lanes)


@pytest.mark.parametrize("name", MODELS)
def test_random_requests_are_answered_as_alone(name: str, tokenizer: Tokenizer) -> None:
    """500 of them for the first model, on a cache that is too small for all that run."""
    model = make(name)
    requests = some_requests(500 if name == "llama" else 40, seed=1)
    engine = Engine(model, tokenizer, deterministic=True, cache_bytes=600_000, step_tokens=48)
    found = run(engine, requests, seed=2)
    assert leaks(engine) == 0
    assert found.count(None) < len(requests) / 3
    alone = Engine(model, tokenizer, deterministic=True)
    for (ids, params), completion in zip(requests, found, strict=True):
        if completion is not None:
            [expected] = alone.generate([ids], params)
            assert completion == expected
    assert leaks(alone) == 0


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_processor_without_products_of_bfloat16(
    name: str, kind: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the batch goes to oneDNN in float32, the weights being of the same kind."""
    whole = [(ids[:-12], ids[-12:]) for ids, _ in some_requests(24, 3) if len(ids) > 12]
    exact = Engine(make(name), tokenizer, dtype=kind, deterministic=True).likelihoods(whole)
    monkeypatch.setattr(packed, "BFLOAT16_PRODUCTS", False)
    found = Engine(make(name), tokenizer, dtype=kind).likelihoods(whole)
    assert len(whole) > 10
    for one, other in zip(found, exact, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=0.02, abs=0.1)


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_batch_changes_no_bit(name: str, kind: Any, tokenizer: Tokenizer) -> None:
    """At 1, 7 and 32 requests at once, with and without shared beginnings and pieces of prompts."""
    model = make(name)
    requests = some_requests(32, seed=3)
    [first, *others] = [
        _at_once(Engine(model, tokenizer, dtype=kind, deterministic=True, step_tokens=pieces), requests, n)
        for n, pieces in [(1, 512), (7, 512), (32, 512), (32, 20)]
    ]
    for other in others:
        assert other == first
    apart = [_at_once(Engine(model, tokenizer, dtype=kind, deterministic=True), [r], 1)[0] for r in requests]
    assert apart == first


def _at_once(engine: Engine, requests: list[tuple[list[int], SamplingParams]], n: int) -> list[Completion]:
    found: list[Completion] = []
    for begin in range(0, len(requests), n):
        group = requests[begin : begin + n]
        found += engine.generate([ids for ids, _ in group], [params for _, params in group])
    return found


@pytest.mark.parametrize("way", ["fast", "plain", "gathered"])
@pytest.mark.parametrize("name", MODELS)
def test_not_deterministic_is_close(
    name: str, way: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ways compute what the model does: log-probabilities against a pass without a cache.

    plain: by the transformer's own layers; gathered: with the attention of a GPU.
    """
    if way != "fast":
        monkeypatch.setattr("danlu.generate.engine.runs_fast", lambda _: False)
    if way == "gathered":
        monkeypatch.setattr(Step, "_read_short", Step._gathered)
    model = make(name)
    engine = Engine(model, tokenizer, step_tokens=64)
    prompts = [ids for ids, _ in some_requests(12, seed=5)]
    found = engine.generate(prompts, SamplingParams(max_tokens=20, temperature=1.0, stop_ids=()))
    for prompt, completion in zip(prompts, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion.ids]))[0].log_softmax(-1)
        chosen = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=1e-3, rtol=1e-4)


def test_a_common_beginning_is_read_once(tokenizer: Tokenizer) -> None:
    model = make("gpt2")
    read: list[int] = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    engine = Engine(model, tokenizer)
    beginning = list(range(100, 164))
    prompts = [[*beginning, number] for number in range(8)]
    engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0))
    assert sum(read) == len(beginning) + len(prompts)
    read.clear()
    engine.generate([[*beginning, 50]], SamplingParams(max_tokens=1, temperature=0))
    assert sum(read) == 1


def test_changed_weights_are_used_at_once(tokenizer: Tokenizer) -> None:
    """Also where a prompt's keys and values are still remembered, and in the middle of an answer."""
    for name in ("llama", "gpt2"):
        model = make(name)
        engine = Engine(model, tokenizer, deterministic=True)
        params = SamplingParams(max_tokens=12, temperature=0, stop_ids=())
        prompt = list(range(40))
        engine.generate([prompt], params)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        request = engine.submit(prompt, params)
        for _ in range(4):
            engine.step()
        model(torch.tensor([prompt])).square().mean().backward()
        optimizer.step()
        rest = request.wait().ids[4:]
        fresh = Engine(model, tokenizer, deterministic=True)
        assert engine.generate([prompt], params) == fresh.generate([prompt], params)
        half = [*prompt, *request.completion.ids[:4]]
        assert rest == fresh.generate([half], SamplingParams(max_tokens=8, temperature=0, stop_ids=()))[0].ids


def test_who_waits_holds_nothing(tokenizer: Tokenizer) -> None:
    """Not even blocks that were computed with weights that have changed since, for a prompt seen before."""
    model = make("llama")
    engine = Engine(model, tokenizer, deterministic=True, cache_bytes=200_000)
    params = SamplingParams(max_tokens=12, temperature=0, stop_ids=())
    seen, other = list(range(100, 164)), list(range(200, 280))
    engine.generate([seen], params)
    room = engine.capacity - len(other) - 2 * POSITIONS
    first = engine.submit(other, SamplingParams(max_tokens=room, temperature=0, stop_ids=()))
    waits = engine.submit(seen, SamplingParams(max_tokens=100, temperature=0, stop_ids=()))
    engine.step()
    steps_waited = 0
    while steps_waited < 2:  # it has given its place to the older one, and asked for it in vain
        engine.step()
        steps_waited = steps_waited + 1 if waits.job in engine.scheduler.waiting else 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    first.cancel()
    begun = len(waits.completion.ids)
    found = waits.wait().ids
    fresh = Engine(model, tokenizer, deterministic=True)
    rest = SamplingParams(max_tokens=100 - begun, temperature=0, stop_ids=())
    assert found[begun:] == fresh.generate([[*seen, *found[:begun]]], rest)[0].ids
    assert leaks(engine) == 0


def test_what_can_not_fit_is_refused_with_the_numbers(tokenizer: Tokenizer) -> None:
    model = make("llama")
    small = Engine(model, tokenizer, cache_bytes=60_000)
    with pytest.raises(UserError, match=r"100 tokens of prompt, 100 of answer: a cache of \d+"):
        small.submit(list(range(100)), SamplingParams(max_tokens=100))
    with pytest.raises(UserError, match="10 bytes for keys and values"):
        Engine(model, tokenizer, cache_bytes=10).submit([1], SamplingParams())
    with pytest.raises(UserError, match="the prompt has 256 tokens, the model's context 256"):
        small.submit([1] * 256, SamplingParams())


def test_likelihoods_are_those_of_whole_passes(tokenizer: Tokenizer) -> None:
    for name in ("llama", "bloom"):
        model = make(name)
        engine = Engine(model, tokenizer, step_tokens=64)
        draw = random.Random(0)
        shots = [draw.randrange(330) for _ in range(60)]
        pairs = []
        for _ in range(20):
            prefix = shots[: draw.choice([1, 20, 60])] + [
                draw.randrange(330) for _ in range(draw.randint(0, 30))
            ]
            for _ in range(draw.randint(1, 4)):
                pairs.append((prefix, [draw.randrange(330) for _ in range(draw.randint(1, 12))]))
        draw.shuffle(pairs)
        for (prefix, continuation), found in zip(pairs, engine.likelihoods(pairs), strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([prefix + continuation]))[0, len(prefix) - 1 : -1].log_softmax(
                    -1
                )
            expected = logprobs.gather(1, torch.tensor(continuation)[:, None]).sum()
            assert found.logprob == pytest.approx(float(expected), rel=1e-5, abs=1e-4)
            assert found.greedy == (logprobs.argmax(-1).tolist() == continuation)
            assert found.n_tokens == len(continuation)
        assert leaks(engine) == 0


def test_a_stop_string_that_spans_tokens(tokenizer: Tokenizer) -> None:
    engine = Engine(make("llama"), tokenizer)
    params = SamplingParams(max_tokens=30, temperature=0, stop_ids=())
    [whole] = engine.generate(["Hello"], params)
    stop = whole.text[7:11]
    assert "\ufffd" not in stop
    stopping = SamplingParams(max_tokens=30, temperature=0, stop_ids=(), stop=(stop, "never there"))
    [cut] = engine.generate(["Hello"], stopping)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert "".join(engine.stream("Hello", stopping)) == cut.text


def test_prompt_logprobs_and_alternatives(tokenizer: Tokenizer) -> None:
    model = make("llama")
    engine = Engine(model, tokenizer, step_tokens=32)
    prompt = list(range(30, 90))
    params = SamplingParams(max_tokens=5, temperature=0, stop_ids=(), logprobs=3, prompt_logprobs=2)
    [found] = engine.generate([prompt], params)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + found.ids]))[0].log_softmax(-1)
    expected = logprobs[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.prompt_logprobs), expected, atol=1e-4, rtol=1e-4)
    for line, top in zip(logprobs[len(prompt) - 1 : -1], found.top, strict=True):
        assert [token for token, _ in top] == line.topk(3).indices.tolist()
    assert all(len(top) == 2 for top in found.prompt_top)


def test_embeddings_are_means_of_hidden_states(tokenizer: Tokenizer) -> None:
    model = make("qwen3")
    engine = Engine(model, tokenizer)
    texts = [[5, 6, 7], list(range(50))]
    for ids, found in zip(texts, engine.embed(texts), strict=True):
        with torch.no_grad():
            expected = model.hidden(torch.tensor([ids]))[0].mean(0)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_failure_is_no_matter_of_the_others(tokenizer: Tokenizer) -> None:
    engine = Engine(make("llama"), tokenizer)
    banned = SamplingParams(max_tokens=3, temperature=0, banned=tuple(range(330)))
    good = SamplingParams(max_tokens=3, temperature=0)
    requests: list[Request] = [engine.submit([5, 6], params) for params in (good, banned, good)]
    assert requests[0].wait().ids == requests[2].wait().ids
    with pytest.raises(UserError, match="every next token is ruled out"):
        requests[1].wait()
    assert leaks(engine) == 0


def test_several_adapters_in_one_batch(tokenizer: Tokenizer) -> None:
    """Each request as from the model with its adapter alone; equal beginnings aren't shared between them."""
    model = make("llama")
    with torch.no_grad():
        for name, dora in (("one", False), ("two", True)):
            for parameter in add_adapter(
                model, LoraConfig(rank=4, dora=dora, targets=("attention.*",)), name
            ):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    engine = Engine(model, tokenizer, adapters=["one", "two"])
    params = SamplingParams(max_tokens=15, temperature=0, stop_ids=())
    prompt = list(range(60))
    names = [None, "one", "two", "one", None]
    requests = [engine.submit(prompt, params, adapter=name) for name in names]
    found = [request.wait() for request in requests]
    assert len({tuple(completion.ids) for completion in found}) == 3
    for name, completion in zip(names, found, strict=True):
        use_adapter(model, name)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == completion.ids
        chosen = logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=1e-3, rtol=1e-4)
        merged = Engine(model, tokenizer)  # the active adapter, packed with its base
        assert merged.generate([prompt], params)[0].ids == completion.ids
    with pytest.raises(UserError, match='no adapter "three"'):
        engine.submit(prompt, params, adapter="three")
    assert leaks(engine) == 0


def test_a_prompt_is_only_read_where_no_answer_is_wanted(tokenizer: Tokenizer) -> None:
    engine = Engine(make("llama"), tokenizer)
    prompt = list(range(30, 90))
    [read] = engine.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=1))
    [full] = engine.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert (read.ids, read.text, read.finish_reason) == ([], "", "length")
    assert read.prompt_logprobs == pytest.approx(full.prompt_logprobs, abs=1e-5)
    assert engine.scheduler.lanes[0].tables.blocks.in_use == 0


def test_prefixes_are_shared_only_with_the_same_salt(tokenizer: Tokenizer) -> None:
    engine = Engine(make("llama"), tokenizer)
    prompt, params = list(range(30, 130)), SamplingParams(max_tokens=1, temperature=0)

    def tokens_read(salt: str) -> int:
        """By the first step of the request."""
        read: list[int] = []
        runner = engine.scheduler.lanes[0].runner
        plain = runner.run
        runner.run = lambda pieces, *rest: (  # type: ignore[method-assign, assignment]
            read.extend(len(piece.tokens) for piece in pieces) or plain(pieces, *rest)
        )
        try:
            engine.submit(prompt, params, salt=salt).wait()
        finally:
            runner.run = plain  # type: ignore[method-assign]
        return sum(read)

    assert tokens_read("") == len(prompt)
    assert tokens_read("") < len(prompt) / 2
    assert tokens_read("mine") == len(prompt)
    assert tokens_read("yours") == len(prompt)
    assert tokens_read("mine") < len(prompt) / 2
