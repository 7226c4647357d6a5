"""`danlu eval --tasks`: benchmarks by lm-evaluation-harness on danlu's engine, and how sure each score is.

The harness builds the prompts and scores the answers; what it finds is kept in its own JSON. Every answer is
also kept by its request as soon as it is there, so that an interrupted evaluation goes on where it stopped.
"""

import contextlib
import hashlib
import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from danlu import __version__
from danlu.core.config import nearest
from danlu.core.device import cache_folder
from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.progress import clock
from danlu.core.show import console, table
from danlu.evaluate.card import arguments, calibration, is_choice, write_card
from danlu.evaluate.config import EvalConfig, TasksConfig
from danlu.evaluate.contamination import clean_and_dirty, documents_of, mark, training_texts
from danlu.evaluate.harness import (
    CachingLM,
    EngineLM,
    TaskManager,
    evaluate,
    lm_eval_version,
    load_yaml,
    metric_registry,
)
from danlu.evaluate.intervals import bootstrap_interval, mean_of_shares_interval, wilson_interval
from danlu.evaluate.prompting import Prompter, choose_examples
from danlu.evaluate.sets import located
from danlu.generate.engine import Engine
from danlu.generate.generate import load_for_engine
from danlu.model.checkpoint import base_digest, resolve

PACKS = Path(__file__).with_name("packs")
"""Tasks that need no network."""


def run_tasks(config: EvalConfig) -> dict[str, Any]:
    """Writes `results.json` and `samples_TASK.jsonl` into the stage's folder. Raises UserError."""
    begin = time.monotonic()
    with _quiet():
        loaded = find_tasks(config.tasks)
        for name, task in loaded["tasks"].items():
            _set_shots(task, config)
            check_task(name, task)
            choose_examples(task, config.prompting.examples, config.seed)
        if (
            config.url
            and config.chat
            and config.prompting.model_dump(exclude_defaults=True).keys() - {"examples"}
        ):
            raise UserError(
                "a server renders conversations itself: what the model thinks can't be put behind them",
                "leave out --chat or the prompting, or evaluate the model at hand",
            )
        model = model_of(config)
        kept: Any = CachingLM(model, f"{_cache(config)}.db") if config.cache else model
        prompter = Prompter(kept, loaded["tasks"], config.prompting)
        found = _asked(prompter if prompter.differs else kept, loaded, config)
    samples: dict[str, list[dict[str, Any]]] = found.pop("samples")
    for row in (row for rows in samples.values() for row in rows):
        if thoughts := prompter.thoughts.get(str(arguments(row)[0][0])):
            row["thoughts"] = thoughts
    training = _training(config)
    if training:
        mark(samples, training)
    for name, rows in samples.items():
        with atomic_write(config.out / f"samples_{name}.jsonl") as file:
            for row in rows:
                file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
    with atomic_write(config.out / "results.json") as file:
        json.dump(_plain(found), file, indent=2, ensure_ascii=False)
    result = {
        "scores": [score for name, rows in samples.items() for score in scores_of(name, rows, found)],
        "calibration": {name: calibration(rows) for name, rows in samples.items() if is_choice(rows[0])},
        "cut_contexts": _n_cut(model, samples) + prompter.cut,
        "seconds": time.monotonic() - begin,
        "tokens_computed": model.engine.scheduler.computed if isinstance(model, EngineLM) else None,
    }
    about = {"model": str(config.model), "summary": summary(config, result)}
    write_card(result, samples, about, config.out / "report.html")
    return {**result, "report": str(config.out / "report.html")}


def _training(config: EvalConfig) -> list[Path]:
    """Files with the text that the model was trained on, where they are known."""
    if config.contamination is not None:
        return documents_of(config.contamination)
    return [] if config.url or config.model is None else training_texts(resolve(str(config.model)))


def _set_shots(task: Any, config: EvalConfig) -> None:
    """As many examples as wanted, but for tasks that say 0: their prompts hold their own."""
    own = task.get_config("num_fewshot")
    if own != 0 and config.num_fewshot is not None:
        task.set_config("num_fewshot", config.num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=config.seed)


def _asked(lm: Any, loaded: Any, config: EvalConfig) -> dict[str, Any]:
    """The harness's results. Its `simple_evaluate` would spend seconds on a description of the machine."""
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    found: Any = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=config.limit or None,
        bootstrap_iters=0,
        apply_chat_template=config.chat,
        fewshot_as_multiturn=config.chat,
    )
    about = {"model": str(config.model), "limit": config.limit or None, "seed": config.seed}
    how = {"dtype": config.dtype, "prompting": config.prompting.model_dump()}
    return {**found, "config": {**about, **how}, "lm_eval_version": lm_eval_version}


def _n_cut(model: Any, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Contexts that lost their beginnings, also those whose answers were kept; a server refuses them."""
    if not isinstance(model, EngineLM):
        return 0
    asked = {
        (task, row["doc_id"], number): one
        for task, rows in samples.items()
        for row in rows
        for number, one in enumerate(arguments(row))
    }
    return sum(model.is_cut(one[0], one[1]) for one in asked.values())


def summary(config: EvalConfig, result: Mapping[str, Any]) -> list[str]:
    """What matters, in sentences."""
    scores = result["scores"]
    by_task = {score["task"]: score for score in scores}
    n = sum(score["n"] for score in by_task.values())
    asked = "through its chat template" if config.chat else "as text"
    if changed := config.prompting.model_dump(exclude_defaults=True):
        asked += f" ({', '.join(f'{key} {value}' for key, value in changed.items())})"
    of = "one task" if len(by_task) == 1 else f"{len(by_task)} tasks"
    told = [f"{n:,} questions of {of}, asked {asked}, in {clock(result['seconds'])}."]
    if result["tokens_computed"]:
        told.append(
            f"The model read {result['tokens_computed']:,} tokens, answers included; what questions have in "
            "common counts once, kept answers not at all."
        )
    if lost := [f"{score['task']} ({score['metric']})" for score in scores if score["at_chance"]]:
        told.append(f"No better than guessing: {', '.join(lost)}.")
    if result["cut_contexts"]:
        told.append(
            f"{result['cut_contexts']:,} contexts were too long for the model, and lost their beginnings."
        )
    return told


# What is asked, and of whom


def find_tasks(names: Sequence[str]) -> Any:
    """Tasks of danlu, of the harness, or of YAML files, as the harness loads them: "tasks" by name, "groups".

    Raises UserError for an unknown one, and for one that can't be loaded.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    manager = _manager()
    if unknown := [name for name in names if name not in files and not manager.match_tasks([name])]:
        raise UserError(
            f'there is no task "{unknown[0]}"{nearest(unknown[0], manager.all_tasks)}',
            "danlu eval tasks lists those that need no network; a YAML file ends in .yaml",
        )
    wanted: list[Any] = manager.match_tasks([name for name in names if name not in files])
    wanted += [task_of_file(Path(file)) for file in files]
    try:
        return manager.load(wanted)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the tasks {', '.join(names)} can't be loaded: {_said(error)}", _remedy(error)
        ) from None


@cache
def _manager() -> Any:
    """It reads the heads of some ten thousand files."""
    return TaskManager(include_path=str(PACKS))


def task_of_file(path: Path) -> dict[str, Any]:
    """A task's settings; data files that it names lie beside it, or where the command runs."""
    if not path.is_file():
        raise UserError(f"{path} is missing", "name a YAML file with a task of lm-evaluation-harness")
    try:
        task = dict(load_yaml(path, resolve_func=True))
    except Exception as error:
        raise UserError(f"{path}: not a task: {_said(error)}", "docs/evaluate.md shows one") from None
    needed = {"task", "doc_to_text", "doc_to_target"} - task.keys()
    if needed:
        raise UserError(f"{path}: {', '.join(sorted(needed))} is missing", "docs/evaluate.md shows a task")
    for metric in task.get("metric_list") or []:
        name = metric.get("metric")
        known = "process_results" in task or metric.get("hf_evaluate") or not isinstance(name, str)
        if not known and name not in metric_registry:
            raise UserError(f'{path}: metric "{name}" is unknown{nearest(name, metric_registry)}', "mend it")
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        for split, name in files.items():
            places = [Path(name), path.parent / name, path.parent / Path(name).name]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise UserError(f"{path}: the {split} file {name} is missing", "mend its path")
            files[split] = str(found)
    return task


def check_task(name: str, task: Any) -> None:
    """Every question, before any is asked. Raises UserError with the first that can't be, and why."""
    docs = task.eval_docs
    if len(docs) == 0:
        raise UserError(f"the task {name} has no questions", "mend its data, or its split")
    for number, doc in enumerate(docs, 1):
        where = f"{name}, question {number}"
        try:
            text, target = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
        except Exception as error:
            raise UserError(f"{where}: {_said(error)}", "mend the row, or the task's fields") from None
        if not isinstance(text, str | int):
            raise UserError(f"{where}: its text is a {type(text).__name__}", "doc_to_text gives a text")
        if choices is not None:
            if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
                raise UserError(f"{where}: its choices are {choices!r}", "give at least two texts")
            if isinstance(target, int) and not 0 <= target < len(choices):
                raise UserError(
                    f"{where}: the answer is number {target} of {len(choices)} choices, counted from 0",
                    "mend the row",
                )
    if shots := task.get_config("num_fewshot"):
        pool = task.fewshot_docs()
        if pool is None or len(pool) < shots:
            found = 0 if pool is None else len(pool)
            raise UserError(f"{name} has {found} examples, {shots} are wanted", "set num_fewshot lower")


def model_of(config: EvalConfig) -> Any:
    """The engine, or a server that speaks OpenAI's API."""
    if not config.url:
        model, tokenizer, kind = load_for_engine(str(config.model), config.dtype, config.device)
        return EngineLM(Engine(model, tokenizer, dtype=kind))
    from danlu.evaluate.remote import ServedLM

    return ServedLM(config.url, str(config.model), config.chat)


def _cache(config: EvalConfig) -> Path:
    """Answers by request, of one model in one precision."""
    where = config.url or f"{base_digest(resolve(str(config.model)))} {config.dtype} {config.device}"
    made = f"{config.model} {where} {__version__}"
    return cache_folder() / "answers" / hashlib.sha256(made.encode()).hexdigest()[:16]


def list_tasks(_: TasksConfig) -> dict[str, Any]:
    """danlu's own tasks, and whether their data is here."""
    found = []
    for file in sorted(PACKS.glob("[!_]*.yaml")):
        settings = load_yaml(file, resolve_func=False)
        if "group" in settings:
            parts = ", ".join(settings["task"])
            found.append({"task": settings["group"], "kind": "several", "data": parts, "missing": ""})
            continue
        source = settings["dataset_kwargs"].get("source", "").partition("!")[0]
        missing = ""
        try:
            if source:
                located(source)
        except UserError as error:
            missing = error.message
        kind = "choice" if settings["output_type"] == "multiple_choice" else "answer"
        found.append({"task": settings["task"], "kind": kind, "data": source or "drawn", "missing": missing})
    return {"tasks": found}


def show_tasks(result: Mapping[str, Any]) -> None:
    rows = [(one["task"], one["kind"], one["data"], one["missing"]) for one in result["tasks"]]
    out = console()
    out.print(table("Tasks that need no network", ("task", "kind", "data", "missing"), rows))
    out.print("Those of lm-evaluation-harness can be named too, and YAML files of your own: docs/evaluate.md")


# What came out


def scores_of(task: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each metric of a task: its 95 % interval, what chance would give, and whether it is more than that."""
    scores = []
    for filtered in dict.fromkeys(row["filter"] for row in rows):
        own = [row for row in rows if row["filter"] == filtered]
        for metric in own[0]["metrics"]:
            values = [row[metric] for row in own]
            value = found["results"][task][f"{metric},{filtered}"]
            interval = _interval(values)
            chance = _chance(own) if metric.startswith("acc") else None
            scores.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": float(value),
                    "interval": interval,
                    "n": len(own),
                    "shots": found["n-shot"].get(task, 0),
                    "chance": chance,
                    "at_chance": chance is not None and interval[0] <= chance <= interval[1],
                    "version": found["versions"].get(task),
                    **_contamination(own, values),
                }
            )
    return scores


def _interval(values: Sequence[Any]) -> tuple[float, float]:
    """Of shares Wilson's, of the mean of subjects' shares from these; of other scores by bootstrap."""
    if isinstance(values[0], tuple | list):
        subjects: dict[Any, list[float]] = {}
        for subject, score in values:
            subjects.setdefault(subject, []).append(float(score))
        means = [float(np.mean(scores)) for scores in subjects.values()]
        if {score for scores in subjects.values() for score in scores} <= {0.0, 1.0}:
            counts = map(len, subjects.values())
            return mean_of_shares_interval(list(zip(means, counts, strict=True)))
        variance = sum(float(np.var(scores)) / len(scores) for scores in subjects.values())
        half = 1.959964 * variance**0.5 / len(subjects)
        return float(np.mean(means)) - half, float(np.mean(means)) + half
    numbers = [float(value) for value in values]
    if set(numbers) <= {0.0, 1.0}:
        return wilson_interval(float(np.mean(numbers)), len(numbers))
    return bootstrap_interval(numbers)


def _contamination(rows: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> dict[str, Any]:
    """Nothing where it isn't known what the model was trained on."""
    if "dirty" not in rows[0]:
        return {}
    numbers = [float(value[1] if isinstance(value, tuple | list) else value) for value in values]
    return clean_and_dirty(numbers, [row["dirty"] for row in rows])


def _chance(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """What guessing gets: one over the number of choices, in the mean; None where there are none."""
    counts = [len(row["arguments"]) for row in rows]
    return float(np.mean([1 / count for count in counts])) if min(counts) > 1 else None


def _plain(value: Any) -> Any:
    """As JSON can hold it; functions by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return getattr(value, "__name__", None) or str(value)


def _said(error: Exception) -> str:
    """The first line of what another library says."""
    text = str(error).strip().partition("\n")[0]
    return text[:300] or type(error).__name__


def _remedy(error: Exception) -> str:
    offline = "offline" in str(error).lower() or "connection" in str(error).lower()
    return "it needs the network; danlu eval tasks lists those that don't" if offline else "mend the task"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness speaks at length, and has bars of its own; what matters is in the result."""
    names = ("lm_eval", "lm-eval", "datasets", "filelock", "evaluate")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    bar = tqdm.__init__

    def no_bar(self: Any, *args: Any, **options: Any) -> None:
        bar(self, *args, **{**options, "disable": True})

    tqdm.__init__ = no_bar
    try:
        yield
    finally:
        tqdm.__init__ = bar
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
