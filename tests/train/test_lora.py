"""Training of adapters: on a frozen base, resumed to the bit, usable by name, merged."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MODEL, StopAt, config, run_until, weights_hash
from torch.distributed.checkpoint import FileSystemReader

import danlu
from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.model.config import MergeConfig
from danlu.model.lora import adapted_layers, use_adapter
from danlu.model.merge import merge_adapter
from danlu.model.quantised import QuantisedLinear
from danlu.train.config import TrainConfig
from danlu.train.pretrain import pretrain
from danlu.train.sft import sft

LORA = {"rank": 4, "alpha": 8.0}
SHORT = {"steps": 6, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def base(text_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pretrain"
    pretrain(config(text_tokens, folder, steps=20, eval_every=0, eval_batches=1, checkpoint_every=100))
    return folder


def lora_config(
    data: Path, out: Path, base: Path, lora: dict[str, Any] | None = None, **more: Any
) -> TrainConfig:
    values = {"model": None, "init_from": base, "lora": {**LORA, **(lora or {})}, **more}
    return config(data, out, **values)


@pytest.fixture(scope="module", params=["none", pytest.param("nf4", marks=pytest.mark.slow)])
def adapted(
    text_tokens: Path, base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A run that trained an adapter on `base`, kept in either way."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    more = {"quantise": request.param}
    pretrain(lora_config(text_tokens, folder, base, more, optim={"lr": 0.02}, **SHORT))
    return folder


def adapter_hash(out: Path) -> str:
    return hashlib.sha256((out / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(1))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kept", [pytest.param("none", marks=SLOW), pytest.param("int8", marks=SLOW), "nf4"])
def test_an_adapter_learns_and_is_a_model(chat_tokens: Path, base: Path, tmp_path: Path, kept: str) -> None:
    """The folder's model has the loss that the run measured; the base is as it was, and the files small."""
    before = weights_hash(base)
    settings = lora_config(
        chat_tokens,
        tmp_path / "sft",
        base,
        {"quantise": kept},
        steps=16,
        optim={"lr": 1e-2},
        eval_every=0,
        checkpoint_every=100,
        sample_prompts=["Hi"],
    )
    result = sft(settings)
    assert result.held_out_loss < result.held_out_loss_before - 0.1
    assert weights_hash(base) == before
    model, tokenizer = danlu.load(tmp_path / "sft")
    layers = adapted_layers(model)
    assert result.trained_parameters == sum(
        p.numel() for layer in layers.values() for p in layer.adapters.parameters()
    )
    packed = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    assert len(packed) == (0 if kept == "none" else len(layers))
    # What the run measured last is what the files give: one more step of nothing.
    again = pretrain_loss(tmp_path / "sft", chat_tokens, tmp_path / "again")
    assert again == pytest.approx(result.held_out_loss, rel=1e-5)
    assert danlu.Engine(model, tokenizer).generate(["The cat"], danlu_params())[0].ids
    newest = max((tmp_path / "sft/checkpoints").iterdir())
    saved = FileSystemReader(newest).read_metadata().state_dict_metadata
    assert all(".adapters." in name for name in saved if name.startswith(("model.", "optimizer.state.")))
    assert sum(value.size.numel() for name, value in saved.items() if name.startswith("model.")) == (
        result.trained_parameters
    )


def pretrain_loss(ref: Path, data: Path, out: Path) -> float:
    """Held-out loss of a model before a run's first step, adapters merged."""
    values = {"model": None, "init_from": ref, "steps": 1, "eval_every": 0}
    return sft(config(data, out, **values)).held_out_loss_before


def danlu_params() -> Any:
    from danlu.generate.sampling import SamplingParams

    return SamplingParams(max_tokens=3)


@pytest.mark.parametrize(
    "lora",
    [
        {"dropout": 0.3},
        pytest.param({"quantise": "nf4", "dora": True, "dropout": 0.1}, marks=SLOW),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(
    text_tokens: Path, base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    more = {**SHORT, "checkpoint_activations": True, "accumulate": 2, "steps": 5, "checkpoint_every": 2}
    whole = lora_config(text_tokens, tmp_path / "whole", base, lora, **more)
    pretrain(whole)
    stopped = lora_config(text_tokens, tmp_path / "stopped", base, lora, **more)
    for step in (3, 5):
        run_until(stopped, step)
    pretrain(stopped)
    assert adapter_hash(whole.out) == adapter_hash(stopped.out)
    curves = [[(r["step"], r["loss"]) for r in read_metrics(c.out) if "loss" in r] for c in (whole, stopped)]
    assert curves[0] == curves[1]


def test_bf16_keeps_the_base_in_bf16(text_tokens: Path, base: Path, tmp_path: Path) -> None:
    """A step in bf16 rounds the weights anyway: the losses of a base kept in either way are equal."""
    from danlu.train import run
    from danlu.train.optim import make_optimizer
    from danlu.train.step import TrainStep

    settings = lora_config(text_tokens, tmp_path / "run", base)
    losses = []
    for kept in (torch.bfloat16, torch.float32):
        torch.manual_seed(1)
        data = run.Data(settings, "text")
        model = run.build_model(settings, data.tokenizer, torch.device("cpu"))
        run.adapt(model, settings.lora, kept)
        step = TrainStep(model, make_optimizer(model, settings.optim), dtype=torch.bfloat16)
        batches = iter(data.loader(settings))
        losses.append([step.step([next(batches)]).loss for _ in range(3)])
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not p.requires_grad]
        assert {p.dtype for p in matrices} == {kept}
    assert losses[0] == losses[1]


def test_another_base_is_refused(text_tokens: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    settings = lora_config(text_tokens, tmp_path / "run", tmp_path / "base", steps=1, eval_batches=1)
    pretrain(settings)
    shutil.move(tmp_path / "base", tmp_path / "away")
    with pytest.raises(UserError, match="is gone"):
        danlu.load(tmp_path / "run")
    pretrain(config(text_tokens, tmp_path / "base", steps=1, eval_batches=1))
    with pytest.raises(UserError, match="another content than the base"):
        danlu.load(tmp_path / "run")
    with pytest.raises(UserError, match="an adapter for another base"):
        pretrain(settings, StopAt(1))
    shutil.rmtree(tmp_path / "base")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    written = json.loads((tmp_path / "moved/adapter/danlu_base.json").read_text())
    written["reference"] = str(tmp_path / "away")
    (tmp_path / "moved/adapter/danlu_base.json").write_text(json.dumps(written))
    danlu.load(tmp_path / "moved")


def test_merged_gives_the_logits_of_the_adapter(adapted: Path, tmp_path: Path) -> None:
    import transformers

    result = merge_adapter(MergeConfig(adapter=adapted, out=tmp_path / "merged"))
    unmerged, _ = danlu.load(adapted)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        want, got = unmerged(IDS), theirs(IDS).logits
        use_adapter(unmerged, None)
        plain = unmerged(IDS)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (want - plain).abs().max() > 0.05 * want.abs().max()  # the adapter does something
    written = json.loads((tmp_path / "merged/merge.json").read_text())
    assert written["largest_difference"] == result["largest_difference"] > 0
    assert f"{result['largest_difference']:.3g}" in (tmp_path / "merged/README.md").read_text()
    danlu.load(tmp_path / "merged")


def test_a_merge_that_differs_is_an_error_and_leaves_nothing(
    adapted: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the merged model's logits differ"):
        merge_adapter(MergeConfig(adapter=adapted, out=tmp_path / "merged", tolerance=1e-12))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="is no adapter"):
        merge_adapter(MergeConfig(adapter=base, out=tmp_path / "merged"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None, "model": MODEL}, "lora needs init_from"),
        ({"optim": {"name": "muon"}}, "trained by adamw"),
        ({"parallel": "fsdp"}, "isn't spread"),
        ({"compile": "on", "lora": {"quantise": "int8"}}, "isn't compiled"),
    ],
)
def test_settings_that_do_not_go_with_an_adapter(
    text_tokens: Path, base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora_config(text_tokens, tmp_path, base, **changes)


def test_an_adapter_on_an_adapter_is_refused(text_tokens: Path, adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="danlu merge"):
        pretrain(lora_config(text_tokens, tmp_path / "second", adapted, steps=1))


@pytest.mark.slow
def test_compiled_steps_are_those_of_plain_ones(text_tokens: Path, base: Path, tmp_path: Path) -> None:
    losses = []
    for compile in ("off", "on"):
        settings = lora_config(text_tokens, tmp_path / compile, base, compile=compile, steps=6)
        pretrain(settings)
        losses.append([row["loss"] for row in read_metrics(settings.out) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
