from pathlib import Path

import pytest
from toy_verbs import VERBS

from danlu.core.errors import UserError
from danlu.core.recipe import RECIPES, Recipe, find_recipe, read_recipe, stage_config, write_recipe


def broken(recipe, text, **kwargs):
    with pytest.raises(UserError) as caught:
        read_recipe(recipe(text), VERBS, **kwargs)
    return caught.value.message


def test_a_good_recipe(recipe) -> None:
    read = read_recipe(recipe(), VERBS)
    assert [stage.name for stage in read.stages] == ["one", "two", "both", "model"]
    config = stage_config(read, read.stages[2], VERBS, Path("runs"))
    assert (config.left, config.right) == (Path("runs/toy/one"), Path("runs/toy/two"))
    assert (config.out, config.seed) == (Path("runs/toy/both"), 3)


def stages(*lines):
    return "name: toy\nstages:\n" + "\n".join(f"  - {line}" for line in lines)


ONE = "{name: one, verb: write}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naem: x\nstages: [{name: a, verb: write}]", 'toy.yaml: naem: unknown key; did you mean "name"?'),
        ("name: a/b\nstages: [{name: a, verb: write}]", "toy.yaml: name: string should match pattern"),
        ("name: x\nstages: []", "toy.yaml: stages: list should have at least 1 item"),
        (
            stages("{name: a, verb: wirte}"),
            'stage a: verb: no stage verb is called "wirte"; did you mean "write"?',
        ),
        (stages("{name: a, verb: look}"), 'stage a: verb: no stage verb is called "look"'),
        (stages(ONE, ONE), "stage one: two stages have this name"),
        (
            stages(ONE, "{name: b, verb: write, options: {txet: x}}"),
            'stage b: txet: unknown key; did you mean "text"?',
        ),
        (
            stages(ONE, "{name: b, verb: write, options: {text: 3}}"),
            "stage b: text: input should be a valid string",
        ),
        (
            stages(ONE, "{name: b, verb: join, reads: {left: on}}"),
            'stage b: reads.left: no earlier stage is called "on"; did you mean "one"?',
        ),
        (
            stages("{name: b, verb: join, reads: {left: b}}"),
            "stage b: reads.left: a stage can't read itself",
        ),
        (
            stages("{name: b, verb: join, reads: {left: one}}", ONE),
            'stage b: reads.left: stage "one" comes later; put it before this one',
        ),
        (
            stages("{name: b, verb: join, reads: {left: one}}"),
            'stage b: reads.left: no earlier stage is called "one"',
        ),
        (
            stages(ONE, "{name: b, verb: join, reads: {lfet: one}}"),
            'stage b: reads: "lfet" is no input of join; did you mean "left"?',
        ),
        (
            stages(ONE, "{name: b, verb: join, reads: {left: one}, options: {left: x}}"),
            "stage b: left is given in reads and in options",
        ),
        (stages(ONE, "{name: b, verb: write, options: {out: x}}"), "stage b: out is set by the run"),
        (
            stages(ONE, "{name: b, verb: join, reads: {left: one}, options: {inner: {rate: 0}}}"),
            "stage b: inner.rate: input should be greater than 0, not 0",
        ),
    ],
)
def test_each_fault_is_one_message_with_file_and_key(recipe, text, expected) -> None:
    message = broken(recipe, text)
    assert expected in message
    assert message.startswith("toy.yaml")


def test_overrides_are_laid_over_and_blamed_on_the_command_line(recipe) -> None:
    read = read_recipe(recipe(), VERBS, {"both": {"inner": {"rate": 0.1}}, "model": {"steps": 9}}, seed=7)
    configs = {stage.name: stage_config(read, stage, VERBS, Path("runs")) for stage in read.stages}
    assert configs["both"].inner.rate == 0.1
    assert (configs["model"].steps, configs["model"].seed) == (9, 7)
    where = "on the command line"
    assert broken(recipe, None, overrides={"modle": {"steps": 1}}).startswith(
        f'{where}: no stage is called "modle"'
    )
    assert broken(recipe, None, overrides={"model": {"step": 1}}).startswith(
        f"{where}, stage model: step: unknown"
    )


@pytest.mark.parametrize(("bf16", "text"), [(True, "much"), (False, "little")])
def test_a_slower_device_may_get_less(recipe, tmp_path, monkeypatch, capsys, bf16, text) -> None:
    monkeypatch.setattr("danlu.core.device.has_native_bf16", lambda device: bf16)
    less = stages("{name: one, verb: write, options: {text: much}}") + "\nwithout_bf16: {one: {text: little}}"
    path = recipe(less)
    read = read_recipe(path, VERBS)
    assert read.stage("one", "x").options["text"] == text
    assert ("no bf16 arithmetic here" in capsys.readouterr().err) is not bf16
    given = read_recipe(path, VERBS, {"one": {"text": "mine"}})
    write_recipe(given, tmp_path / "saved.yaml")
    assert read_recipe(tmp_path / "saved.yaml", VERBS).stage("one", "x").options["text"] == "mine"
    message = broken(recipe, less.replace("{text: little}", "{txet: little}"))
    assert 'without_bf16, stage one: txet: unknown key; did you mean "text"?' in message


def test_the_saved_recipe_reads_back(recipe, tmp_path) -> None:
    read = read_recipe(recipe(), VERBS, {"model": {"steps": 9}})
    write_recipe(read, tmp_path / "saved.yaml")
    assert read_recipe(tmp_path / "saved.yaml", VERBS) == read


def test_closure_is_all_that_is_read(recipe) -> None:
    read = read_recipe(recipe(), VERBS)
    assert [stage.name for stage in read.closure(["both"])] == ["one", "two", "both"]
    assert [stage.name for stage in read.closure(["two"])] == ["two"]
    assert isinstance(read, Recipe)


def test_a_shipped_recipe_is_found_by_its_name(recipe) -> None:
    path = recipe()
    assert find_recipe(path) == path
    assert find_recipe(Path("quickstart")) == RECIPES / "quickstart.yaml"
    Path("quickstart").mkdir()  # a folder of that name is no recipe
    assert find_recipe(Path("quickstart")) == RECIPES / "quickstart.yaml"
    with pytest.raises(UserError, match="quikstart: no such recipe") as caught:
        find_recipe(Path("quikstart"))
    assert caught.value.remedy == 'did you mean "quickstart"?'
