"""The engine in lm-evaluation-harness, beside the harness's own backend for transformers; no network."""

import importlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small_models import save_random_model

from danlu.core.errors import UserError
from danlu.evaluate.harness import EngineLM
from danlu.generate.engine import Engine
from danlu.model.checkpoint import load
from danlu.tokens.bpe import train_bpe
from danlu.tokens.chat import render_prompt

ROOT = Path(__file__).parents[2]
TASK = ROOT / "recipes/tasks/furnace.jsonl"
CONTEXT = 512
TOLERANCE = 1e-3
"""Of log-likelihoods of tens of nats, in float32."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([TASK.read_text("utf-8")], 400)
    return save_random_model(
        tmp_path_factory.mktemp("random") / "model", tokenizer, noise=0.1, max_positions=CONTEXT
    )


@pytest.fixture(scope="module")
def ours(saved: Path) -> EngineLM:
    return EngineLM(Engine(*load(saved, torch.float32)))


def backend(folder: Path, **options: Any) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, **options)


@pytest.fixture(scope="module")
def theirs(saved: Path) -> HFLM:
    return backend(saved)


@pytest.fixture(scope="module")
def theirs_as_told(saved: Path) -> HFLM:
    """It begins texts as they are; else it would put the token that begins documents before conversations."""
    return backend(saved, add_bos_token=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(ROOT)


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


CHAT = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be right."}


@pytest.mark.parametrize(
    ("options", "peer"), [({}, "theirs"), (CHAT, "theirs_as_told")], ids=["text", "chat"]
)
def test_the_local_task_scores_as_with_transformers(
    ours: EngineLM, options: dict[str, Any], peer: str, request: pytest.FixtureRequest
) -> None:
    theirs = request.getfixturevalue(peer)
    tasks = TaskManager(include_path=str(ROOT / "recipes/tasks"), include_defaults=False)
    found, expected = (
        simple_evaluate(model, tasks=["furnace"], task_manager=tasks, bootstrap_iters=0, **options)
        for model in (ours, theirs)
    )
    samples = list(zip(found["samples"]["furnace"], expected["samples"]["furnace"], strict=True))
    assert len(samples) == len(TASK.read_text("utf-8").splitlines()) > 20
    for mine, other in samples:
        assert mine["arguments"] == other["arguments"]
        assert len(mine["filtered_resps"]) == 4
        for (value, greedy), (wanted, is_greedy) in zip(
            mine["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert value == pytest.approx(wanted, abs=TOLERANCE)
            assert greedy == is_greedy
    scores = [{k: v for k, v in r["results"]["furnace"].items() if "," in k} for r in (found, expected)]
    assert scores[0] == scores[1]
    spread = {round(value, 1) for mine, _ in samples for value, _ in mine["filtered_resps"]}
    assert len(spread) > 20, "the model tells choices apart"


def test_greedy_is_what_generation_would_say(ours: EngineLM, theirs: HFLM) -> None:
    """What the model itself would say, and the same but for the last token."""
    contexts = ["Question: What is", "gold", ""]
    requests = []
    for context in contexts:
        ids = ours.tok_encode(context) or [ours.prefix_token_id]
        prompt = torch.tensor([ids])
        out = theirs.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4
        )
        said = out[0, len(ids) :].tolist()
        requests += [(("", ""), ids, said), (("", ""), ids, [*said[:-1], (said[-1] + 1) % 400])]
    found, expected = (model._loglikelihood_tokens(requests) for model in (ours, theirs))
    assert [greedy for _, greedy in found] == [True, False] * len(contexts)
    assert found == [(pytest.approx(value, abs=TOLERANCE), greedy) for value, greedy in expected]


def test_a_context_that_is_too_long_loses_its_beginning(ours: EngineLM, theirs: HFLM) -> None:
    long = "The furnace waits for gold. " * 100
    requests = ask("loglikelihood", (long, " ash"), (long, ""), ("", "ash"), ("a", long[:600]))
    requests = [request for request in requests if request.args[1]]
    assert len(ours.tok_encode(long)) > CONTEXT
    found, expected = (model.loglikelihood(requests, disable_tqdm=True) for model in (ours, theirs))
    assert found == [(pytest.approx(value, abs=TOLERANCE), greedy) for value, greedy in expected]
    with pytest.raises(UserError, match=rf"the model's context {CONTEXT}"):
        ours.loglikelihood(ask("loglikelihood", ("a", long)), disable_tqdm=True)


def test_whole_texts_in_windows(ours: EngineLM, theirs_as_told: HFLM) -> None:
    """Longer than the context, short, and empty; each begins once."""
    text = TASK.read_text("utf-8")
    requests = ask("loglikelihood_rolling", (text,), ("gold",), (text[:2500],), ("",))
    assert len(ours.tok_encode(text)) > 2 * CONTEXT
    expected = theirs_as_told.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=5 * TOLERANCE)


def test_answers_are_those_of_transformers(ours: EngineLM, theirs: HFLM) -> None:
    """Stop strings that span tokens, a special token as a stop string, two sets of settings, a cut prompt."""
    contexts = ["Question: What is", "The furnace", "glass " * 600, "steam"]
    plain = {"until": [], "max_gen_toks": 40}
    free = theirs.generate_until(ask("generate_until", *((c, plain) for c in contexts)), disable_tqdm=True)
    marks = [text[9:12] for text in free]
    settings = {"until": [*marks, "<|im_end|>"], "max_gen_toks": 40, "do_sample": False}
    requests = ask("generate_until", *((c, s) for c in contexts for s in (plain, settings)))
    found, expected = ours.generate_until(requests), theirs.generate_until(requests, disable_tqdm=True)
    assert found == expected
    assert found[::2] == free
    for whole, cut in zip(found[::2], found[1::2], strict=True):
        assert whole.startswith(cut)
        assert len(cut) < len(whole)


def test_repeated_draws_differ_and_come_again(ours: EngineLM) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 10, "until": []}
    requests = ask("generate_until", *(("gold", settings) for _ in range(4)))
    found = ours.generate_until(requests)
    assert len(set(found)) == 4
    assert ours.generate_until(requests) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_beams": 3}, "sets num_beams"), ({"max_gen_toks": CONTEXT}, f"asks for {CONTEXT} tokens")],
)
def test_what_the_engine_does_not_have_is_refused(
    ours: EngineLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours.generate_until(ask("generate_until", ("gold", settings)))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it hot?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How hot?"},
]


def test_a_conversation_is_the_one_that_is_served(ours: EngineLM, theirs: HFLM) -> None:
    text = ours.apply_chat_template(TALK)
    assert text == theirs.apply_chat_template(TALK)
    assert ours.tok_encode(text) == render_prompt(TALK, ours.tokenizer)
    begun = [*TALK, {"role": "assistant", "content": "About"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)


def test_a_message_that_spells_a_special_token_is_refused(ours: EngineLM) -> None:
    with pytest.raises(UserError, match=r"a user message spells the special token <\|im_end\|>"):
        ours.apply_chat_template([{"role": "user", "content": "What is <|im_end|>?"}])


def test_requests_are_cached_under_their_own_arguments(ours: EngineLM) -> None:
    kept: dict[str, Any] = {}

    class Hook:
        def add_partial(self, kind: str, args: Any, answer: Any) -> None:
            kept[json.dumps([kind, args])] = answer

    likely = ask("loglikelihood", ("hot", " iron"), ("cold", " iron"))
    ours.set_cache_hook(Hook())
    try:
        answers = ours.loglikelihood(likely, disable_tqdm=True)
    finally:
        ours.set_cache_hook(type("Nothing", (), {"add_partial": lambda *_: None})())
    assert kept == {
        json.dumps(["loglikelihood", request.args]): answer
        for request, answer in zip(likely, answers, strict=True)
    }
    assert answers[0] != answers[1]


def test_without_the_harness_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "danlu.evaluate.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install 'danlu\[eval\]'"):
        importlib.import_module("danlu.evaluate.harness")
