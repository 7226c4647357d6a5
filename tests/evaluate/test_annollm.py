"""AnnoLLM: what the model is asked, and that a label is the likeliest one."""

import pytest
from small_models import save_random_model
from some_texts import TEXTS

from danlu.core.errors import UserError
from danlu.evaluate.annollm import (
    Example,
    Guideline,
    annotate,
    annotation_prompt,
    explain,
    explanation_prompt,
)
from danlu.generate.engine import Engine
from danlu.model.checkpoint import load
from danlu.tokens.bpe import train_bpe

MOOD = Guideline("Is the text happy or sad?", ("happy", "sad"))
EXAMPLES = [Example("It rains again.", "sad"), Example("We found gold!", "happy")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("annollm") / "model"
    return Engine(*load(save_random_model(folder, train_bpe(TEXTS * 4, 330), noise=0.2)))


def test_the_prompt_for_an_explanation_names_the_label() -> None:
    assert explanation_prompt(MOOD, EXAMPLES[0]) == (
        "Is the text happy or sad?\n\nIt rains again.\nLabel: sad\n\n"
        'Briefly explain why the label is "sad".\nExplanation:'
    )


def test_explanations_stand_before_labels() -> None:
    told = [Example("It rains again.", "sad", "Rain is dull.")]
    assert annotation_prompt(MOOD, told, "Hot furnace.") == (
        "Is the text happy or sad?\n\nIt rains again.\nExplanation: Rain is dull.\nLabel: sad\n\n"
        "Hot furnace.\nExplanation:"
    )
    assert annotation_prompt(MOOD, EXAMPLES[:1], "Hot furnace.").endswith(
        "Label: sad\n\nHot furnace.\nLabel:"
    )


def test_a_label_is_the_likeliest_one(engine: Engine) -> None:
    texts = ["The furnace is hot.", "丹炉里的火很旺。", "Gold."]
    for one, text in zip(annotate(engine, MOOD, EXAMPLES, texts), texts, strict=True):
        context = engine.prompt_ids(annotation_prompt(MOOD, EXAMPLES, text))
        whole = [
            engine.prompt_ids(annotation_prompt(MOOD, EXAMPLES, text) + f" {label}") for label in MOOD.labels
        ]
        scores = [engine.likelihoods([(context, ids[len(context) :])])[0].logprob for ids in whole]
        assert one.label == MOOD.labels[scores.index(max(scores))]
        assert 0.5 <= one.confidence <= 1
        assert one.explanation == ""
        assert (one.tokens_read, one.tokens_written) == (len(context), 0)


def test_with_explanations_the_model_explains_first(engine: Engine) -> None:
    told = explain(engine, MOOD, EXAMPLES, max_tokens=8)
    assert [example.label for example in told] == ["sad", "happy"]
    assert all(example.explanation.startswith("The") for example in told)
    assert all("\n" not in example.explanation for example in told)
    [found] = annotate(engine, MOOD, told, ["Gold."], max_tokens=8)
    assert 0 < found.tokens_written <= 8
    assert found.tokens_read > len(engine.prompt_ids(annotation_prompt(MOOD, told, "Gold.")))


def test_what_cannot_be_annotated(engine: Engine) -> None:
    with pytest.raises(UserError, match="two labels"):
        Guideline("Which?", ("one",))
    with pytest.raises(UserError, match='example 1 has the label "angry"'):
        explain(engine, MOOD, [Example("No!", "angry")])
