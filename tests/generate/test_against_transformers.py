"""Greedy answers of every family, and of a real model, beside transformers' `generate`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families_table import CASES, make_theirs
from some_texts import TEXTS
from torch import nn
from transformers import AutoModelForCausalLM

from danlu.generate.beam import BeamParams, beam_search
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.generate.speculative import PromptLookup, speculative
from danlu.model.checkpoint import load, load_model
from danlu.tokens.tokenizer import Tokenizer

CLOSE = 1e-4
"""Where the best two logits are no further apart, either is right."""


@torch.no_grad()
def divergences(theirs: nn.Module, prompt: list[int], ours: list[int], n: int) -> int:
    """Greedy by transformers beside ours: 0 = equal, 1 = they part where the best two are CLOSE.

    Fails where they part elsewhere.
    """
    any_theirs: Any = theirs
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": n, "eos_token_id": None, "pad_token_id": 0}
    found = any_theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    expected = found[0, len(prompt) :].tolist()
    if expected == ours:
        return 0
    place = next(i for i in range(n) if expected[i] != ours[i])
    logits = any_theirs(torch.tensor([prompt + ours[:place]])).logits[0, -1]
    assert logits.max() - logits[ours[place]] < CLOSE, (place, expected, ours)
    return 1


@pytest.mark.parametrize("name", CASES)
def test_greedy_of_every_family(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = make_theirs(name, CASES[name][0])
    theirs.save_pretrained(tmp_path)
    engine = Engine(load_model(tmp_path), tokenizer)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 128, (length,), generator=draw).tolist() for length in (1, 30, 70)]
    params = SamplingParams(max_tokens=20, temperature=0, stop_ids=())
    found = engine.generate(prompts, params)
    parted = [divergences(theirs, p, c.ids, 20) for p, c in zip(prompts, found, strict=True)]
    assert sum(parted) <= 1


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any]:
    """Our engine in float32, and transformers on the same weights."""
    from danlu.model.checkpoint import save_model

    model, tokenizer = load("smollm2", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    save_model(model, folder, tokenizer)
    return Engine(model, tokenizer), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.slow
def test_greedy_of_a_real_model(smollm2: tuple[Engine, Any]) -> None:
    engine, theirs = smollm2
    prompts = [engine.prompt_ids(text[:400]) for text in TEXTS]
    found = engine.generate(prompts, SamplingParams(max_tokens=48, temperature=0, stop_ids=()))
    parted = [divergences(theirs, p, c.ids, 48) for p, c in zip(prompts, found, strict=True)]
    assert sum(parted) <= 2


@pytest.mark.slow
def test_beams_and_drafts_of_a_real_model(smollm2: tuple[Engine, Any]) -> None:
    engine, theirs = smollm2
    prompts = [engine.prompt_ids(text[:200]) for text in TEXTS[:3]]
    params = BeamParams(beams=4, max_tokens=24, length_penalty=0.7)
    beams = engine.run(*(lambda s, ids=ids: beam_search(s, ids, params) for ids in prompts))
    drafts = engine.run(
        *(lambda s, ids=ids: speculative(s, ids, PromptLookup(), max_tokens=24) for ids in prompts)
    )
    plain = engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0, stop_ids=()))
    for prompt, answers, draft, greedy in zip(prompts, beams, drafts, plain, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=4, length_penalty=0.7,
            max_new_tokens=24, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answers[0].ids == expected[0, len(prompt) :].tolist()
        assert draft.ids == greedy.ids
