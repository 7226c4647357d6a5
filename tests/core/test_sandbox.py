"""The sandbox: what it lets through, what it holds in, and that nothing passes but what solves the test."""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile import PROGRAMS
from hypothesis import given
from hypothesis import strategies as st

from danlu.core.sandbox.host import FIRST_USER, Backend, Jail
from danlu.core.sandbox.limits import Limits
from danlu.core.sandbox.values import decode, encode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jails are Linux's")
BACKENDS: list[Backend] = ["namespaces", "bubblewrap"]
TEST = "assert f(20) == 22"
SMALL = Limits(seconds=3, memory_bytes=512 << 20, processes=32)


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


def refuse(value: Any) -> Any:
    raise TypeError(value)


@given(plain)
def test_values_travel_whole(value: Any) -> None:
    found = decode(encode(value, refuse), refuse)
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, dict | set | frozenset | list | tuple)
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, 10**5000, complex(1, math.inf), "\ud800", -(1 << 63)],
    ids=["inf", "-inf", "long", "complex", "surrogate", "low"],
)
def test_odd_values_travel(value: Any) -> None:
    assert decode(encode(value, refuse), refuse) == value


def test_what_is_not_a_number_travels() -> None:
    assert math.isnan(decode(encode(math.nan, refuse), refuse))


def test_other_things_do_not_travel() -> None:
    with pytest.raises(TypeError):
        encode([Fraction(1, 2)], refuse)


@given(
    st.binary()
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: repr(v).encode())
)
def test_nonsense_is_refused(data: bytes) -> None:
    with suppress(ValueError):
        decode(data, refuse)


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
    assert (found.how, found.call) == ("failed", "f(20) → 18")
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
    found = jail.run([["cat", "a/b"], ["sh", "-c", "echo $HOME; exit 3"], ["true"]], {"a/b": "text\n"})
    assert (found.codes, found.output, found.why) == ([0, 3], "text\n/tmp\n", "ended")
    assert jail.run([["sh", "-c", "kill -SEGV $$"]], {}).codes == [-11]
    assert jail.run([["sleep", "60"]], {}, limits=Limits(seconds=0.5)).why == "timed out"


# What it holds in


@pytest.fixture(scope="module")
def world() -> Iterator[dict[str, Any]]:
    """What a program may try to reach: a secret, a server, a socket, a process."""
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(dir=Path.home(), prefix="danlu-secret-"))
        secret = Path(home) / "danlu-secret"
        secret.write_text("the danlu-secret is 4711")
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0danlu-hostile-{port}")
        abstract.listen()
        for one in (server, abstract):
            one.settimeout(0)
        victim = subprocess.Popen(["sleep", "600"])
        try:
            yield {
                "secret_file": secret,
                "port": port,
                "victim": victim.pid,
                "servers": (server, abstract),
                "prefix": sys.base_prefix,
            }
        finally:
            victim.kill()
            victim.wait()


BAD = re.compile(
    r"4711|connected|^wrote|traced|read \d|mounted|unshared|says 0|made many|too much|made it|found what"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_gets_out_and_nothing_passes(jail: Jail, world: dict[str, Any], name: str) -> None:
    source = PROGRAMS[name].format(**world)
    begin = time.monotonic()
    found = jail.examine(source, "", TEST, ["f"], SMALL)
    assert not found.passed, found
    assert time.monotonic() - begin < SMALL.seconds + 3
    gained = jail.examine(source, "", "result = str(f(20))", ["f"], SMALL)
    assert not BAD.search(str(gained.result)), gained
    assert_unharmed(jail, world)


def assert_unharmed(jail: Jail, world: dict[str, Any]) -> None:
    assert jail.examine("def f(x):\n    return x + 2", "", TEST, ["f"], SMALL).passed
    assert psutil.Process(world["victim"]).status() == psutil.STATUS_SLEEPING
    assert world["secret_file"].read_text() == "the danlu-secret is 4711"
    for server in world["servers"]:
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not [*Path("/").glob("danlu-hostile"), *Path("/").glob("*/danlu-hostile")]
    # All that is left is the jail's own: its starter and the warden.
    inside = psutil.Process(jail.process.pid).children(recursive=True)
    assert len(inside) == 1, inside


def test_hostile_programs_are_those_that_they_seem(world: dict[str, Any]) -> None:
    """Outside of any jail the harmless ones of them get what they are after: the test above can fail."""
    for name in ("connects to the host", "reads the home of its user", "an abstract socket of the host"):
        space: dict[str, Any] = {}
        exec(PROGRAMS[name].format(**world), space)
        assert BAD.search(str(space["f"](20)))
    for server in world["servers"]:
        server.accept()[0].close()
    space = {}
    exec(PROGRAMS["is equal to everything"], space)
    assert space["f"](20) == 22


def test_the_user_of_a_jailed_program_is_not_root(jail: Jail, world: dict[str, Any]) -> None:
    """Seen from outside, where it counts: the kernel's number, not what a namespace makes of it."""
    waits = "import time\ndef f(x):\n    open('/tmp/danlu-here', 'w')\n    time.sleep(1.5)\n    return 22"
    seen: set[int] = set()
    reader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.7)"])
    import threading

    def look() -> None:
        reader.wait()
        for process in psutil.Process(jail.process.pid).children(recursive=True):
            seen.add(process.uids().real)

    watcher = threading.Thread(target=look)
    watcher.start()
    assert jail.examine(waits, "", TEST, ["f"], SMALL).passed
    watcher.join()
    if os.geteuid() == 0:
        assert {FIRST_USER, FIRST_USER + 1} <= seen
    else:
        assert seen == {os.getuid()}


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user")
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_holds_for_an_ordinary_user_too(backend: str, tmp_path: Path) -> None: ...


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a user namespace with root in it")
def test_root_that_is_not_root_is_an_ordinary_user() -> None: ...
