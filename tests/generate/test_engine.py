"""The engine against transformers' `generate` and against uncached passes of the same model."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.generate.beam import BeamParams, beam_search
from danlu.generate.engine import Engine, Request
from danlu.generate.program import Feed
from danlu.generate.sampling import SamplingParams
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render
from danlu.tokens.tokenizer import Tokenizer

CONTEXT = 128
PROMPTS = [
    "The furnace",
    "丹炉里的火很旺，",
    "🔥",
    "",
    "The alchemist waits for the gold to appear, and",
]
GREEDY = SamplingParams(max_tokens=40, temperature=0, stop_ids=())
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it hot? 🔥"},
    {"role": "assistant", "content": "是的。"},
    {"role": "user", "content": "And the <|im_end|> gold?"},
]


def test_greedy_ids_are_those_of_transformers(engine: Engine, theirs: LlamaForCausalLM) -> None:
    """Its generation_config.json names the stop ids, as ours."""
    params = SamplingParams(max_tokens=60, temperature=0)
    for prompt in PROMPTS:
        ids = torch.tensor([engine.prompt_ids(prompt)])
        expected = theirs.generate(ids, do_sample=False, max_new_tokens=60)[0, ids.shape[1] :]
        assert engine.generate([prompt], params)[0].ids == expected.tolist(), prompt


def test_generation_ends_at_a_stop_id_as_in_transformers(engine: Engine, theirs: LlamaForCausalLM) -> None:
    stop = engine.generate(["The furnace"], GREEDY)[0].ids[10]
    [found] = engine.generate(["The furnace"], SamplingParams(temperature=0, stop_ids=(stop,)))
    ids = torch.tensor([engine.prompt_ids("The furnace")])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=100, eos_token_id=stop
    )
    assert found.ids == expected[0, ids.shape[1] :].tolist()
    assert found.finish_reason == "stop"
    assert found.ids.index(stop) == len(found.ids) - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_is_its_prompts_one_by_one(engine: Engine, temperature: float) -> None:
    """A few tokens of the vocabulary stop, so that the rows leave the batch at different times."""
    params = SamplingParams(
        max_tokens=30, temperature=temperature, top_p=0.9, seed=4, stop_ids=tuple(range(3, 330, 25))
    )
    together = engine.generate(PROMPTS, params)
    assert len({len(completion.ids) for completion in together}) > 2
    for prompt, completion in zip(PROMPTS, together, strict=True):
        [alone] = engine.generate([prompt], params)
        assert (alone.ids, alone.text) == (completion.ids, completion.text)
        assert alone.finish_reason == completion.finish_reason
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-5)


def test_the_order_of_a_batch_changes_nothing(engine: Engine) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=1)
    forwards, backwards = engine.generate(PROMPTS, params), engine.generate(PROMPTS[::-1], params)
    assert [completion.ids for completion in forwards] == [completion.ids for completion in backwards[::-1]]


def test_another_seed_gives_another_answer(engine: Engine) -> None:
    answers = [
        engine.generate(["The"], SamplingParams(max_tokens=10, temperature=1.0, seed=seed))[0].ids
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_each_prompt_has_draws_of_its_own(engine: Engine, tokenizer: Tokenizer) -> None:
    """A model to which all tokens are equally likely: only the draws decide."""
    model = Transformer(engine.model.config)
    torch.nn.init.zeros_(model.norm.weight)
    params = SamplingParams(max_tokens=10, temperature=1.0, stop_ids=())
    found = [c.ids for c in Engine(model, tokenizer).generate([[5], [6], [5, 6]], params)]
    assert len({tuple(ids) for ids in found}) == 3


def uncached_logprobs(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """log-softmax of one whole pass over prompt and answer."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids[:-1]]))
        table = getattr(logits, "logits", logits)[0, len(prompt) - 1 :].log_softmax(-1)
    return table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(max_tokens=40, temperature=1.7, top_k=20, top_p=0.9, stop_ids=())]
)
def test_logprobs_are_those_of_a_whole_pass(
    engine: Engine, theirs: LlamaForCausalLM, params: SamplingParams
) -> None:
    """Of the model's own distribution, whatever the sampling; also in a ragged batch."""
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        ids = engine.prompt_ids(prompt)
        for model in (engine.model, theirs):
            expected = uncached_logprobs(model, ids, completion.ids)
            assert completion.logprobs == pytest.approx(expected, abs=1e-5 if model is engine.model else 1e-4)


def test_generation_ends_with_the_context(engine: Engine) -> None:
    """The last token is predicted from a full context; a shorter prompt beside it goes on."""
    long = [5 + n % 300 for n in range(CONTEXT - 3)]
    params = SamplingParams(max_tokens=20, temperature=0, stop_ids=())
    full, short = engine.generate([long, long[:7]], params)
    assert (len(full.ids), full.finish_reason) == (4, "length")
    assert full.logprobs == pytest.approx(uncached_logprobs(engine.model, long, full.ids), abs=1e-5)
    assert len(short.ids) == 20
    assert short.ids == engine.generate([long[:7]], params)[0].ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([5] * CONTEXT, "the prompt has 128 tokens, the model's context 128"),
        ([5, 330], "holds the id 330, the model's vocabulary has 330"),
        ([-1], "holds the id -1"),
    ],
)
def test_a_wrong_prompt_is_refused(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.generate(["fine", prompt], GREEDY)


def test_ids_may_be_of_numpy_or_torch(engine: Engine) -> None:
    ids = [7, 100, 42]
    expected = engine.generate([ids], GREEDY)[0].ids
    for same in (list(np.array(ids)), np.array(ids), torch.tensor(ids)):
        assert engine.generate([same], GREEDY)[0].ids == expected


def test_no_prompts_no_completions(engine: Engine) -> None:
    assert engine.generate([], GREEDY) == []


def test_a_broken_model_is_an_error(engine: Engine, tokenizer: Tokenizer) -> None:
    model = Transformer(engine.model.config)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        Engine(model, tokenizer).generate(["The"], SamplingParams())
    searching = Engine(model, tokenizer)
    with pytest.raises(UserError, match="not numbers"):
        searching.run(lambda held: beam_search(held, [1, 2], BeamParams(beams=2, max_tokens=3)))
    with pytest.raises(UserError, match="not numbers"):
        searching.likelihood([1, 2], [[3]])
    assert all(lane.tables.blocks.in_use == 0 for lane in searching.scheduler.lanes)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_a_stream_are_the_text(engine: Engine, seed: int) -> None:
    """A random model writes bytes that are no characters; they come out alike."""
    params = SamplingParams(max_tokens=60, temperature=1.5, seed=seed)
    [whole] = engine.generate(["The"], params)
    assert "\ufffd" in whole.text
    assert "".join(engine.stream("The", params)) == whole.text


def speller(tokenizer: Tokenizer, ids: list[int]) -> Transformer:
    """A model that says each of `ids` (all different) after the one before, then the end of a turn.

    The embedding is the identity, the layers add nothing, and the head names the successor.
    """
    size = tokenizer.vocab_size + tokenizer.vocab_size % 2
    sizes = ModelConfig(
        vocab_size=size, width=size, n_layers=1, n_heads=1, n_kv_heads=1, ffn_width=8, tied_embeddings=False
    )
    model = Transformer(sizes)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        model.embedding.weight.copy_(torch.eye(size))
        model.head.weight.zero_()
        for before, after in zip(ids, [*ids[1:], tokenizer.stop_ids[0]], strict=True):
            model.head.weight[after, before] = 1.0
    return model


@pytest.mark.parametrize("text", ["丹 🔥", "é中🧪!", "x😀"])
def test_a_character_of_several_tokens_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    raw = text.encode()
    assert len(set(raw)) == len(raw)
    ids = [tokenizer.token_bytes.index(bytes([byte])) for byte in raw]
    start = tokenizer.token_bytes.index(b"Q")
    engine = Engine(speller(tokenizer, [start, *ids]), tokenizer)
    params = SamplingParams(temperature=0)
    [whole] = engine.generate([[start]], params)
    assert (whole.text, whole.finish_reason, len(whole.ids)) == (text, "stop", len(raw) + 1)
    assert list(engine.stream([start], params)) == list(text)


class Reciter(Request):
    """Says given tokens."""

    said: list[int]

    def program(self, sequences: Any) -> Any:
        yield [Feed(sequences.open(), [0], silent=True)]
        for token in self.said:
            self._append(self.engine.tokenizer.decode_bytes([token]))
        self._append(b"", final=True)


@given(st.lists(st.integers(0, 329), max_size=40), st.text(max_size=10))
def test_pieces_are_the_text_whatever_the_tokens(engine: Engine, ids: list[int], text: str) -> None:
    """Tokens cut characters anywhere; what is cut short at the end is shown at the end."""
    ids = ids + engine.tokenizer.encode(text)
    reciter = Reciter(engine, [0], SamplingParams(), is_reply=False)
    reciter.said = ids
    reciter.begin()
    pieces = list(reciter.pieces())
    assert "".join(pieces) == engine.tokenizer.decode(ids)
    assert all(pieces)


def test_the_served_prompt_is_the_training_prefix(engine: Engine, tokenizer: Tokenizer) -> None:
    """What reaches the model's embedding, not what a function says."""
    seen: list[torch.Tensor] = []
    hook = engine.model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        reply = engine.chat(TALK, SamplingParams(max_tokens=3, temperature=0, stop_ids=()))
    finally:
        hook.remove()
    trained = render([*TALK, {"role": "assistant", "content": "Well."}], tokenizer)
    served = seen[0][0].tolist()
    assert served == trained.ids[: len(served)]
    assert trained.mask.index(True) < len(served) < len(trained.ids)
    assert trained.mask[len(served)], "the first token that is generated is learnt"
    assert len(reply.ids) == 3


def test_a_text_begins_like_a_document(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = engine.prompt_ids("The furnace")
    assert ids == tokenizer.encode_document("The furnace")[: len(ids)]
    assert engine.prompt_ids("") == [tokenizer.bos_id]
