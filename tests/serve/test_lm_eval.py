"""lm-evaluation-harness over HTTP: the same numbers as on the engine at hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from serving import ROOT, Server, serving
from small_models import save_random_model

from danlu.evaluate.harness import EngineLM
from danlu.generate.engine import Engine
from danlu.model.checkpoint import load
from danlu.tokens.bpe import train_bpe

pytestmark = pytest.mark.slow

TASKS = ROOT / "recipes/tasks"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([(TASKS / "furnace.jsonl").read_text("utf-8")], 400)
    return save_random_model(tmp_path_factory.mktemp("random") / "model", tokenizer, noise=0.1)


@pytest.fixture(scope="module")
def server(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(f"random={saved}", "--dtype", "float32", folder=folder) as server:
        yield server
        server.settled()


def score(model: Any, arguments: str = "", **more: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model,
        model_args=arguments,
        tasks=["furnace"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **more,
    )
    assert found is not None
    return found


def test_multiple_choice_scores_the_same(
    server: Server, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = (
        f"model=random,base_url={server.url}/v1/completions,tokenizer={saved},"
        "num_concurrent=4,max_length=512,tokenizer_backend=huggingface,add_bos_token=True"
    )
    over_http = score("local-completions", arguments)
    at_hand = score(EngineLM(Engine(*load(saved, torch.float32))))
    mine, theirs = over_http["results"]["furnace"], at_hand["results"]["furnace"]
    for name, value in theirs.items():
        if isinstance(value, float):
            assert mine[name] == pytest.approx(value, abs=1e-4), name
    pairs = list(zip(over_http["samples"]["furnace"], at_hand["samples"]["furnace"], strict=True))
    assert len(pairs) >= 10
    for one, other in pairs:
        for (mine, greedy), (theirs, as_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert mine == pytest.approx(theirs, abs=1e-4)
            assert greedy == as_greedy


def test_chat_completions_answer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of generation, through messages."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Say {word}.", "answer": word} for word in ("gold", "iron", "tin")]
    (tmp_path / "say.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "say.yaml").write_text(
        "task: say\ndataset_path: json\ndataset_kwargs: {data_files: {test: say.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    found = simple_evaluate(
        "local-chat-completions",
        model_args=f"model=random,base_url={server.url}/v1/chat/completions,num_concurrent=2",
        tasks=["say"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    answers = [sample["resps"][0][0] for sample in found["samples"]["say"]]
    assert len(answers) == 3
    assert all(isinstance(answer, str) for answer in answers)
