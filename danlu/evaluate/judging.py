"""`danlu eval answer` and `danlu eval judge`: MT-bench, or other questions, answered and judged by models.

Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena": 80 questions of two turns; each
turn is graded, or compared with another model's, the second with the whole conversation before the judge.
Questions of mathematics, reasoning and code are judged beside a reference answer.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.show import console, table
from danlu.data.conversations import Messages
from danlu.data.documents import read_rows
from danlu.evaluate.calibration import choice_probabilities
from danlu.evaluate.config import AnswerConfig, JudgeConfig
from danlu.evaluate.intervals import bootstrap_interval, wilson_interval
from danlu.evaluate.judge import (
    PAIR,
    SINGLE,
    Judge,
    JudgePrompt,
    both_orders,
    grades,
    read_prompts,
    win_rate,
)
from danlu.evaluate.sets import located
from danlu.generate.engine import Engine
from danlu.generate.generate import load_for_engine
from danlu.generate.sampling import SamplingParams

MT_BENCH = "mt-bench"
QUESTIONS = "data:fastchat/mt_bench_question.jsonl"
REFERENCES = "data:fastchat/mt_bench_reference_gpt-4.jsonl"
EXACT = ("math", "reasoning", "coding")
"""Categories that are judged beside a reference."""

PAIR_TURNS = JudgePrompt(
    PAIR.system + " There are two questions; judge the answers to the second.",
    "First conversation:\n\nQuestion: {question_1}\nAnswer: {answer_a_1}\nQuestion: {question_2}\n"
    "Answer: {answer_a_2}\n\nSecond conversation:\n\nQuestion: {question_1}\nAnswer: {answer_b_1}\n"
    "Question: {question_2}\nAnswer: {answer_b_2}",
)
SINGLE_TURNS = JudgePrompt(
    SINGLE.system + " There are two questions; grade the answer to the second.",
    "Question: {question_1}\nAnswer: {answer_1}\nQuestion: {question_2}\nAnswer: {answer_2}",
)
OURS = {
    "single": SINGLE,
    "single-turns": SINGLE_TURNS,
    "pair": PAIR,
    "pair-turns": PAIR_TURNS,
}
FASTCHAT = {
    "single": "single-v1",
    "single-turns": "single-v1-multi-turn",
    "single-math": "single-math-v1",
    "single-math-turns": "single-math-v1-multi-turn",
    "pair": "pair-v2",
    "pair-turns": "pair-v2-multi-turn",
    "pair-math": "pair-math-v1",
    "pair-math-turns": "pair-math-v1-multi-turn",
}
"""Our names of FastChat's prompts."""


@dataclass
class Asked:
    """A question of one or more turns, and what was answered."""

    id: str
    turns: list[str]
    category: str = ""
    reference: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def read_questions(source: str) -> list[Asked]:
    """ "mt-bench", or JSONL of `turns`, `question` or `prompt`. Raises UserError with a wrong row's place."""
    path = located(QUESTIONS) if source == MT_BENCH else Path(source)
    references: dict[str, list[str]] = {}
    if source == MT_BENCH:
        for _, row in read_rows(located(REFERENCES)):
            references[str(row["question_id"])] = row["choices"][0]["turns"]
    found = []
    for number, row in read_rows(path):
        turns = row.get("turns") or [row.get("question") or row.get("prompt")]
        if not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise UserError(f"{path}, line {number}: no question", "a row has turns, question or prompt")
        name = str(row.get("question_id", row.get("id", number)))
        own = row.get("reference") or references.get(name) or []
        answers = row.get("answers") or []
        reference = [own] if isinstance(own, str) else list(own)
        found.append(Asked(name, list(turns), str(row.get("category", "")), reference, list(answers)))
    if not found:
        raise UserError(f"{path} has no questions", "give at least one")
    return found


def read_answers(path: Path) -> list[Asked]:
    """What `danlu eval answer` wrote, or rows of question and answers. Raises UserError."""
    found = read_questions(str(path))
    for number, one in enumerate(found, 1):
        if len(one.answers) != len(one.turns):
            raise UserError(
                f"{path}, line {number}: {len(one.answers)} answers to {len(one.turns)} questions",
                "danlu eval answer writes such files",
            )
    return found


# Answers


def answer(config: AnswerConfig) -> dict[str, Any]:
    """Asks the model, turn by turn, and writes its answers. Raises UserError."""
    asked = read_questions(config.questions)[: config.limit or None]
    ask = judge_of(config.model, config.url, config.dtype, config.max_tokens, config.temperature)
    for turn in range(max(len(one.turns) for one in asked)):
        rows = [one for one in asked if turn < len(one.turns)]
        for one, said in zip(rows, ask([_talk(one, turn) for one in rows]), strict=True):
            one.answers.append(said.strip())
    with atomic_write(config.out) as file:
        for one in asked:
            row = {"id": one.id, "category": one.category, "turns": one.turns, "answers": one.answers}
            if one.reference:
                row["reference"] = one.reference
            file.write(json.dumps({**row, "model": config.model}, ensure_ascii=False) + "\n")
    return {"questions": len(asked), "out": str(config.out)}


def _talk(one: Asked, turn: int) -> Messages:
    messages: Messages = []
    for question, said in zip(one.turns[:turn], one.answers, strict=False):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": one.turns[turn]}]


def judge_of(name: str, url: str, dtype: str, max_tokens: int, temperature: float = 0.0) -> Judge:
    """A model at hand, or one behind OpenAI's API: from conversations to the next turn."""
    if url:
        from danlu.evaluate.remote import ServedLM

        served = ServedLM(url, name, chat=True)
        return partial(served.answers, max_tokens=max_tokens, temperature=temperature)
    model, tokenizer, kind = load_for_engine(name, dtype, "auto")
    engine = Engine(model, tokenizer, dtype=kind)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)

    def asks_engine(prompts: Sequence[Messages]) -> list[str]:
        return [one.text for one in engine.generate(list(prompts), params, progress="answers")]

    return asks_engine


# Judgements


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Grades answers, or compares them with another model's; writes each judgement. Raises UserError."""
    rows = read_answers(config.answers)
    if config.truth != "no":
        return _by_trained_judge(rows, config)
    prompts = dict(OURS) if config.prompts is None else _named(read_prompts(config.prompts), config.prompts)
    ask = judge_of(config.judge, config.url, config.dtype, config.max_tokens)
    if config.against is None:
        result, kept = _graded(ask, rows, prompts)
    else:
        result, kept = _compared(ask, rows, read_answers(config.against), prompts, config)
    with atomic_write(config.out) as file:
        for row in kept:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {**result, "judge": config.judge, "out": str(config.out)}


def _by_trained_judge(rows: Sequence[Asked], config: JudgeConfig) -> dict[str, Any]:
    """TruthfulQA's method (Lin et al. 2022): an answer is true where "yes" is likelier than "no"."""
    if config.url or config.against is not None:
        raise UserError("a trained judge is asked for likelihoods", "leave out --url and --against")
    model, tokenizer, kind = load_for_engine(config.judge, config.dtype, "auto")
    asked = _turns(rows)
    pairs = [(one.turns[turn], one.answers[turn]) for one, turn in asked]
    shares = yes_shares(Engine(model, tokenizer, dtype=kind), pairs, config.truth.capitalize())
    with atomic_write(config.out) as file:
        for (one, turn), share in zip(asked, shares, strict=True):
            file.write(json.dumps({"id": one.id, "turn": turn + 1, config.truth: share}) + "\n")
    yes = [float(share > 0.5) for share in shares]
    value = float(np.mean(yes))
    return {
        "share": value,
        "aspect": config.truth,
        "interval": wilson_interval(value, len(yes)),
        "n": len(yes),
        "judge": config.judge,
        "out": str(config.out),
    }


def yes_shares(engine: Engine, answers: Sequence[tuple[str, str]], aspect: str) -> list[float]:
    """Of questions and answers how sure a judge trained on "Q: … A: … True:" is that they are so."""
    pairs: list[tuple[list[int], list[int]]] = []
    for question, said in answers:
        text = f"Q: {question.strip()}\nA: {said.strip()}\n{aspect}:"
        context = engine.prompt_ids([{"role": "user", "content": text}])
        pairs += [(context, engine.tokenizer.encode(word)) for word in ("yes", "no")]
    found = [one.logprob for one in engine.likelihoods(pairs, progress="judgements")]
    return [choice_probabilities(found[at : at + 2])[0] for at in range(0, len(found), 2)]


def _named(prompts: Mapping[str, JudgePrompt], path: Path) -> dict[str, JudgePrompt]:
    found = {ours: prompts[theirs] for ours, theirs in FASTCHAT.items() if theirs in prompts}
    if missing := [FASTCHAT[name] for name in OURS if name not in found]:
        raise UserError(f"{path}: the prompt {missing[0]} is missing", "take FastChat's judge_prompts.jsonl")
    return found


def _prompt(prompts: Mapping[str, JudgePrompt], kind: str, one: Asked, turn: int) -> JudgePrompt:
    exact = "-math" if one.category in EXACT and one.reference else ""
    turns = "-turns" if turn else ""
    return prompts.get(f"{kind}{exact}{turns}") or prompts[f"{kind}{turns}"]


def _texts(one: Asked, turn: int) -> dict[str, str]:
    """What a prompt may hold of the question, up to this turn."""
    found = {"question": one.turns[turn]}
    for number in range(turn + 1):
        found[f"question_{number + 1}"] = one.turns[number]
        found[f"ref_answer_{number + 1}"] = one.reference[number] if number < len(one.reference) else ""
    return found


def _answers_of(one: Asked, turn: int, side: str = "") -> dict[str, str]:
    mark = f"_{side}" if side else ""
    found = {f"answer{mark}": one.answers[turn]}
    return found | {f"answer{mark}_{n + 1}": one.answers[n] for n in range(turn + 1)}


def _turns(rows: Sequence[Asked]) -> list[tuple[Asked, int]]:
    """All turns that the prompts can show: the first two."""
    return [(one, turn) for one in rows for turn in range(min(2, len(one.turns)))]


def _graded(
    ask: Judge, rows: Sequence[Asked], prompts: Mapping[str, JudgePrompt]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    asked = _turns(rows)
    found = grades(
        ask,
        [
            _prompt(prompts, "single", one, turn).fill(**_texts(one, turn), **_answers_of(one, turn))
            for one, turn in asked
        ],
    )
    kept: list[dict[str, Any]] = []
    by: dict[str, list[float]] = defaultdict(list)
    for (one, turn), given in zip(asked, found, strict=True):
        kept.append({"id": one.id, "category": one.category, "turn": turn + 1, "grade": given})
        for key in (f"turn {turn + 1}", one.category):
            if key and given is not None:
                by[key].append(given)
    values = [given for given in found if given is not None]
    interval = bootstrap_interval(values)
    return {
        "grade": float(np.mean(values)),
        "interval": interval,
        "n": len(values),
        "unread": len(kept) - len(values),
        "by": {key: float(np.mean(own)) for key, own in by.items()},
    }, kept


def _compared(
    ask: Judge,
    rows: Sequence[Asked],
    others: Sequence[Asked],
    prompts: Mapping[str, JudgePrompt],
    config: JudgeConfig,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    known = {one.id: one for one in others}
    if missing := [one.id for one in rows if one.id not in known or known[one.id].turns != one.turns]:
        raise UserError(
            f"{config.against}: question {missing[0]} is missing, or another one", "answer the same questions"
        )

    def shown(one: Asked, turn: int, first: Asked, second: Asked) -> Messages:
        answers = _answers_of(first, turn, "a") | _answers_of(second, turn, "b")
        return _prompt(prompts, "pair", one, turn).fill(**_texts(one, turn), **answers)

    asked = _turns(rows)
    both = [
        (shown(one, turn, known[one.id], one), shown(one, turn, one, known[one.id])) for one, turn in asked
    ]
    judgements = both_orders(ask, both)
    pairs = [(known[one.id].answers[turn], one.answers[turn]) for one, turn in asked]
    rate = win_rate(pairs, judgements)
    winners = {"a": "against", "b": "answers", "tie": "tie", None: None}
    kept = [
        {"id": one.id, "turn": turn + 1, "first": winners[j.first], "second": winners[j.second]}
        for (one, turn), j in zip(asked, judgements, strict=True)
    ]
    return {"win_rate": vars(rate)}, kept


def show_answers(result: Mapping[str, Any]) -> None:
    console().print(f"{result['questions']} questions answered: {result['out']}", soft_wrap=True)


def show_judgements(result: Mapping[str, Any]) -> None:
    out = console()
    if "share" in result:
        low, high = result["interval"]
        rows = [(result["aspect"], f"{result['share']:.3f}", f"{low:.3f} – {high:.3f}", str(result["n"]))]
        out.print(table(f"Judged by {result['judge']}", ("", "share", "95 %", "answers"), rows))
    elif "grade" in result:
        low, high = result["interval"]
        means = [("all", f"{result['grade']:.2f}"), *((k, f"{v:.2f}") for k, v in result["by"].items())]
        out.print(table(f"Grades by {result['judge']}, 1 to 10", ("", "mean"), means))
        out.print(f"95 % of all: {low:.2f} – {high:.2f}; {result['n']} read, {result['unread']} not")
    else:
        rate = result["win_rate"]
        low, high = rate["interval"]
        even = "" if rate["length_controlled"] is None else f"{rate['length_controlled']:.3f}"
        figures = [
            ("win rate, a draw is half", f"{rate['rate']:.3f} ({low:.3f} – {high:.3f})"),
            ("at equal lengths", even),
            ("judged the same in both orders", f"{rate['consistent']:.1%}"),
            ("of single judgements, for what stood first", f"{rate['first_preferred']:.1%}"),
            ("judged, not read", f"{rate['n']}, {rate['unread']}"),
        ]
        out.print(table(f"Judged by {result['judge']}", ("", ""), figures))
    out.print(f"Each judgement: {result['out']}", soft_wrap=True)
