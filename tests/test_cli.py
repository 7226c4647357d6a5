"""The real `danlu` command: what it prints where, how it ends, and that every row of its table works."""

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from real_runs import DANLU

from danlu import __version__
from danlu.cli import VERBS
from danlu.core.commands import Option, options, parse
from danlu.core.config import Config, StageConfig, read_yaml
from danlu.core.verbs import Verb, resolve

NAMES = [name for verb in VERBS for name in verb.names]
GROUPS = sorted({name.split()[0] for name in NAMES if " " in name} - set(NAMES))
EXAMPLES = [example for verb in VERBS for example in verb.examples]


def danlu(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in the current folder."""
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [DANLU, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of the tiny run."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The table of verbs.


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_everything_that_a_row_names_is_there(verb: Verb) -> None:
    assert callable(verb.load_function())
    cls = verb.load_config()
    assert issubclass(cls, StageConfig if verb.stage else Config)
    assert set(verb.positional) <= cls.model_fields.keys()
    if verb.show:
        assert callable(verb.load_show())
    if verb.stage:
        assert verb.estimate, "a stage says to `danlu plan` what it will need"
    if verb.estimate:
        assert callable(resolve(verb.estimate))
    assert verb.examples
    assert verb.help.endswith(".")
    for option in options(cls):
        assert option.help, f"{option.name} is not described"


def test_no_name_is_given_twice() -> None:
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_parses(example: str) -> None:
    call = parse(VERBS, shlex.split(example))
    assert call is not None
    assert any(example.startswith(name) for name in call.verb.names)


def value_for(option: Option) -> str:
    """Something that may be given for an option."""
    if option.choices:
        return option.choices[-1]
    kind = option.types[0]
    return {int: "3", float: "0.5"}.get(kind, "some=text, with signs")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_both_forms_of_every_option_are_the_same(verb: Verb) -> None:
    known = [o for o in options(verb.load_config()) if o.path[0] not in (*verb.positional, "overrides")]
    values = {option: "true" if option.is_flag else value_for(option) for option in known}
    command = [*verb.name.split(), *(f"some-{name}" for name in verb.positional)]
    plain = [word for o, value in values.items() for word in ([o.name] if o.is_flag else [o.name, value])]
    with_equals = [f"{o.name}={value}" for o, value in values.items()]
    as_keys = [f"{'.'.join(o.path)}={value}" for o, value in values.items()]
    first, *others = [parse(VERBS, [*command, *form]) for form in (plain, with_equals, as_keys)]
    assert first is not None
    for option in known:
        given: Any = first.values
        for part in option.path:
            given = given[part]
        assert given is not None
    assert others == [first, first]


# Help.


def test_help_lists_every_verb_in_under_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = danlu("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    for name in NAMES:
        assert name.split()[0] in done.stdout
    assert "danlu quickstart" in done.stdout
    assert min(seconds) < 1.0  # the fastest of five: another program at work does not count


def imported(stderr: str) -> set[str]:
    """Packages in the listing that -X importtime writes."""
    found = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", stderr, flags=re.MULTILINE)
    assert "danlu.core.commands" in found
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("name", ["", *NAMES, *GROUPS])
def test_help_of_every_verb_works_and_imports_nothing_heavy(name: str) -> None:
    done = danlu(*name.split(), "--help", env={"PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "200"})
    assert done.returncode == 0
    heavy = {"torch", "numpy", "transformers", "tokenizers", "pyarrow", "matplotlib", "numba"}
    assert not heavy & imported(done.stderr)
    verb = next((verb for verb in VERBS if name in verb.names), None)
    if verb:
        text = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
        assert verb.help.split(".")[0].replace("`", "") in text
        for example in verb.examples:
            assert f"danlu {example}" in text
        for option in options(verb.load_config()):
            assert option.name in text or option.path[0] in (*verb.positional, "overrides")


def test_without_a_verb_the_help_is_shown() -> None:
    assert danlu().stdout == danlu("--help").stdout != ""


def test_version() -> None:
    assert danlu("--version").stdout == f"{__version__}\n"


# How it ends.


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("pretrian", "pretrain"),
        ("tokenizer trian", "train"),
        ("quikstart", "quickstart"),
        ("doctor --jsn", "--json"),
        ("pretrain --seqence-length 3", "--sequence-length"),
        ("run tiny.yaml --dry_rn", "--dry-run"),
        ("run tiny.yaml pretrain.model.widht=3", "width"),
        ("lineage runs/tiny --depth 3", "danlu lineage --help"),
        ("tokenizer", "train"),
        ("lineage", "path"),
    ],
)
def test_unknown_and_missing_words_end_with_2_and_say_what_there_is(
    here: Path, command: str, expected: str
) -> None:
    done = danlu(*command.split())
    if command == "tokenizer":  # only half a verb: its help
        assert done.returncode == 0
        assert expected in done.stdout
        return
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("danlu: ")
    assert "Traceback" not in done.stderr
    assert expected in done.stderr


def sabotaged(fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`danlu lineage .` with a fault put into it."""
    code = (
        "import sys, danlu.core.lineage\n"
        f"def lineage(config): {fault}\n"
        "danlu.core.lineage.lineage = lineage\n"
        "from danlu.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "lineage", ".", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_fault_of_ours_ends_with_1_and_asks_for_a_report() -> None:
    for arguments in ([], ["--json"]):
        done = sabotaged("[][0]", *arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "IndexError: list index out of range" in done.stderr
        assert "fault in danlu, not in your input" in done.stderr
        assert "Please report it" in done.stderr


def test_a_fault_of_the_user_ends_with_2_and_no_traceback() -> None:
    fault = "from danlu.core.errors import UserError; raise UserError('a.txt: is wrong', 'mend it')"
    done = sabotaged(fault)
    assert done.returncode == 2
    assert done.stderr == "danlu: a.txt: is wrong\n  → mend it\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_130(number: signal.Signals) -> None:
    done = sabotaged(f"import os; os.kill(os.getpid(), {number.value}); import time; time.sleep(60)")
    assert done.returncode == 130
    assert done.stderr.strip() == "danlu: interrupted"


@pytest.mark.parametrize(
    "command", ["--help", "--version", "lineage runs/tiny", "lineage runs/tiny --json", "run tiny.yaml"]
)
def test_a_reader_that_has_seen_enough_is_no_fault(here: Path, command: str) -> None:
    read, write = os.pipe()
    os.close(read)  # nobody reads
    done = subprocess.run(
        [DANLU, *command.split()], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# What is printed where.


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("doctor --json", {"machine", "extras", "findings"}),
        ("plan tiny.yaml --json", {"stages", "seconds", "memory_bytes", "problems"}),
        ("run tiny.yaml --dry-run --json", None),
        ("lineage runs/tiny --json", None),
        ("report runs/tiny --json", {"report", "figures"}),
        ("data check chats.jsonl --json", None),
        ("data prepare chats.jsonl --out x --json", {"read", "train"}),
        ("generate runs/tiny --prompt Hello --json --max-tokens 3", {"prompt", "answers"}),
        ("eval runs/tiny/pretrain --data runs/tiny/data --json", {"bits_per_byte", "held_out_bytes"}),
    ],
)
def test_json_prints_only_json_on_stdout(here: Path, command: str, keys: set[str] | None) -> None:
    done = danlu(*command.split())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result
    if keys:
        assert keys <= result.keys()


def test_json_of_a_run_says_what_became_of_each_stage(here: Path) -> None:
    result = json.loads(danlu("pretrain", "tiny.yaml", "--steps", "21", "--json").stdout)
    assert result.keys() == {"run", "folder", "stages", "seconds", "report"}
    outcomes = {stage["stage"]: stage["outcome"] for stage in result["stages"]}
    names = [stage["name"] for stage in read_yaml(here / "tiny.yaml")["stages"]]
    names.remove("chat-tokens")  # pretraining does not read it
    assert outcomes == {**dict.fromkeys(names[:3], "skipped"), "pretrain": "ran"}
    assert result["stages"][3]["result"]["steps"] == 21


def test_options_reach_the_config_in_both_forms(here: Path) -> None:
    assert danlu("data", "prepare", "chats.jsonl", "--out", "a", "--held-out", "0.2").returncode == 0
    assert danlu("data", "prepare", "chats.jsonl", "out=b", "held_out=0.2").returncode == 0
    one, other = (read_yaml(here / name / "config.yaml") for name in ("a", "b"))
    assert one.pop("out") == "a"
    assert other.pop("out") == "b"
    assert one == other
    assert one["held_out"] == 0.2


@pytest.mark.parametrize("prompt", ["-5 degrees", "--help", "--json", "-o", "a=b", "model.width=3", "--"])
def test_a_value_may_look_like_an_option_or_an_override(prompt: str) -> None:
    call = parse(VERBS, ["generate", "a-model", "--max-tokens", "1", "--prompt", prompt, "--chat"])
    assert call is not None
    assert call.values == {"model": "a-model", "max_tokens": 1, "prompt": prompt, "chat": True}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("pretrain --sample-prompts A --sample-prompts B", ["A", "B"]),
        ("pretrain --sample-prompts '[A, \"B: x\"]'", ["A", "B: x"]),
        ("pretrain 'sample_prompts=[A, B]'", ["A", "B"]),
        ("pretrain sample_prompts=A", ["A"]),
    ],
)
def test_lists_are_given_one_by_one_or_as_in_a_recipe(typed: str, expected: list[str]) -> None:
    call = parse(VERBS, shlex.split(typed))
    assert call is not None
    assert call.values == {"sample_prompts": expected}


@pytest.mark.parametrize("given", ["-o x", "-o=x", "--out x", "--out=x", "out=x"])
def test_the_short_name_of_out(given: str) -> None:
    call = parse(VERBS, ["compress", "a-file", *given.split()])
    assert call is not None
    assert call.values == {"file": "a-file", "out": "x"}


def on_a_terminal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """What `danlu` writes to a terminal of 100 columns."""
    master, slave = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", **(env or {})}
    process = subprocess.Popen([DANLU, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    written = b""
    while select.select([master], [], [], 60)[0]:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(master)
    assert process.wait(timeout=60) == 0
    return written.decode()


@pytest.mark.parametrize("command", ["--help", "pretrain --help", "lineage runs/tiny", "run tiny.yaml"])
def test_no_color_is_honoured(here: Path, command: str) -> None:
    assert "\x1b[" in on_a_terminal(*command.split())
    assert "\x1b" not in on_a_terminal(*command.split(), env={"NO_COLOR": "1"})
    assert "\x1b" not in danlu(*command.split()).stdout


def test_text_of_a_model_is_printed_as_it_is(here: Path) -> None:
    """What looks like rich's markup or an emoji's name is neither."""
    result = here / "runs/tiny/scores/result.json"
    found = json.loads(result.read_text())
    found["chat_quality"]["examples"][0]["reply"] = "[/b] :dog: [red]x"
    result.write_text(json.dumps(found))
    done = danlu("run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "[/b] :dog: [red]x" in done.stdout


# Interrupted and resumed.


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run tiny.yaml --from pretrain", "pretrain tiny.yaml --json"])
def test_an_interrupted_run_prints_the_command_that_resumes_it(here: Path, command: str) -> None:
    extra = ["pretrain.steps=3000"] if command.startswith("run") else ["--steps", "3000"]
    process = subprocess.Popen([DANLU, *command.split(), *extra], stderr=subprocess.PIPE, text=True)
    checkpoints = here / "runs/tiny/pretrain/checkpoints"
    while not (checkpoints / "step-00000200").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    said, typed = stderr.rstrip().rsplit("\n", 1)
    assert said.endswith("danlu: interrupted; what is done is kept. To go on:")
    assert "--from" not in typed  # from scratch once, not twice
    path = f"{Path(DANLU).parent}:{os.environ['PATH']}"
    resumed = subprocess.run(
        typed.strip(), shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from the checkpoint of step" in resumed.stderr
    assert json.loads((here / "runs/tiny/pretrain/result.json").read_text())["steps"] == 3000
    lineage = json.loads((here / "runs/tiny/pretrain/lineage.json").read_text())
    assert lineage["seconds"] > json.loads((here / "runs/tiny/pretrain/result.json").read_text())["seconds"]
