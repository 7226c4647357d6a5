import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MODEL, VOCABULARY, StopAt, config, run_until, weights_hash

from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.tokens.load import load_tokenizer
from danlu.tokens.loader import Batch, held_out_batches
from danlu.tokens.shards import Shards
from danlu.train.checkpoint import load_weights_and_moments
from danlu.train.journal import read_samples
from danlu.train.loop import Hooks
from danlu.train.pretrain import pretrain
from danlu.train.sft import sft


def test_a_run_learns_and_tells(text_tokens: Path, tmp_path: Path) -> None:
    settings = config(
        text_tokens, tmp_path, steps=60, eval_every=20, sample_prompts=["the cat"], sample_every=30
    )
    result = pretrain(settings)
    assert result.held_out_loss is not None
    assert result.held_out_loss < math.log(VOCABULARY) - 0.5
    rows = read_metrics(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert {"lr", "grad_norm", "tokens", "tokens_per_second", "memory", "epoch"} <= steps[0].keys()
    assert steps[-1]["tokens"] == result.tokens == 60 * 4 * 32
    assert [row["step"] for row in rows if "held_out_loss" in row] == [20, 40, 60]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [(30, "the cat"), (60, "the cat")]
    logbook = (tmp_path / "logbook.md").read_text("utf-8")
    assert all(word in logbook for word in ("started", "held-out loss", "finished"))


def test_bits_per_byte_equals_the_loss_over_the_bytes(text_tokens: Path, tmp_path: Path) -> None:
    """By decoding what was predicted: nats / ln 2 / bytes of the held-out text."""
    result = pretrain(config(text_tokens, tmp_path, eval_batches=0))
    tokenizer = load_tokenizer(text_tokens / "tokenizer")
    targets: list[int] = []
    for batch in held_out_batches(Shards(text_tokens / "held_out"), 4, 32):
        targets += batch.targets[batch.weights > 0].tolist()
    text = [token for token in targets if token not in tokenizer.special_ids.values()]
    nats = result.held_out_loss * len(targets)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(tokenizer.decode_bytes(text)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_equals_never_stopped(text_tokens: Path, tmp_path: Path, optimizer: str) -> None:
    change = {"optim": {"name": optimizer, "lr": 3e-3}}
    whole = config(text_tokens, tmp_path / "whole", **change)
    pretrain(whole)
    stopped = config(text_tokens, tmp_path / "stopped", **change)
    for step in (3, 7, 10, 12):
        run_until(stopped, step)
    pretrain(stopped)
    assert weights_hash(whole.out) == weights_hash(stopped.out)
    assert "resumed from the checkpoint of step 8" in (stopped.out / "logbook.md").read_text("utf-8")
    for key in ("loss", "held_out_loss"):
        curves = [[(r["step"], r[key]) for r in read_metrics(c.out) if key in r] for c in (whole, stopped)]
        assert curves[0] == curves[1]


def test_a_finished_run_is_not_trained_again(text_tokens: Path, tmp_path: Path) -> None:
    settings = config(text_tokens, tmp_path)
    first = pretrain(settings)
    assert pretrain(settings, StopAt(1)) == first


def test_a_resume_against_other_data_is_refused(text_tokens: Path, tmp_path: Path) -> None:
    run_until(config(text_tokens, tmp_path / "run"), 6)
    shutil.copytree(text_tokens, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "train")
    shutil.copytree(text_tokens / "held_out", tmp_path / "other" / "train")
    with pytest.raises(UserError, match="other data"):
        pretrain(config(tmp_path / "other", tmp_path / "run"))


def test_a_resume_with_other_maths_names_the_keys(text_tokens: Path, tmp_path: Path) -> None:
    run_until(config(text_tokens, tmp_path), 6)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.003 → 0\.001"):
        pretrain(config(text_tokens, tmp_path, optim={"lr": 1e-3}))
    pretrain(config(text_tokens, tmp_path, eval_every=3, log_every=2))  # these leave the weights alone


class Poison(Hooks):
    """Ten batches of random targets; ends the run at the `stop_after`-th update, going back included."""

    def __init__(self, stop_after: int = 0) -> None:
        self.left = stop_after

    def batches(self, index: int, batches: list[Batch]) -> list[Batch]:
        if 60 < index <= 70:
            generator = torch.Generator().manual_seed(index)
            for batch in batches:
                batch.targets.copy_(torch.randint(VOCABULARY, batch.targets.shape, generator=generator))
        self.left -= 1
        if self.left == 0:
            raise ConnectionAbortedError
        return batches


@pytest.mark.parametrize("remedy", ["opt", "palm"])
def test_the_guard_goes_back_and_says_so(text_tokens: Path, tmp_path: Path, remedy: str) -> None:
    guard = {"remedy": remedy, "threshold": 4, "window": 20, "rollback": 5, "skip_after": 10}
    settings = config(text_tokens, tmp_path, steps=90, guard=guard, eval_every=0, keep_checkpoints=8)
    result = pretrain(settings, Poison())
    assert result.interventions == 1
    assert f"remedy {remedy}" in (tmp_path / "logbook.md").read_text("utf-8")
    rows = read_metrics(tmp_path)
    (event,) = [row for row in rows if row.get("event") == "guard"]
    assert event["step"] <= (60 if remedy == "opt" else 55)
    rates = [row["lr"] for row in rows if row["step"] == event["step"] + 1 and "lr" in row]
    assert (rates[1] < rates[0] / 5) == (remedy == "opt")


@pytest.mark.parametrize("remedy", ["opt", "palm"])
def test_a_kill_after_the_guard_acted_changes_nothing(text_tokens: Path, tmp_path: Path, remedy: str) -> None:
    guard = {"remedy": remedy, "threshold": 4, "window": 20, "rollback": 5, "skip_after": 10}
    changes = {"steps": 90, "guard": guard, "eval_every": 0}
    whole = config(text_tokens, tmp_path / "whole", **changes)
    assert pretrain(whole, Poison()).interventions == 1
    killed = config(text_tokens, tmp_path / "killed", **changes)
    for updates in (66, 30):  # soon after going back, before the next checkpoint, and later
        with pytest.raises(ConnectionAbortedError):
            pretrain(killed, Poison(stop_after=updates))
    pretrain(killed, Poison())
    assert weights_hash(whole.out) == weights_hash(killed.out)


class Nan(Hooks):
    def learning_rate(self, step: int, scale: float) -> float:
        return math.nan if step == 6 else scale


def test_nan_without_a_guard_ends_the_run_with_a_remedy(text_tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nan at step 7") as error:
        pretrain(config(text_tokens, tmp_path, guard={"remedy": "off"}), Nan())
    assert "guard.remedy" in error.value.remedy


def test_accumulated_batches_give_the_same_run(text_tokens: Path, tmp_path: Path) -> None:
    losses = []
    for accumulate in (1, 4):
        settings = config(text_tokens, tmp_path / str(accumulate), accumulate=accumulate)
        losses.append(
            [pretrain(settings).loss, *(r["loss"] for r in read_metrics(settings.out) if "loss" in r)]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_checkpoint_holds_the_final_weights(text_tokens: Path, tmp_path: Path) -> None:
    from danlu.model.checkpoint import load_model
    from danlu.model.transformer import Transformer
    from danlu.train.optim import make_optimizer

    settings = config(text_tokens, tmp_path)
    pretrain(settings)
    final = load_model(tmp_path / "model")
    other = Transformer(final.config)
    load_weights_and_moments(
        tmp_path / "checkpoints" / "step-00000012", other, make_optimizer(other, settings.optim)
    )
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), other.parameters(), strict=True))


def test_fine_tuning_lowers_the_held_out_loss_on_replies(
    text_tokens: Path, chat_tokens: Path, tmp_path: Path
) -> None:
    pretrain(config(text_tokens, tmp_path / "pretrain"))
    result = sft(
        config(
            chat_tokens,
            tmp_path / "sft",
            model=None,
            init_from=tmp_path / "pretrain",
            steps=40,
            eval_batches=0,
        )
    )
    assert result.held_out_loss is not None
    assert result.held_out_loss_before is not None
    assert result.held_out_loss < result.held_out_loss_before


def test_a_run_ends_where_enough_is_learnt(text_tokens: Path, tmp_path: Path) -> None:
    """At the first evaluation that is good enough, also when it is called again."""
    options: dict[str, Any] = {"steps": 40, "checkpoint_every": 100, "sample_prompts": ["A"]}
    whole = pretrain(config(text_tokens, tmp_path / "whole", **options))
    rows = [row for row in read_metrics(tmp_path / "whole") if "held_out_loss" in row]
    enough = rows[3]["held_out_loss"]
    assert min(row["held_out_loss"] for row in rows[:3]) > enough
    found = pretrain(config(text_tokens, tmp_path / "ended", **options, stop_loss=enough))
    assert (found.steps, found.held_out_loss) == (rows[3]["step"], enough)
    assert whole.steps == 40
    assert "at most stop_loss" in (tmp_path / "ended" / "logbook.md").read_text("utf-8")
    assert len(read_samples(tmp_path / "ended")) == 1
    (tmp_path / "ended" / "model" / "model.safetensors").unlink()
    again = pretrain(config(text_tokens, tmp_path / "ended", **options, stop_loss=enough))
    assert (again.steps, again.held_out_loss) == (found.steps, found.held_out_loss)
    cut = pretrain(config(text_tokens, tmp_path / "cut", **{**options, "steps": found.steps}))
    assert cut.held_out_loss == pytest.approx(found.held_out_loss, rel=0.2)


def test_conversations_that_are_too_long_are_said(
    text_tokens: Path, chat_tokens: Path, tmp_path: Path
) -> None:
    pretrain(config(text_tokens, tmp_path / "text", steps=1))
    start = {"model": None, "init_from": tmp_path / "text", "steps": 1}
    sft(config(chat_tokens, tmp_path / "chat", **start))
    shards = Shards(chat_tokens / "train")
    documents = [shards[number] for number in range(len(shards))]
    longer = [mask[1:33].any() for ids, mask in documents if len(ids) > 33]
    logbook = (tmp_path / "chat" / "logbook.md").read_text("utf-8")
    assert f"{sum(longer)} lose their end, {longer.count(False)} are left out" in logbook
    with pytest.raises(UserError, match="no reply begins within sequence_length 4"):
        sft(config(chat_tokens, tmp_path / "none", **start, sequence_length=4))


def test_continued_pretraining_starts_from_the_model(text_tokens: Path, tmp_path: Path) -> None:
    first = pretrain(config(text_tokens, tmp_path / "a", steps=40, eval_batches=0))
    second = pretrain(
        config(text_tokens, tmp_path / "b", model=None, init_from=tmp_path / "a", steps=2, eval_batches=0)
    )
    assert second.held_out_loss_before == pytest.approx(first.held_out_loss, rel=1e-6)


INTERRUPTED = """
import json, sys
from danlu.train.config import TrainConfig
from danlu.train.pretrain import pretrain
try:
    pretrain(TrainConfig.model_validate(json.loads(sys.argv[1])))
except KeyboardInterrupt:
    sys.exit(77)
"""


def test_sigterm_ends_the_run_after_a_checkpoint(text_tokens: Path, tmp_path: Path) -> None:
    settings = config(text_tokens, tmp_path, steps=100_000, checkpoint_every=50_000, eval_every=0)
    command = [sys.executable, "-c", INTERRUPTED, settings.model_dump_json()]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while len(read_metrics(tmp_path)) < 5:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 77
    last = read_metrics(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{last:08}" / "state.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 128}, "sequence_length 128 is beyond"),
        ({"model": {**MODEL, "vocab_size": 77}}, "model.vocab_size is 77"),
        ({"batch_size": 5, "accumulate": 2}, "batch_size 5"),
        ({"init_from": "nowhere"}, "model and init_from"),
        ({"model": None, "init_from": "nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_one_message_and_leave_nothing(
    text_tokens: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(config(text_tokens, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_data_that_is_no_tokens_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train in it"):
        pretrain(config(tmp_path / "nowhere", tmp_path / "run"))


def test_each_verb_wants_its_kind_of_tokens(text_tokens: Path, chat_tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learns from text"):
        pretrain(config(chat_tokens, tmp_path))
    with pytest.raises(UserError, match="learns from chat"):
        sft(config(text_tokens, tmp_path, model=None, init_from=tmp_path))
