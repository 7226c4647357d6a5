"""The LoRA experiment: what it measures, how it chooses, verdicts both ways; the whole on tiny models."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from danlu.core.errors import UserError
from danlu.evaluate.intervals import relative_change
from danlu.model.checkpoint import save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.papers import arms, lora, rows
from danlu.papers.config import ReproduceConfig
from danlu.tokens.bpe import train_bpe
from danlu.tokens.chat import render
from danlu.tokens.shards import Shards, ShardWriter
from danlu.tokens.tokenizer import Tokenizer

SIZES = ModelConfig(
    vocab_size=320, width=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_width=64, max_positions=64
)


def question(chance: random.Random) -> dict[str, str]:
    a, b = chance.randrange(100), chance.randrange(100)
    return {"question": f"What is {a} and {b}?", "answer": f"{a} and {b} is <<{a}+{b}>> {a + b}."}


def story(chance: random.Random) -> str:
    words = ["the", "cold", "furnace", "waits", "for", "gold", "river", "night", "and", "opens", "slowly"]
    return " ".join(chance.choice(words) for _ in range(30)) + ".\n"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What $DANLU_DATA would hold, smaller."""
    chance = random.Random(0)
    texts = {
        "gsm8k/train.jsonl.gz": "".join(json.dumps(question(chance)) + "\n" for _ in range(200)),
        "wikitext2/valid.txt.gz": "".join(story(chance) for _ in range(300)),
        "tinyshakespeare/input.txt.gz": "".join(story(chance) for _ in range(900)),
    }
    for name, text in texts.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(gzip.compress(text.encode()))
    monkeypatch.setenv("DANLU_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def make_tokenizer() -> Tokenizer:
    chance = random.Random(1)
    return train_bpe([*(" ".join(question(chance).values()) for _ in range(50)), story(chance)], 320)


def test_the_rate_is_found_downhill_and_nothing_is_run_twice() -> None:
    for start in range(-8, 3):
        asked: list[int] = []

        def loss(k: int, asked: list[int] = asked) -> float:
            asked.append(k)
            return abs(k + 3.2)

        assert arms.best_rate(loss, start) == -3
        assert len(asked) == len(set(asked)) == abs(start + 3) + 3


def test_nats_of_documents_are_those_of_transformers(tmp_path: Path) -> None:
    """Documents of all lengths side by side, long ones in windows, masked tokens left out."""
    torch.manual_seed(0)
    model = Transformer(SIZES).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    save_model(model, tmp_path / "model", make_tokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    chance = np.random.default_rng(0)
    writer = ShardWriter(tmp_path, "chat", 320, "")
    documents = []
    for size in (5, 1, 17, 70, 33, 2):
        ids, mask = chance.integers(0, 320, size).tolist(), (chance.random(size) < 0.6).tolist()
        documents.append((ids, mask))
        writer.add(ids, mask)
    writer.close()
    length = 32
    want = []
    for ids, mask in documents:
        total = 0.0
        for target in range(1, len(ids)):
            start = (target - 1) // length * length
            with torch.no_grad():
                logits = theirs(torch.tensor([ids[start:target]])).logits[0, -1]
            total -= mask[target] * float(logits.log_softmax(0)[ids[target]])
        want.append(total)
    got = arms.document_nats(model, Shards(tmp_path), length, rows=3)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert arms.learnt_tokens(Shards(tmp_path)) == [sum(mask[1:]) for _, mask in documents]


def test_rows_are_different_ones_that_fit(data: Path, tmp_path: Path) -> None:
    alpaca = [{"instruction": "Say hi.", "input": "", "output": "Hi."}] * 2
    alpaca += [{"instruction": "Count.", "input": "to 3", "output": " ".join("123" * 50)}]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    found = list(rows.instructions(tmp_path / "alpaca.json"))
    assert [d.text for d in found] == ["A: Say hi.\nB: Hi.\n"] * 2 + [
        f"A: Count.\n\nto 3\nB: {' '.join('123' * 50)}\n"
    ]
    tokenizer = make_tokenizer()
    assert [d.id for d in rows.fitting(iter(found), tokenizer, 40)] == ["1"]
    source = rows.row_source(ReproduceConfig(name="lora"))
    fitting = list(rows.fitting(rows.instructions(source), tokenizer, 60))
    lengths = [len(render(d.messages or [], tokenizer).ids) for d in fitting]
    assert max(lengths) <= 60
    assert len({d.text for d in fitting}) == len(fitting) > 100
    with pytest.raises(UserError, match=r"train\.jsonl\.gz: .* of 900 for train"):
        rows.split(iter(fitting), 900, 10, tmp_path / "split", str(source))


def test_without_rows_it_says_where_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DANLU_DATA", raising=False)
    with pytest.raises(UserError, match="no instruction rows") as error:
        rows.row_source(ReproduceConfig(name="lora"))
    assert "--data" in error.value.remedy


def test_claims_can_come_out_either_way() -> None:
    full = [1.0, 1.1, 1.05]
    near, far = [x + 0.02 for x in full], [x + 0.2 for x in full]
    noisy = [1.0, 1.2, 0.95]
    assert lora.close_claim("", near, full).verdict == "holds"
    assert lora.close_claim("", far, full).verdict == "does not hold"
    assert lora.close_claim("", noisy, full).verdict == "does not hold"
    assert lora.worse_claim("", far, full).verdict == "holds"
    assert lora.worse_claim("", near, full).verdict == "does not hold"
    before = list(np.random.default_rng(0).uniform(50, 100, 60))
    assert lora.gain_claim([0.9 * x for x in before], before).verdict == "holds"
    assert lora.gain_claim([0.98 * x for x in before], before).verdict == "does not hold"
    uncertain = [x * (0.5 if n % 2 else 1.38) for n, x in enumerate(before)]
    assert relative_change(uncertain, before)[0] < -0.03
    assert lora.gain_claim(uncertain, before).verdict == "does not hold"
    assert lora.forgetting_claim([1.01 * x for x in before], before).verdict == "holds"
    assert lora.forgetting_claim([1.03 * x for x in before], before).verdict == "does not hold"


@pytest.mark.slow
def test_the_whole_experiment_on_tiny_models(data: Path, tmp_path: Path) -> None:
    """It runs, measures what it says, and takes what is there when it is run again."""
    torch.manual_seed(0)
    save_model(Transformer(SIZES), tmp_path / "base", make_tokenizer())
    setup = lora.Setup(
        base=str(tmp_path / "base"),
        rows=60,
        held_out=20,
        pieces=10,
        piece=200,
        steps=12,
        length=64,
        ranks=(1, 16),
        seeds=2,
        scratch=SIZES.model_copy(update={"vocab_size": 300}),
        scratch_steps=12,
        scratch_batch=4,
    )
    config = ReproduceConfig(name="lora")
    result = lora.run(config, tmp_path / "out", setup)
    assert len(result.claims) == 7
    assert result.controls[0].null
    figures = result.figures
    assert figures["rows"].endswith("gsm8k/train.jsonl.gz")
    assert figures["r = 16"]["loss"] < figures["loss_before"] - 0.1
    assert figures["r = 1"]["share_trained"] * 16 == pytest.approx(figures["r = 16"]["share_trained"])
    for arm in ("all weights", "r = 16", "r = 1"):
        assert figures[arm]["loss"] in figures[arm]["rates_tried"].values()
        assert len(figures[arm]["rates_tried"]) >= 3
    assert figures["r = 16"]["loss"] == figures["r = 16"]["loss_by_seed"][0]
    assert not list((tmp_path / "out/runs").glob("*/model"))
    assert (tmp_path / "out/plot.png").is_file()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").glob("*.json")}
    again = lora.run(config, tmp_path / "out", setup)
    assert again.claims == result.claims
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").glob("*.json")} == before
