"""One optimiser step, against transformers and plain torch."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.model import compiling
from danlu.model.checkpoint import hf_tensors
from danlu.model.compiling import compiled_layers, should_compile
from danlu.model.config import ModelConfig
from danlu.model.families import to_hf
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.config import OptimConfig
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

SIZES = ModelConfig(
    vocab_size=90, width=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=48, max_positions=64
)


def make() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SIZES)


def make_step(model: Transformer, **options: object) -> TrainStep:
    return TrainStep(model, make_optimizer(model, OptimConfig(lr=1e-2)), **options)


def ragged(rows: int, seed: int = 0) -> Batch:
    """Row i has a supervised token more than row i - 1; row 0 has one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (rows, 41), generator=generator)
    shape = (rows, 40)
    return Batch(
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        (torch.arange(40) <= torch.arange(rows)[:, None]).float(),
        torch.arange(40).expand(shape).contiguous(),
        torch.zeros(shape, dtype=torch.int32),
    )


def gradients(model: Transformer) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_a_step_is_that_of_transformers_and_torch() -> None:
    model, batch = make(), ragged(4)
    theirs = LlamaForCausalLM(LlamaConfig(**to_hf(SIZES), attn_implementation="eager"))
    theirs.load_state_dict(hf_tensors(SIZES, model.state_dict()), strict=False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    labels = batch.targets.masked_fill(batch.weights == 0, -100)
    step = make_step(model, clip=0.5)
    for _ in range(3):
        result = step.step([batch])
        logits = theirs(batch.ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.5
        assert result.count == 1 + 2 + 3 + 4
    want = dict(theirs.named_parameters())
    for name, parameter in hf_tensors(SIZES, dict(model.named_parameters())).items():
        torch.testing.assert_close(parameter, want[name], atol=1e-4, rtol=0)


def test_accumulation_counts_tokens_not_batches() -> None:
    model, batch = make(), ragged(8)
    step = make_step(model)
    whole = step.accumulate([batch]), gradients(model)
    model.zero_grad()
    parts = step.accumulate(batch.split(8)), gradients(model)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for a, b in zip(parts[1], whole[1], strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_nothing_supervised_is_an_error() -> None:
    batch = ragged(2)
    batch.weights.zero_()
    with pytest.raises(UserError, match="no supervised token"):
        make_step(make()).step([batch])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = make()
    with torch.no_grad():
        model.embedding.weight[ragged(2).ids[0, 0]] = torch.inf
    before = copy.deepcopy(model.state_dict())
    result = make_step(model).step([ragged(2)])
    assert not torch.isfinite(torch.tensor([result.loss, result.grad_norm])).all()
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_bfloat16_keeps_float32_weights_gradients_and_state() -> None:
    model = make()
    step = make_step(model, dtype=torch.bfloat16)
    step.accumulate([ragged(4)])
    assert {g.dtype for g in gradients(model)} == {torch.float32}
    losses = [step.step([ragged(4)]).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = [v for s in step.optimizer.state.values() for v in s.values() if v.ndim]
    assert {v.dtype for v in state} == {torch.float32}


def test_compiling_is_decided_by_size_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    assert not should_compile("auto", SIZES, 1000, 64)
    assert should_compile("auto", SIZES, 10**9, 64)
    assert should_compile("on", SIZES, 1, 64)
    assert not should_compile("off", SIZES, 10**12, 64)
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    assert not should_compile("auto", SIZES, 10**9, 64)
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        should_compile("on", SIZES, 1, 64)


def test_layers_are_plain_again_after_a_compiled_step() -> None:
    model = make()
    with compiled_layers(model):
        assert "before" in vars(model.layers[0])
    assert "before" not in vars(model.layers[0])


COMPILED = """
import hashlib, sys, torch
from tests.train.test_step import make, make_step, ragged
torch.use_deterministic_algorithms(True)
model = make()
step = make_step(model, dtype=torch.bfloat16, compile=sys.argv[1] == "compiled")
for i in range(6):
    result = step.step([ragged(4, seed=i)])
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
print(result.loss, digest.hexdigest())
"""


def run_steps(mode: str, environment: dict[str, str]) -> tuple[float, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, mode],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    loss, digest = done.stdout.split()
    return float(loss), digest


@pytest.mark.slow
@pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler")
def test_compiled_steps_are_the_same_to_the_bit(tmp_path: object) -> None:
    """With a cold and a warm cache, with another process on every core; and near the plain ones."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    cold = run_steps("compiled", cache)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        warm = run_steps("compiled", cache)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert cold == warm
    plain = run_steps("plain", {})
    assert plain[1] != cold[1]  # else the compiler did nothing
    assert plain[0] == pytest.approx(cold[0], rel=1e-3)
