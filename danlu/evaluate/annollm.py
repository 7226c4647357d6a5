"""AnnoLLM: a model labels data as an annotator would (He et al. 2023, "AnnoLLM: Making Large Language Models
to Be Better Crowdsourced Annotators").

From a guideline and a few labelled examples the model first explains each example's label (section 3.1); the
explanations become chains of thought in a few-shot prompt, and with it the model annotates: it explains, and
then labels (section 3.2). Without explanations the same prompt is plain few-shot labelling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from danlu.core.errors import UserError
from danlu.evaluate.calibration import choice_probabilities
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams


@dataclass(frozen=True)
class Guideline:
    """What annotators are told."""

    says: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2:
            raise UserError("a guideline needs at least two labels", "name them")


@dataclass(frozen=True)
class Example:
    """A text that has its label."""

    text: str
    label: str
    explanation: str = ""


@dataclass(frozen=True)
class Annotation:
    """What the model made of a text."""

    label: str
    confidence: float
    """Of the label, among all of them."""
    explanation: str
    tokens_read: int
    tokens_written: int


def explanation_prompt(guideline: Guideline, example: Example) -> str:
    """Asks why an example has its label."""
    return (
        f"{guideline.says}\n\n{example.text}\nLabel: {example.label}\n\n"
        f'Briefly explain why the label is "{example.label}".\nExplanation:'
    )


def explain(
    engine: Engine, guideline: Guideline, examples: Sequence[Example], max_tokens: int = 60
) -> list[Example]:
    """The examples with the model's explanations of their labels, each one line, greedily."""
    for number, example in enumerate(examples, 1):
        if example.label not in guideline.labels:
            raise UserError(
                f'example {number} has the label "{example.label}"', f"one of {', '.join(guideline.labels)}"
            )
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=("\n",))
    prompts = [explanation_prompt(guideline, example) for example in examples]
    said = engine.generate([f"{prompt} The" for prompt in prompts], params)
    return [
        Example(example.text, example.label, f"The{one.text}".strip())
        for example, one in zip(examples, said, strict=True)
    ]


def annotation_prompt(guideline: Guideline, examples: Sequence[Example], text: str) -> str:
    """Guideline and examples, with their explanations where they have them, and the text to be labelled."""
    shown = [
        f"{example.text}\n"
        + (f"Explanation: {example.explanation}\n" if example.explanation else "")
        + f"Label: {example.label}"
        for example in examples
    ]
    begun = "Explanation:" if examples and examples[0].explanation else "Label:"
    return "\n\n".join([guideline.says, *shown, f"{text}\n{begun}"])


def annotate(
    engine: Engine,
    guideline: Guideline,
    examples: Sequence[Example],
    texts: Sequence[str],
    max_tokens: int = 60,
) -> list[Annotation]:
    """A label for each text: the likeliest, after the model's own explanation where examples have theirs."""
    prompts = [annotation_prompt(guideline, examples, text) for text in texts]
    explanations, read, written = [""] * len(texts), [0] * len(texts), [0] * len(texts)
    if examples and examples[0].explanation:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=("\n",))
        for number, one in enumerate(engine.generate(prompts, params, progress="explanations")):
            explanations[number], written[number] = one.text.strip(), len(one.ids)
            read[number] = len(engine.prompt_ids(prompts[number]))
            prompts[number] += f" {explanations[number]}\nLabel:"
    pairs = []
    for number, prompt in enumerate(prompts):
        context = engine.prompt_ids(prompt)
        read[number] += len(context)
        for label in guideline.labels:
            pairs.append((context, engine.prompt_ids(f"{prompt} {label}")[len(context) :]))
    found = engine.likelihoods(pairs, progress="labels")
    annotations = []
    n = len(guideline.labels)
    for number in range(len(texts)):
        shares = choice_probabilities([one.logprob for one in found[n * number : n * (number + 1)]])
        best = shares.index(max(shares))
        annotations.append(
            Annotation(
                guideline.labels[best], shares[best], explanations[number], read[number], written[number]
            )
        )
    return annotations
