"""On a GPU: the engine and its recorded steps, against passes without a cache. Skipped without one."""

from typing import Any

import pytest
import torch
from test_batching import MODELS, leaks, make, some_requests
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.engine import Completion, Engine
from danlu.generate.graphs import GraphRunner
from danlu.generate.kernels import POSITIONS
from danlu.generate.paged import gathered_attention, token_attention
from danlu.generate.sampling import Row, SamplingParams, choose, process
from danlu.model.attention import Scores
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
PARAMS = SamplingParams(max_tokens=40, temperature=0, stop_ids=())

PROCESSORS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"min_p": 0.05, "typical_p": 0.9},
    {"epsilon_cutoff": 0.001, "eta_cutoff": 0.001},
    {"mirostat_tau": 3.0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"no_repeat_ngram": 2, "min_tokens": 5, "banned": (7, 8), "logit_bias": ((5, 2.0),)},
]


@torch.no_grad()
def check(model: Transformer, prompt: list[int], found: Completion, tolerance: float) -> None:
    """The answer is what the model finds most probable, and as probable as the engine says."""
    logits = model(torch.tensor([prompt + found.ids], device="cuda"))[0, len(prompt) - 1 : -1].float()
    logprobs = logits.log_softmax(-1).cpu()
    ids = torch.tensor(found.ids)[:, None]
    chosen = logprobs.gather(1, ids)[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), chosen, atol=tolerance, rtol=0)
    assert (logprobs.amax(1) - chosen).max() <= tolerance


def prompts() -> list[list[int]]:
    """Twelve, some of which begin alike, one of them long."""
    return [ids for ids, _ in some_requests(11, seed=5)] + [[(7 * n) % 330 for n in range(200)]]


@pytest.mark.parametrize("n_blocks", [1, 3, 40, 500])
@pytest.mark.parametrize("n", [1, 5, 64])
@pytest.mark.parametrize(
    "scores",
    [Scores(0.2), Scores(0.2, window=100), Scores(0.2, alibi=True), Scores(0.2, window=70, softcap=5.0)],
    ids=["plain", "window", "alibi", "window and cap"],
)
@pytest.mark.parametrize("width", [64, 96])
def test_kernel_of_attention(width: int, scores: Scores, n: int, n_blocks: int) -> None:
    """Against PyTorch's operators, for sequences that are split among many programs and such that aren't."""
    torch.manual_seed(0)
    heads, groups, total = 6, 2, n * n_blocks
    q = torch.randn(n, heads, width, device="cuda")
    keys = torch.randn(total, groups, width, POSITIONS, device="cuda")
    values = torch.randn(total, groups, POSITIONS, width, device="cuda")
    tables = torch.randperm(total, device="cuda").view(n, n_blocks)
    positions = torch.randint(0, n_blocks * POSITIONS, (n,), device="cuda")
    found = token_attention(q, keys, values, tables, positions, scores)
    expected = gathered_attention(q, keys, values, tables, positions, scores)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_float32(name: str, tokenizer: Tokenizer) -> None:
    model = make(name).cuda()
    engine = Engine(model, tokenizer, step_tokens=64)
    for prompt, found in zip(prompts(), engine.generate(prompts(), PARAMS), strict=True):
        check(model, prompt, found, 2e-3)
    assert leaks(engine) == 0
    runner = engine.scheduler.lanes[0].runner
    assert (isinstance(runner, GraphRunner) and len(runner.graphs) > 0) == (name != "experts")


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_packed(kind: Any, tokenizer: Tokenizer) -> None:
    """Against the same rounded matrices, in a pass without the engine."""
    model = make("llama").cuda()
    engine = Engine(model, tokenizer, dtype=kind)
    found = engine.generate(prompts(), PARAMS)
    runner = engine.scheduler.lanes[0].runner
    rounded: dict[str, Tensor] = {
        name: part.weight for name, part in runner.twin.named_modules() if hasattr(part, "matrix")
    }
    with torch.no_grad():
        for name, weight in rounded.items():
            model.get_submodule(name).weight.copy_(weight)
    for prompt, completion in zip(prompts(), found, strict=True):
        check(model, prompt, completion, 0.5)


def test_steps_follow_changed_weights(tokenizer: Tokenizer) -> None:
    """In place, and where a parameter is another one."""
    model = make("llama").cuda()
    engine = Engine(model, tokenizer)
    before = engine.generate(prompts(), PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    changed = engine.generate(prompts(), PARAMS)
    assert changed != before
    for prompt, found in zip(prompts(), changed, strict=True):
        check(model, prompt, found, 2e-3)
    matrix: Any = model.layers[0].get_submodule("ffn.down")
    matrix.weight = torch.nn.Parameter(torch.randn_like(matrix.weight))
    for prompt, found in zip(prompts(), engine.generate(prompts(), PARAMS), strict=True):
        check(model, prompt, found, 2e-3)


@pytest.mark.parametrize("options", PROCESSORS, ids=str)
def test_choice_as_on_a_processor(options: dict[str, Any], tokenizer: Tokenizer) -> None:
    logits = torch.randn(4, 330, generator=torch.Generator().manual_seed(0)) * 3

    def tokens(device: str) -> tuple[Tensor, list[int]]:
        params = [SamplingParams(seed=seed, **options) for seed in range(4)]
        rows = [Row([1, 2, 3, 1, 2], own, tokenizer) for own in params]
        processed = process(logits.to(device), rows, params)
        return processed.cpu(), choose(processed, rows, params).tolist()

    (theirs, expected), (ours, found) = tokens("cpu"), tokens("cuda")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert found == expected


def test_deterministic_mode_is_refused(tokenizer: Tokenizer) -> None:
    engine = Engine(make("llama").cuda(), tokenizer, deterministic=True)
    with pytest.raises(UserError, match="on a processor only"):
        engine.generate([[1, 2]], PARAMS)
