import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from toy_verbs import VERBS

from danlu.core import stage as stages
from danlu.core.config import make_config
from danlu.core.errors import UserError
from danlu.core.identity import Job
from danlu.core.options import RunConfig
from danlu.core.runner import run, run_verb, run_verb_of_recipe
from danlu.core.stage import locked

RUN = Path("runs/toy")


def go(path, **options):
    """{stage: what became of it}."""
    result = run(make_config(RunConfig, {"recipe": str(path), **options}), VERBS)
    return {outcome.stage: outcome.outcome for outcome in result.stages}


def ran(outcomes):
    return [name for name, outcome in outcomes.items() if outcome != "skipped"]


def test_a_run_leaves_what_its_folder_promises_and_is_then_skipped(recipe) -> None:
    path = recipe()
    assert ran(go(path)) == ["one", "two", "both", "model"]
    assert (RUN / "both/text.txt").read_text() == "sea sky"
    for name in ("one", "two", "both", "model"):
        folder = RUN / name
        assert {"config.yaml", "lineage.json", "result.json", "DONE", "text.txt"} <= set(os.listdir(folder))
        lineage = json.loads((folder / "lineage.json").read_text())
        assert lineage["outputs"]["text.txt"]["bytes"] == len((folder / "text.txt").read_text())
        assert lineage["versions"]["python"].startswith("3.")
    assert lineage["inputs"]["data"]["path"] == "runs/toy/both"
    assert (RUN / "report.html").exists()
    assert ran(go(path)) == []


def test_only_what_hangs_on_a_change_is_run_again(recipe, capsys) -> None:
    path = recipe()
    go(path)
    capsys.readouterr()
    assert ran(go(path, overrides=["two.text=x"])) == ["two", "both", "model"]
    assert "two · write · text  → x" in capsys.readouterr().err
    # Back again: the stages are made anew, and the recipe as it is saved is that of the last run.
    assert ran(go(path)) == ["two", "both", "model"]
    assert ran(go(path, overrides=["model.steps=5"])) == ["model"]


def test_a_stage_that_comes_out_the_same_does_not_run_what_reads_it(recipe) -> None:
    path = recipe()
    go(path)
    assert ran(go(path, overrides=["both.inner.rate=0.1"])) == ["both"]


def test_another_seed_runs_everything_again(recipe) -> None:
    path = recipe()
    go(path)
    assert ran(go(path, seed=4)) == ["one", "two", "both", "model"]


def test_another_version_of_danlu_runs_it_again(recipe, monkeypatch, capsys) -> None:
    path = recipe()
    go(path)
    monkeypatch.setattr("danlu.core.identity.__version__", "99")
    assert "one" in ran(go(path))
    assert "→ 99" in capsys.readouterr().err


def test_a_changed_input_file_is_seen_by_its_content(recipe) -> None:
    Path("poem.txt").write_text("old")
    path = recipe("name: toy\nstages: [{name: one, verb: write, options: {source: poem.txt}}]")
    go(path)
    os.utime("poem.txt", (1, 1))  # touched, not changed
    assert ran(go(path)) == []
    Path("poem.txt").write_text("new")
    assert ran(go(path)) == ["one"]
    assert (RUN / "one/text.txt").read_text() == "new"


def test_inputs_in_lists_and_nested_parts_are_seen_too(recipe, capsys) -> None:
    for name in ("a", "b", "c"):
        Path(f"{name}.txt").write_text(name)
    path = recipe(
        "name: toy\nstages: [{name: one, verb: gather, options: "
        "{parts: [{}, {text: a.txt, texts: [b.txt]}], others: [c.txt]}}]"
    )
    go(path)
    assert ran(go(path)) == []
    for name, option in (("a", "parts.1.text"), ("b", "parts.1.texts.0"), ("c", "others.0")):
        Path(f"{name}.txt").write_text("new")
        assert ran(go(path)) == ["one"]
        assert f"{option} has other content than before" in capsys.readouterr().err
    Path("b.txt").unlink()
    with pytest.raises(UserError, match=r"stage one: parts.1.texts.0: b.txt: no such file"):
        go(path)


def test_a_result_that_was_touched_or_removed_is_made_again(recipe, capsys) -> None:
    path = recipe()
    go(path)
    (RUN / "one/text.txt").write_text("SEA")
    assert ran(go(path)) == ["one"]
    assert "text.txt was changed since" in capsys.readouterr().err
    (RUN / "both/text.txt").unlink()
    assert ran(go(path)) == ["both"]
    (RUN / "two/DONE").unlink()
    assert go(path)["two"] == "resumed"


def test_from_runs_a_stage_and_those_after_it_from_scratch(recipe) -> None:
    path = recipe()
    go(path)
    assert ran(go(path, **{"from": "both"})) == ["both", "model"]
    result = json.loads((RUN / "model/result.json").read_text())
    assert result["first"] == 0  # not from its old checkpoints
    with pytest.raises(UserError, match='no stage is called "bth"; did you mean "both"'):
        go(path, **{"from": "bth"})


def test_a_dry_run_says_why_and_writes_nothing(recipe) -> None:
    path = recipe()
    config = make_config(RunConfig, {"recipe": str(path), "dry_run": True})
    first = run(config, VERBS)
    assert [(i.stage, i.runs, i.why) for i in first] == [
        ("one", True, "not run yet"),
        ("two", True, "not run yet"),
        ("both", True, "reads one and two"),
        ("model", True, "reads both"),
    ]
    assert not Path("runs").exists()
    go(path)
    assert not any(intention.runs for intention in run(config, VERBS))


def test_interrupted_training_goes_on_in_its_folder(recipe) -> None:
    path = recipe()
    with pytest.raises(KeyboardInterrupt):
        go(path, overrides=["model.stop_at=2"])
    assert not (RUN / "model/DONE").exists()
    outcomes = go(path, overrides=["model.stop_at=2"])
    assert outcomes == {"one": "skipped", "two": "skipped", "both": "skipped", "model": "resumed"}
    assert json.loads((RUN / "model/result.json").read_text()) == {"first": 2, "steps": 4}


def test_interrupted_training_is_not_resumed_on_other_data(recipe) -> None:
    path = recipe()
    with pytest.raises(KeyboardInterrupt):
        go(path, overrides=["model.stop_at=2"])
    with pytest.raises(UserError, match="unfinished run on other data: data has other content") as caught:
        go(path, overrides=["model.stop_at=2", "one.text=x"])
    assert "--from model" in caught.value.remedy
    assert (RUN / "model/checkpoints/step-2").exists()
    # As the remedy says: back to the old data resumes, --from starts afresh.
    with pytest.raises(UserError):
        go(path, overrides=["model.stop_at=3", "one.text=x"])
    assert go(path, overrides=["model.stop_at=2"])["model"] == "resumed"
    go(path, overrides=["one.text=x"], **{"from": "model"})
    assert (RUN / "model/text.txt").read_text() == "seax sky 4"


def test_bad_input_leaves_nothing(recipe) -> None:
    path = recipe()
    with pytest.raises(UserError, match="sea: bad"):
        go(path, overrides=["one.fail=true"])
    assert not Path("runs").exists()
    go(path)
    with pytest.raises(UserError, match="sky: bad"):
        go(path, overrides=["two.fail=true"])
    assert not (RUN / "two").exists() or not any((RUN / "two").iterdir())
    assert (RUN / "one/DONE").exists()


def test_a_missing_file_is_found_before_anything_runs(recipe) -> None:
    path = recipe(
        "name: toy\nstages: [{name: one, verb: write}, {name: b, verb: join, options: {left: nowhere}}]"
    )
    with pytest.raises(UserError, match=r"toy.yaml, stage b: left: nowhere: no such file"):
        go(path)
    assert not Path("runs").exists()


def test_somebodys_files_are_not_touched(recipe) -> None:
    path = recipe()
    (RUN / "one").mkdir(parents=True)
    (RUN / "one/thesis.tex").write_text("x")
    for options in ({}, {"from": "one"}):
        with pytest.raises(UserError, match="holds files that no stage of danlu wrote"):
            go(path, **options)
    assert (RUN / "one/thesis.tex").exists()


def test_a_folder_in_use_is_refused(recipe) -> None:
    path = recipe()
    go(path)
    with locked(RUN / "one"), pytest.raises(UserError, match="another danlu is at work in it"):
        go(path)


def test_one_verb_of_a_recipe_runs_what_it_reads(recipe) -> None:
    path = recipe()
    verbs = {verb.name: verb for verb in VERBS}
    result = run_verb_of_recipe(verbs["join"], path, {"inner": {"rate": 0.2}}, VERBS)
    assert [outcome.stage for outcome in result.stages] == ["one", "two", "both"]
    assert result.report is None
    with pytest.raises(UserError, match="no stage of verb together"):
        run_verb_of_recipe(verbs["together"], path, {}, VERBS)


def test_a_verb_alone_refuses_to_write_over_a_finished_run(recipe) -> None:
    recipe()
    verb = VERBS[0]
    config = verb.load_config()
    first = run_verb(verb, make_config(config, {"out": "x/one"}))
    assert run_verb(verb, make_config(config, {"out": "x/one"})) == first == {"characters": 4}
    with pytest.raises(UserError, match=r"holds a finished run, and text  → x"):
        run_verb(verb, make_config(config, {"out": "x/one", "text": "x"}))
    assert Path("x/one/text.txt").read_text() == "poem"


def test_processes_of_torchrun_share_one_set_of_books(recipe, monkeypatch) -> None:
    """Two processes: one stage on both, one on the first while the second waits."""
    recipe("name: toy\nstages: [{name: one, verb: write}, {name: all, verb: together, options: {source: x}}]")
    code = (
        "from toy_verbs import VERBS\nfrom danlu.core.config import make_config\n"
        "from danlu.core.options import RunConfig\nfrom danlu.core.runner import run\n"
        "result = run(make_config(RunConfig, {'recipe': 'toy.yaml'}), VERBS)\n"
        "print([o.outcome for o in result.stages])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**environment, "RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in ("1", "0")
    ]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == "['ran', 'ran']"
    assert (RUN / "all/rank-1").exists()
    assert json.loads((RUN / "all/result.json").read_text()) == {"rank": 0}


def test_two_stages_at_once_in_threads_are_told_apart(recipe) -> None:
    """The lock is the folder's, so different stages don't wait for each other."""
    recipe()
    verb = VERBS[0]
    results = []

    def work(name):
        job = Job(verb, make_config(verb.load_config(), {"out": f"x/{name}"}), "command", rebuild=True)
        results.append(stages.run_stage(job).outcome)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["ran", "ran"]
