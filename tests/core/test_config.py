import json
from pathlib import Path

import pytest
from pydantic import Field
from toy_verbs import GatherConfig, InnerConfig, JoinConfig, PartConfig, WriteConfig

from danlu.core.config import (
    Config,
    StageConfig,
    input_fields,
    inputs_of,
    make_config,
    merge,
    nearest,
    parse_overrides,
    read_yaml,
    write_config,
)
from danlu.core.errors import UserError


class Demo(StageConfig):
    steps: int = Field(10, ge=1, description="steps")
    rate: float = Field(0.1, description="rate")
    words: tuple[str, ...] = Field((), description="words")
    inner: InnerConfig | None = Field(None, description="more")


def fault(values, cls=Demo):
    with pytest.raises(UserError) as caught:
        make_config(cls, values, "recipe.yaml, stage demo")
    return caught.value.message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"out": "x", "setps": 3}, 'recipe.yaml, stage demo: setps: unknown key; did you mean "steps"?'),
        (
            {"out": "x", "inner": {"rte": 1}},
            'recipe.yaml, stage demo: inner.rte: unknown key; did you mean "rate"?',
        ),
        ({}, "recipe.yaml, stage demo: out: is required and missing"),
        (
            {"out": "x", "steps": "3"},
            "recipe.yaml, stage demo: steps: input should be a valid integer, not '3'",
        ),
        (
            {"out": "x", "steps": True},
            "recipe.yaml, stage demo: steps: input should be a valid integer, not True",
        ),
        (
            {"out": "x", "steps": 0},
            "recipe.yaml, stage demo: steps: input should be greater than or equal to 1, not 0",
        ),
        (
            {"out": "x", "inner": {"rate": 2}},
            "recipe.yaml, stage demo: inner.rate: input should be less than or equal to 1, not 2",
        ),
    ],
)
def test_each_fault_names_place_and_key(values, expected) -> None:
    assert fault(values) == expected


def test_all_faults_at_once() -> None:
    assert len(fault({"steps": 0, "rte": 1}).splitlines()) == 3  # and `out` is missing


def test_a_name_far_from_all_others_gets_the_list() -> None:
    assert nearest("zzz", ["steps", "rate"]) == "; known: steps, rate"


def test_plain_values_become_typed_ones() -> None:
    config = make_config(Demo, {"out": "x", "rate": 1, "words": ["a", "b"], "inner": {"mode": "off"}})
    assert config.out == Path("x")
    assert config.rate == 1.0
    assert config.words == ("a", "b")
    assert config.inner == InnerConfig(mode="off")


def test_overrides_are_read_as_yaml() -> None:
    read = parse_overrides(["optim.lr=1e-3", "steps=10", "compile=off", "words=[a, b]", "x=null", "y=true"])
    assert read == {
        "optim": {"lr": 0.001},
        "steps": 10,
        "compile": "off",  # a word, as in a recipe
        "words": ["a", "b"],
        "x": None,
        "y": True,
    }
    with pytest.raises(UserError, match="not an override"):
        parse_overrides(["steps"])
    for text in ("[1", "2024-13-45", "a\x07b", "[" * 5000):
        with pytest.raises(UserError, match="not a value"):
            parse_overrides([f"steps={text}"])


def test_merge_goes_into_mappings() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "e": 4}) == {
        "a": {"b": 9, "c": 2},
        "d": 3,
        "e": 4,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [", "line 2"),
        ("a: 1\na: 2", '"a" is given twice, line 2'),
        ("- 1", "expected keys"),
        ("a: 1\n? [b, c]\n: 2", "line 2: not valid YAML: a key is a list"),
        ("a: b\x07c", "not valid YAML: unacceptable character"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("", "expected keys"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, expected) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert expected in caught.value.message
    assert str(path) in caught.value.message


def test_the_effective_config_reads_back(tmp_path) -> None:
    config = Demo(out=Path("x"), words=("no", "off"), inner=InnerConfig(mode="yes"))
    write_config(config, tmp_path / "config.yaml")
    assert make_config(Demo, read_yaml(tmp_path / "config.yaml")) == config


def test_input_fields_also_optional_and_named_ones() -> None:
    assert input_fields(JoinConfig) == ["left", "right"]
    assert input_fields(WriteConfig) == ["source"]


def test_inputs_also_in_lists_and_nested_parts() -> None:
    parts = (PartConfig(text=Path("a")), PartConfig(texts=(Path("b"), Path("c"))))
    assert inputs_of(GatherConfig(out=Path("x"), parts=parts, others=(Path("d"),))) == {
        "parts.0.text": Path("a"),
        "parts.1.text": None,
        "parts.1.texts.0": Path("b"),
        "parts.1.texts.1": Path("c"),
        "others.0": Path("d"),
    }
    assert inputs_of(GatherConfig(out=Path("x"))) == {}


def test_configs_are_frozen_and_json() -> None:
    config = Demo(out=Path("x"))
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 2
    assert json.loads(config.model_dump_json())["out"] == "x"
    assert issubclass(Demo, Config)
