"""Ways of prompting: what the model is asked, and what becomes of its answers."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_models import save_random_model

from danlu.core.errors import UserError
from danlu.evaluate.config import EvalConfig, Prompting
from danlu.evaluate.evaluate import evaluate
from danlu.evaluate.harness import Instance
from danlu.evaluate.prompting import (
    SMALLER,
    THEREFORE,
    THINK,
    Complex,
    Nearest,
    Prompter,
    answer_in,
    choose_examples,
    n_steps,
    smaller_questions,
)
from danlu.tokens.bpe import train_bpe

FURNACE = Path(__file__).parents[2] / "recipes" / "tasks" / "furnace.yaml"


class Script:
    """A model whose answers are functions of what it is asked; it notes all of it."""

    tokenizer_name = "script"

    def __init__(self, writes: Callable[[str, int], str], likes: Callable[[str, str], float]) -> None:
        self.writes, self.likes = writes, likes
        self.contexts: list[str] = []
        self.settings: list[dict[str, Any]] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.contexts += [one.args[0] for one in requests]
        self.settings += [one.args[1] for one in requests]
        return [self.writes(one.args[0], number) for number, one in enumerate(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.contexts += [one.args[0] for one in requests]
        return [(self.likes(*one.args), False) for one in requests]


def choices(context: str, texts: tuple[str, ...] = (" no", " yes"), doc: Any = None) -> list[Instance]:
    about = ("task", 0, 1)
    return [Instance("loglikelihood", doc or {}, (context, text), n, about) for n, text in enumerate(texts)]


def asked_text(context: str) -> list[Instance]:
    return [Instance("generate_until", {}, (context, {"until": ["\n"], "max_gen_toks": 8}), 0, ("t", 0, 1))]


def prompter(script: Script, task: Any = None, **how: Any) -> Prompter:
    return Prompter(script, {"task": task}, Prompting(**how))


def test_zero_shot_chain_of_thought_thinks_and_then_scores_the_choices() -> None:
    script = Script(
        lambda context, _: " Fire is hot.",
        lambda context, choice: -1.0 if ("Fire is hot." in context) == (choice == " yes") else -3.0,
    )
    asking = prompter(script, method="zero-shot-cot")
    (no, _), (yes, _) = asking.loglikelihood(choices("Question: hot?\nAnswer:"))
    assert yes > no
    thought = f"Question: hot?\nAnswer:{THINK}"
    assert script.contexts == [thought, *[f"{thought} Fire is hot.{THEREFORE}"] * 2]
    assert asking.thoughts == {"Question: hot?\nAnswer:": [f"{THINK} Fire is hot."]}
    assert script.settings[0]["do_sample"] is False


def test_votes_of_thoughts_decide_a_choice() -> None:
    """Three of five thoughts say yes, the other two say no and are surer of it."""
    said = ["yes", "no", "yes", "no", "yes"]

    def likes(context: str, choice: str) -> float:
        thought = context.removesuffix(THEREFORE).split()[-1]
        sure = 0.99 if thought == "no" else 0.6
        return math.log(sure if choice.strip() == thought else 1 - sure)

    script = Script(lambda _, number: f" {said[number]}", likes)
    answers = prompter(script, method="zero-shot-cot", votes=5).loglikelihood(choices("Q\nAnswer:"))
    no, yes = (math.exp(logprob) for logprob, _ in answers)
    mean_yes = (3 * 0.6 + 2 * 0.01) / 5
    assert yes == pytest.approx((3 + mean_yes) / 6)
    assert no == pytest.approx((2 + 1 - mean_yes) / 6)
    assert {one["temperature"] for one in script.settings} == {0.7}


def test_self_consistency_of_texts() -> None:
    said = ["7 and 5 is 12", "The sum is 11", "So 12", "12.0", "no idea"]
    script = Script(lambda _, number: said[number], lambda *_: 0.0)
    found = prompter(script, votes=5).generate_until(asked_text("7+5=?\nAnswer:"))
    assert found == ["7 and 5 is 12"], "the first that says what most say"
    assert len(script.contexts) == 5
    assert all(one["do_sample"] for one in script.settings)


def test_only_the_longest_chains_vote() -> None:
    said = ["1", "1", "1", "a\nb\n2", "a\nb\nc\n2", "a\n3"]
    script = Script(lambda _, number: said[number], lambda *_: 0.0)
    assert prompter(script, votes=6).generate_until(asked_text("Q"))[0] == "1"
    assert prompter(script, votes=6, vote="longest").generate_until(asked_text("Q"))[0] == "a\nb\n2"


def test_least_to_most_answers_the_parts_in_their_order() -> None:
    def writes(context: str, _: int) -> str:
        if context.endswith(SMALLER):
            return " How many apples?\n2. How many pears?\n"
        if context.endswith("Question: How many apples?\nAnswer:"):
            return " three"
        if context.endswith("Question: How many pears?\nAnswer:"):
            return " four" if "How many apples?\nAnswer: three" in context else " none"
        if context.endswith(THEREFORE):
            return " seven" if "How many pears?\nAnswer: four" in context else " zero"
        return " together"

    script = Script(writes, lambda *_: 0.0)
    found = prompter(script, method="least-to-most").generate_until(
        asked_text("Question: How much fruit?\nAnswer:")
    )
    assert found == ["seven"]
    assert script.contexts[0] == f"Question: How much fruit?{SMALLER}"


def test_numbered_lists_are_read() -> None:
    assert smaller_questions("1. One?\nwell\n2. Two?\n3.\n4. Three?\n5. Four?\n6. Five?") == [
        "One?",
        "Two?",
        "Three?",
        "Four?",
    ]


def test_pmi_takes_away_what_is_likely_anyway() -> None:
    """Behind any question "yes" is likelier; behind this one less so than elsewhere."""
    likes = {
        ("Question: cold?\nAnswer:", " yes"): -1.0,
        ("Question: cold?\nAnswer:", " no"): -1.5,
        ("Answer:", " yes"): -0.5,
        ("Answer:", " no"): -2.0,
    }
    script = Script(lambda *_: "", lambda context, choice: likes[context, choice])
    requests = choices("Question: cold?\nAnswer:")
    (no, _), (yes, _) = prompter(script, calibrate="pmi").loglikelihood(requests)
    assert (no, yes) == (pytest.approx(0.5), pytest.approx(-0.5))


def test_contextual_calibration_leaves_the_examples() -> None:
    task = SimpleNamespace(doc_to_text=lambda doc: f"Question: {doc['question']}\nAnswer:")
    script = Script(lambda *_: "", lambda context, choice: float(len(context)))
    doc = {"question": "cold?", "answer": 1}
    requests = choices("Question: hot?\nAnswer: yes\n\nQuestion: cold?\nAnswer:", doc=doc)
    found = prompter(script, task, calibrate="contextual").loglikelihood(requests)
    assert script.contexts[2:] == ["Question: hot?\nAnswer: yes\n\nQuestion: N/A\nAnswer:"] * 2
    assert [value for value, _ in found] == [len("cold?") - len("N/A")] * 2


def test_contextual_calibration_needs_a_question_at_the_end() -> None:
    task = SimpleNamespace(doc_to_text=lambda doc: doc["text"])
    asking = prompter(Script(lambda *_: "", lambda *_: 0.0), task, calibrate="contextual")
    with pytest.raises(UserError, match="doesn't end with a question"):
        asking.loglikelihood(choices("<|im_start|>cold?<|im_end|>", doc={"text": "cold?"}))


def test_votes_on_likelihoods_alone_are_refused() -> None:
    asking = prompter(Script(lambda *_: "", lambda *_: 0.0), votes=3)
    with pytest.raises(UserError, match="nothing to vote on"):
        asking.loglikelihood(choices("Q"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First 3, so the answer is The Fire.\nMore", "fire"),
        ("3 and 4 make 7.00", "7"),
        ("A red door.\nBecause", "red door"),
        ("  ", None),
    ],
)
def test_answers_in_texts(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer


def test_examples_like_the_question() -> None:
    pool = [{"question": q} for q in ("the red door", "a cold river", "the red cold door", "gold")]
    sampler = Nearest(pool)
    sampler.doc = {"question": "which red door is cold"}
    assert [one["question"] for one in sampler.sample(2)] == ["the red door", "the red cold door"]
    sampler.doc = pool[2]
    assert pool[2] not in sampler.sample(3), "a question is no example for itself"


def test_examples_with_the_most_steps() -> None:
    pool = [{"steps": "One."}, {"steps": "One. Two. Three."}, {"steps": "One\nTwo"}]
    assert [one["steps"] for one in Complex(pool).sample(2)] == ["One. Two. Three.", "One\nTwo"]
    assert [n_steps(one["steps"]) for one in pool] == [1, 3, 2]
    with pytest.raises(UserError, match="no steps"):
        Complex([{"question": "?"}]).sample(1)


def test_each_question_gets_its_own_nearest_examples() -> None:
    from danlu.evaluate.tasks import find_tasks

    task = find_tasks([str(FURNACE)])["tasks"]["furnace"]
    task.set_config("num_fewshot", 1)
    choose_examples(task, "nearest", 0)
    docs = list(task.eval_docs)
    pool = list(task.fewshot_docs())
    for doc in docs[:6]:
        best = Nearest(pool)
        best.doc = doc
        shown = best.sample(1)[0]["question"]
        assert shown in task.fewshot_context(doc, num_fewshot=1)


def test_random_examples_are_those_of_the_seed() -> None:
    from danlu.evaluate.tasks import find_tasks

    def prompts(how: str, seed: int) -> list[str]:
        task = find_tasks([str(FURNACE)])["tasks"]["furnace"]
        task.set_config("num_fewshot", 2)
        choose_examples(task, how, seed)
        return [task.fewshot_context(doc, num_fewshot=2) for doc in list(task.eval_docs)[:5]]

    assert prompts("random", 0) == prompts("random", 0) != prompts("random", 1)
    assert prompts("first", 0) == prompts("first", 1)
    before = [text.rpartition("Question:")[0] for text in prompts("first", 0)]
    assert len(set(before)) == 1


def test_a_task_asked_through_thoughts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real engine: scores, thoughts beside the questions, and another cache of answers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = train_bpe([FURNACE.with_suffix(".jsonl").read_text("utf-8")], 400)
    model = save_random_model(tmp_path / "model", tokenizer, noise=0.1)
    config = EvalConfig(
        model=str(model),
        out=tmp_path / "out",
        dtype="float32",
        tasks=(str(FURNACE),),
        limit=3,
        prompting=Prompting(method="zero-shot-cot", votes=2, thought_tokens=5),
    )
    result = evaluate(config)
    assert result["scores"][0]["n"] == 3
    rows = (tmp_path / "out" / "samples_furnace.jsonl").read_text("utf-8").splitlines()
    assert all(row.count("Let's think step by step.") == 2 for row in rows)
    assert "method zero-shot-cot" in (tmp_path / "out" / "report.html").read_text("utf-8")
