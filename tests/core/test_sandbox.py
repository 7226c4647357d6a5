"""The sandbox: what it lets through, what it holds in, and that nothing passes but what solves the test."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hostile import GAINS, PROGRAMS, SMALL, TEST, World, attempt, below, world
from hypothesis import given
from hypothesis import strategies as st

import danlu
from danlu.core.sandbox.host import FIRST_USER, Backend, Jail, Step
from danlu.core.sandbox.limits import Limits
from danlu.core.sandbox.values import decode, encode, no_handles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jails are Linux's")
BACKENDS: list[Backend] = ["namespaces", "bubblewrap"]


@pytest.fixture(scope="module", params=BACKENDS)
def jail(request: pytest.FixtureRequest) -> Iterator[Jail]:
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap isn't installed")
    with Jail(request.param, 0) as found:
        yield found


# Values


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=4)
        | st.frozensets(st.integers(), max_size=4)
        | st.sets(st.text(), max_size=4)
    ),
)


@given(plain)
def test_values_travel_whole(value: Any) -> None:
    found = decode(encode(value, no_handles), no_handles)
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, dict | set | frozenset | list | tuple)
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, 10**5000, complex(1, math.inf), "\ud800", -(1 << 63)],
    ids=["inf", "-inf", "long", "complex", "surrogate", "low"],
)
def test_odd_values_travel(value: Any) -> None:
    assert decode(encode(value, no_handles), no_handles) == value


def test_what_is_not_a_number_travels() -> None:
    assert math.isnan(decode(encode(math.nan, no_handles), no_handles))


def test_other_things_do_not_travel() -> None:
    with pytest.raises(TypeError):
        encode([Fraction(1, 2)], no_handles)


@given(
    st.binary()
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: repr(v).encode())
)
def test_nonsense_is_refused(data: bytes) -> None:
    with suppress(ValueError):
        value = decode(data, no_handles)
        assert repr(decode(encode(value, no_handles), no_handles)) == repr(value)


# What it lets through


HONEST = {
    "plain": ("def f(x): return x + 2", TEST),
    "prints": ("def f(x):\n    print('hello')\n    return x + 2", TEST),
    "a subclass": (
        "import collections\ndef f(x): return collections.Counter('aab')",
        "assert f(1) == {'a': 2, 'b': 1}",
    ),
    "names and sets": ("def f(x, *, y=1): return [x, y]", "assert f((1, 2), y={3}) == [(1, 2), {3}]"),
    "a generator": (
        "def f(n):\n    yield from range(n)",
        "assert list(f(3)) == [0, 1, 2]\nassert f(3) != [0, 1, 2]",
    ),
    "a function": ("def f(n): return lambda x: x + n", "assert f(2)(20) == 22"),
    "a class": (
        "class P:\n    def __init__(self, a): self.a = a\ndef f(ps): return [p.a for p in ps]",
        "assert f([P(1), P(2)]) == [1, 2]",
    ),
    "an exception": (
        "def f(x): raise KeyError(x)",
        "try:\n    f(1)\n    raise SystemError\nexcept KeyError:\n    pass",
    ),
    "a data class": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x): return A(x).x",
        "assert f(3) == 3",
    ),
    "nearly": (
        "def f(x): return 0.1 + 0.2",
        "import math\nassert math.isclose(f(0), 0.3)\nassert f(0) != 0.3",
    ),
    "a file": (
        "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile('w') as t: return t.write('ab')",
        "assert f(0) == 2",
    ),
    "a program": (
        "import subprocess\ndef f(x): return subprocess.run(['echo', 'a'], capture_output=True).stdout",
        "assert f(0) == b'a\\n'",
    ),
    "a thread": (
        "import threading\ndef f(x):\n    t = threading.Thread(target=print)\n    t.start()\n    t.join()\n"
        "    return 1",
        "assert f(0) == 1",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(jail: Jail, name: str) -> None:
    source, test = HONEST[name]
    found = jail.examine(source, "", test, ["f", "P"], SMALL)
    assert found.passed, found


def test_a_wrong_answer_is_shown_with_its_input(jail: Jail) -> None:
    found = jail.examine("def f(x):\n    return x - 2", "", TEST, ["f"], SMALL)
    assert (found.how, found.said, found.call) == ("failed", TEST, "f(20) → 18")
    found = jail.examine("def f(x):\n    return 1 / 0", "", TEST, ["f"], SMALL)
    assert (found.how, found.said) == ("raised", "ZeroDivisionError: division by zero")
    found = jail.examine("def f(x) return", "", TEST, ["f"], SMALL)
    assert (found.how, found.said[:11]) == ("raised", "SyntaxError")
    found = jail.examine("def g(x): return 22", "", TEST, ["f"], SMALL)
    assert (found.how, "has no attribute 'f'" in found.said) == ("raised", True)


def test_a_broken_test_is_not_the_candidates_fault(jail: Jail) -> None:
    assert jail.examine("def f(x): return 22", "import nothing_such", TEST, ["f"], SMALL).how == "test broken"


def test_the_test_can_say_more_than_pass(jail: Jail) -> None:
    found = jail.examine("def f(x): return x * x", "", "result = [f(n) for n in range(4)]", ["f"], SMALL)
    assert found.result == [0, 1, 4, 9]


def test_programs_run_one_after_the_other(jail: Jail) -> None:
    def shell(line: str, **options: Any) -> Step:
        return Step(["sh", "-c", line], **options)

    found = jail.run([Step(["cat", "a/b"]), shell("echo $HOME; exit 3"), shell("true")], {"a/b": "text\n"})
    assert (found.codes, found.outputs[:2], found.why) == ([0, 3], ["text\n", "/tmp\n"], "ended")
    assert jail.run([shell("kill -SEGV $$")], {}).codes == [-11]
    assert jail.run([shell("sleep 60")], {}, Limits(seconds=0.5)).why == "timed out"
    found = jail.run([shell("sleep 60", seconds=0.2, may_fail=True), shell("echo on")], {})
    assert (found.codes, found.outputs) == ([None, 0], ["", "on\n"])
    # What a program leaves running is gone before the next one starts.
    left = shell("sleep 60 & (setsid sleep 61 &) ; echo left")
    found = jail.run([left, shell("ps -e -o args | grep -c 'slee[p]'", may_fail=True)], {})
    assert found.outputs == ["left\n", "0\n"]


def test_without_a_jail_it_does_the_same_and_leaves_nothing() -> None:
    """For --unsafe. What it doesn't hold in is not asked of it."""
    before = {path.name for path in Path(tempfile.gettempdir()).glob("danlu-unsafe-*")}
    with Jail("none", 0) as jail:
        assert jail.examine("def f(x):\n    return x + 2", "", TEST, ["f"], SMALL).passed
        assert (
            jail.examine("def f(x):\n    while True:\n        pass", "", TEST, ["f"], SMALL).how
            == "timed out"
        )
        found = jail.run([Step(["sh", "-c", "sleep 60 & cat a"]), Step(["false"])], {"a": "text"})
        assert (found.codes, found.outputs) == ([0, 1], ["text", ""])
        assert len(below(jail.process.pid)) == 1
    assert {path.name for path in Path(tempfile.gettempdir()).glob("danlu-unsafe-*")} == before


# What it holds in


@pytest.fixture(scope="module")
def around() -> Iterator[World]:
    with world() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_gets_out_and_nothing_passes(jail: Jail, around: World, name: str) -> None:
    assert attempt(jail, around, name) == []


def test_hostile_programs_are_what_they_seem(around: World) -> None:
    """Outside of any jail the harmless ones of them get what they are after: the test above can fail."""
    for name in ("connects to the host", "reads the home of its user", "an abstract socket of the host"):
        space: dict[str, Any] = {}
        exec(around.program(name), space)
        assert GAINS.search(str(space["f"](20)))
    assert around.harm() == ["a connection came in"] * 2
    space = {}
    exec(PROGRAMS["is equal to everything"], space)
    assert space["f"](20) == 22


def test_the_user_of_a_jailed_program_is_not_root(jail: Jail) -> None:
    """Seen from outside, where it counts: the kernel's number, not what a namespace makes of it."""
    source = "import time\ndef f(x):\n    time.sleep(1)\n    return x + 2"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(jail.examine, source, "", TEST, ["f"], Limits(seconds=10))
        time.sleep(0.5)
        users = {os.stat(f"/proc/{process}").st_uid for process in below(jail.process.pid)[2:]}
        assert running.result().passed
    # The guard is the warden's; the others are the candidate and its examiner.
    assert users == ({0, FIRST_USER, FIRST_USER + 1} if os.geteuid() == 0 else {os.getuid()})


SOMEBODY = 12_345
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """What another user can read of danlu, and an interpreter that runs for such a user."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        for file in ("__init__.py", "core/__init__.py", "core/errors.py", "core/sandbox"):
            source, target = Path(danlu.__file__).parent / file, folder / "danlu" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        shutil.copy(Path(__file__).with_name("hostile.py"), folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        (folder / "home").mkdir()
        os.chown(folder / "home", SOMEBODY, SOMEBODY)
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        for python in (sys.executable, "/usr/bin/python3"):
            with suppress(OSError):
                if subprocess.run([python, "-I", "-c", check], user=SOMEBODY, check=False).returncode == 0:
                    yield folder, python
                    return
        pytest.skip("no Python 3.11 that another user may run")


def as_somebody(
    elsewhere: tuple[Path, str], *before: str, user: int = SOMEBODY
) -> "subprocess.CompletedProcess[str]":
    folder, python = elsewhere
    return subprocess.run(
        [*before, python, str(folder / "hostile.py"), *BACKENDS],
        user=user,
        group=user,
        extra_groups=[],
        cwd="/",
        env={"HOME": str(folder / "home") if user else "/root", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


@ROOT_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("before", [(), ("unshare", "--user", "--map-root-user")], ids=["plain", "as root"])
def test_it_holds_for_an_ordinary_user_too(elsewhere: tuple[Path, str], before: tuple[str, ...]) -> None:
    """Also where the user seems to be root, in a user namespace of its own."""
    done = as_somebody(elsewhere, *before)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@ROOT_ONLY
def test_what_does_not_hold_is_refused(elsewhere: tuple[Path, str]) -> None:
    """The root of a user namespace who is root outside too is one whom the kernel grants any processes."""
    done = as_somebody(elsewhere, "unshare", "--user", "--map-root-user", user=0)
    assert done.returncode != 0
    assert "it starts 32 processes where 8 are allowed" in done.stderr
