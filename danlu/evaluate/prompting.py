"""Ways of prompting that any task can be asked in, beside its own.

- Examples: the first, random ones, those most like the question (Liu et al. 2022), those with the most steps
  (Fu et al. 2023).
- Zero-shot chain of thought (Kojima et al. 2022): the model thinks, and then answers behind its thought.
- Least-to-most (Zhou et al. 2023): the model names smaller questions, answers them one by one, and then the
  whole.
- Self-consistency (Wang et al. 2023): several answers at a temperature, and their majority, of all of them or
  of those with the longest chains (Fu et al. 2023).
- Calibrated choice: the likelihood of a choice over what it is without the question, behind the prompt's last
  line (PMI, Holtzman et al. 2021) or with "N/A" in the question's place (Zhao et al. 2021).

A `Prompter` stands between lm-evaluation-harness and a model: the harness asks as the task says, the prompter
asks the model otherwise, and gives back what the harness can score.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from danlu.core.errors import UserError
from danlu.evaluate.answers import last_number, longest_chains_majority, majority, stated_answer
from danlu.evaluate.calibration import choice_probabilities
from danlu.evaluate.config import Prompting
from danlu.evaluate.harness import LM, ContextSampler, Instance
from danlu.evaluate.scores import plain
from danlu.evaluate.text_measures import bm25

Doc = Mapping[str, Any]
Choice = tuple[float, bool]

THINK = " Let's think step by step."
THEREFORE = "\nTherefore, the answer is"
ENDS = ("\n\n", "\nQuestion:", "\nQ:")
"""Where a thought is over."""
SMALLER = "\nTo answer this, first find out:\n1."
"""Asks for smaller questions, a line each."""
MOST_PARTS = 4
"""Smaller questions that are answered."""


# Examples


class Nearest(ContextSampler):
    """The examples most like the question by BM25, the nearest last, where it is nearest to the answer."""

    doc: Doc | None = None

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[Any]:
        pool = [one for one in self.df if one != self.doc]
        scores = bm25(_words_of(self.doc or {}), [_words_of(one) for one in pool])
        return [pool[place] for place in sorted(range(len(pool)), key=lambda place: scores[place])[-n:]]


class Complex(ContextSampler):
    """The examples whose answers have the most steps: lines, or sentences where there is one line."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[Any]:
        if not all("steps" in one for one in self.df):
            raise UserError(
                "the task's examples have no steps to choose by", "take --examples nearest, random or first"
            )
        return sorted(self.df, key=lambda one: -n_steps(one["steps"]))[:n]


def n_steps(text: str) -> int:
    """Lines of a chain of thought, or its sentences where it is one line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) if len(lines) > 1 else len([part for part in text.split(". ") if part.strip()])


def _words_of(doc: Doc) -> str:
    return " ".join(str(doc.get(field, "")) for field in ("passage", "question"))


def choose_examples(task: Any, how: str, seed: int) -> None:
    """Sets which examples a task's questions are asked behind; "task" leaves it as the task says."""
    if how == "task" or not task.get_config("num_fewshot"):
        return
    pool = list(task.fewshot_docs())
    if how == "nearest":
        sampler = Nearest(pool)
        made = task.fewshot_context

        def fewshot_context(doc: Doc, *args: Any, **kwargs: Any) -> Any:
            sampler.doc = doc  # the harness doesn't tell a sampler which question it is for
            return made(doc, *args, **kwargs)

        task.fewshot_context, task.sampler = fewshot_context, sampler
    elif how == "complex":
        task.sampler = Complex(pool)
    elif how == "first":
        task.sampler = First(pool)
    else:
        task.sampler = ContextSampler(pool, rnd=seed)


class First(ContextSampler):
    """The first ones."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[Any]:
        return list(self.df[:n])


# Questions


class Prompter(LM):
    """A model that is asked otherwise than the harness says."""

    def __init__(self, lm: Any, tasks: Mapping[str, Any], how: Prompting) -> None:
        """`lm`: of the harness; `tasks` by name, as it has loaded them."""
        super().__init__()
        self.lm, self.tasks, self.how = lm, tasks, how
        self.thoughts: dict[str, list[str]] = {}
        """By context, what the model thought before it answered."""
        self.cut = 0
        """Requests, beyond the harness's own, that lost their beginnings."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["lm"], name)

    @property
    def differs(self) -> bool:
        """Whether questions are asked otherwise than the tasks say; examples are chosen elsewhere."""
        return self.how.method != "direct" or self.how.votes > 1 or self.how.calibrate != "none"

    @property
    def tokenizer_name(self) -> str:
        return str(self.lm.tokenizer_name)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return str(self.lm.apply_chat_template(chat_history, add_generation_prompt))

    def chat_template(self, chat_template: Any = False) -> str | None:
        return self.lm.chat_template(chat_template)

    def loglikelihood_rolling(self, requests: Any) -> Any:
        return self.lm.loglikelihood_rolling(requests)

    def loglikelihood(self, requests: list[Any]) -> list[Choice]:
        contexts = self._prepared([request.args[0] for request in requests])
        pairs, owners = [], []
        for number, request in enumerate(requests):
            for context in contexts[request.args[0]]:
                pairs.append((context, request.args[1]))
                owners.append(number)
        found: list[list[Choice]] = [[] for _ in requests]
        for number, one in zip(owners, self._score(pairs), strict=True):
            found[number].append(one)
        if self.how.calibrate != "none":
            without = self._score([(self._without_question(one), one.args[1]) for one in requests])
            found = [
                [(logprob - base, greedy) for logprob, greedy in own]
                for own, (base, _) in zip(found, without, strict=True)
            ]
        if self.how.votes == 1:
            return [own[0] for own in found]
        return self._voted(requests, found)

    def _voted(self, requests: list[Any], found: list[list[Choice]]) -> list[Choice]:
        """Of each choice log((votes + mean probability) / (number of votes + 1)): the mean parts equals."""
        questions: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            questions[request.task_name, request.doc_id, request.args[0]].append(number)
        answers: list[Choice] = [(0.0, False)] * len(requests)
        for (_, _, context), numbers in questions.items():
            each = list(zip(*([logprob for logprob, _ in found[number]] for number in numbers), strict=True))
            shares = [choice_probabilities(logprobs) for logprobs in each]
            kept = self._longest(context, len(shares))
            votes = [0.0] * len(numbers)
            for place in kept:
                votes[shares[place].index(max(shares[place]))] += 1
            for place, number in enumerate(numbers):
                mean = sum(shares[kept_place][place] for kept_place in kept) / len(kept)
                answers[number] = (math.log((votes[place] + mean) / (len(kept) + 1)), False)
        return answers

    def _longest(self, context: str, n: int) -> list[int]:
        """Places of the thoughts that vote."""
        if self.how.vote == "all":
            return list(range(n))
        thoughts = self.thoughts[context]
        return sorted(range(n), key=lambda place: -n_steps(thoughts[place]))[: max(1, n // 2)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        if self.how.method == "direct":
            return self._vote_texts(requests)
        contexts = self._prepared([request.args[0] for request in requests])
        asked = [(context, request.args[1]) for request in requests for context in contexts[request.args[0]]]
        said = iter(self._generate([(context, {**how, "do_sample": False}) for context, how in asked]))
        answers = []
        for request in requests:
            own = [next(said).strip() for _ in contexts[request.args[0]]]
            best = self._most(own, self.thoughts[request.args[0]])
            answers.append(best)
        return answers

    def _vote_texts(self, requests: list[Any]) -> list[str]:
        """The task's own prompt; of several answers one of those that agree."""
        n = self.how.votes
        drawn = {"do_sample": True, "temperature": self.how.temperature}
        asked = [
            (request.args[0], {**request.args[1], **(drawn if n > 1 else {})})
            for request in requests
            for _ in range(n)
        ]
        said = self._generate(asked)
        if n == 1:
            return said
        return [self._most(said[n * number : n * (number + 1)]) for number in range(len(requests))]

    def _most(self, texts: Sequence[str], thoughts: Sequence[str] | None = None) -> str:
        """A text with the answer of most of them."""
        answers = [answer_in(text) for text in texts]
        if self.how.vote == "longest":
            chosen = longest_chains_majority(thoughts or texts, answers, max(1, len(texts) // 2))
        else:
            chosen = majority(answers)
        return texts[answers.index(chosen)]

    # Contexts

    def _prepared(self, contexts: Sequence[str]) -> dict[str, list[str]]:
        """Of each context those that an answer is asked behind, one for each vote."""
        distinct = list(dict.fromkeys(contexts))
        if self.how.method == "direct":
            if self.how.votes > 1:
                raise UserError(
                    "a choice by its likelihood is the same each time: there is nothing to vote on",
                    "take --method zero-shot-cot with --votes, or a task that is answered in text",
                )
            return {context: [context] for context in distinct}
        if self.how.method == "zero-shot-cot":
            begun = {context: context + THINK for context in distinct}
        else:
            begun = self._with_parts(distinct)
        n = self.how.votes
        settings = {"until": list(ENDS), "max_gen_toks": self.how.thought_tokens, "do_sample": n > 1}
        if n > 1:
            settings["temperature"] = self.how.temperature
        asked = [(begun[context], settings) for context in distinct for _ in range(n)]
        said = self._generate(asked)
        found = {}
        for number, context in enumerate(distinct):
            thoughts = said[n * number : n * (number + 1)]
            self.thoughts[context] = [(begun[context] + one)[len(context) :] for one in thoughts]
            found[context] = [f"{begun[context]}{one}{THEREFORE}" for one in thoughts]
        return found

    def _with_parts(self, contexts: Sequence[str]) -> dict[str, str]:
        """Contexts with smaller questions and their answers, up to where the whole is answered."""
        asked = [(_question(context) + SMALLER, _ends(self.how.thought_tokens)) for context in contexts]
        parts = [smaller_questions(f"1.{said}") for said in self._generate(asked)]
        solved = [_question(context) for context in contexts]
        for step in range(max(map(len, parts), default=0)):
            open_ones = [number for number, own in enumerate(parts) if step < len(own)]
            for number in open_ones:
                solved[number] += f"\n\nQuestion: {parts[number][step]}\nAnswer:"
            answers = self._generate([(solved[number], _ends(64, "\n")) for number in open_ones])
            for number, said in zip(open_ones, answers, strict=True):
                solved[number] += f" {said.strip()}"
        return {
            context: f"{text}\n\nSo, to the first question:"
            for context, text in zip(contexts, solved, strict=True)
        }

    def _without_question(self, request: Any) -> str:
        """What a choice's likelihood is compared with."""
        context: str = request.args[0]
        if self.how.calibrate == "pmi":
            return context[context.rfind("\n") + 1 :]
        task = self.tasks[request.task_name]
        text = str(task.doc_to_text(request.doc))
        empty = {**request.doc, **{f: "N/A" for f in ("question", "passage") if request.doc.get(f)}}
        if not context.endswith(text) or task.doc_to_text(empty) == text:
            raise UserError(
                f"{request.task_name}: its prompt doesn't end with a question that could be left out",
                "take --calibrate pmi, and no chat template",
            )
        return context[: len(context) - len(text)] + str(task.doc_to_text(empty))

    # The model

    def _score(self, pairs: Sequence[tuple[str, str]]) -> list[Choice]:
        asked = list(dict.fromkeys(pairs))
        self._count(asked)
        instances = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
        found = dict(zip(asked, self.lm.loglikelihood(instances), strict=True)) if asked else {}
        return [found[pair] for pair in pairs]

    def _generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        self._count(asked)
        instances = [Instance("generate_until", {}, one, 0) for one in asked]
        return list(self.lm.generate_until(instances)) if instances else []

    def _count(self, asked: Sequence[tuple[str, Any]]) -> None:
        if (is_cut := getattr(self.lm, "is_cut", None)) is not None:
            self.cut += sum(is_cut(*one) for one in asked)


def _question(context: str) -> str:
    """A context without the begun answer."""
    return context.rstrip().removesuffix("Answer:").removesuffix("A:").rstrip()


def _ends(tokens: int, *also: str) -> dict[str, Any]:
    return {"until": [*also, *ENDS], "max_gen_toks": tokens, "do_sample": False}


def smaller_questions(text: str) -> list[str]:
    """The lines of a numbered list, at most MOST_PARTS."""
    lines = [line.strip() for line in text.splitlines()]
    found = [line.partition(".")[2].strip() for line in lines if line[:1].isdigit() and "." in line[:3]]
    return [one for one in found if one][:MOST_PARTS]


def answer_in(text: str) -> str | None:
    """What a text answers, so that two that say the same agree."""
    if "the answer is " in text:
        return plain(stated_answer(text)) or None
    return last_number(text) or plain(text.strip().partition("\n")[0]) or None
