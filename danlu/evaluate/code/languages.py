"""How a program of a language is put together with its test, made and run.

Python is not here: there candidate and test run apart (`core.sandbox.examine`). A compiled test shares a
process with its candidate, which could end it, or say what means success. That is met twice. The word for
success is drawn anew for each test, and said by its last line. And the program runs again with a switch that
makes the end of the test fail: who says the word then too was not tested by it.
"""

import hashlib
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from danlu.core.device import cache_folder
from danlu.core.files import atomic_folder
from danlu.core.sandbox.host import Jail, Ran, Step
from danlu.core.sandbox.limits import Limits
from danlu.core.toolchains import GO_PACKAGES, NODE_MODULES
from danlu.evaluate.code.problems import Language, Problem

SWITCH = "DANLU_SWITCH"
"""Variable of the environment that says whether the end of the test is to fail."""


@dataclass(frozen=True)
class Source:
    """A program with its test, ready to be made and run."""

    files: Mapping[str, str]
    make: Sequence[Sequence[str]]
    run: Sequence[str]


@dataclass(frozen=True)
class Way:
    """How a language's programs are made and run."""

    source: Callable[[Problem, str, str, str], Source]
    """Of a problem, a whole program, the word, and the switch's value that lets the test end well."""
    environment: Mapping[str, str]
    memory_bytes: int = 2 << 30


def run_source(
    jail: Jail, problem: Problem, program: str, make_seconds: float, seconds: float
) -> tuple[Ran, bool]:
    """Makes and runs a program with its test. Returns how that went, and whether the test was passed."""
    word, good, bad = (secrets.token_hex(12) for _ in range(3))
    way = WAYS[problem.language]
    source = way.source(problem, program, word, good)
    environment = dict(way.environment)
    steps = [Step(argv, make_seconds, environment) for argv in source.make]
    steps += [Step(source.run, seconds, environment | {SWITCH: good})]
    steps += [Step(source.run, seconds, environment | {SWITCH: bad})]
    limits = Limits(
        seconds=make_seconds * len(source.make) + 2 * seconds + 1,
        memory_bytes=way.memory_bytes,
        processes=256,
        file_bytes=256 << 20,
        address_space=False,
    )
    ran = jail.run(steps, source.files, limits)
    n = len(source.make)
    said = word in ran.outputs[n].splitlines() and word not in ran.outputs[n + 1]
    return ran, ran.codes[: n + 1] == [0] * (n + 1) and said


def shown(language: Language) -> list[tuple[str, str]]:
    """What a jail has to show for a language beside the system, and where."""
    return [(str(warm_go()), GO_CACHE)] if language == "go" else []


def _before_last(text: str, mark: str, inserted: str, count: int = 1) -> str:
    """With something put before the last, or the last but one, of these marks."""
    place = len(text)
    for _ in range(count):
        place = text.rindex(mark, 0, place)
    return text[:place] + inserted + text[place:]


# C++

_CPP_BEGIN = """#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <iostream>
#include <map>
#include <set>
#include <string>
#include <vector>
"""


def _cpp(problem: Problem, program: str, word: str, good: str) -> Source:
    end = f"""
    const char* danlu_switch = getenv("{SWITCH}");
    assert (danlu_switch && string(danlu_switch) == "{good}");
    puts("{word}");
    fflush(stdout);
"""
    test = _before_last(problem.test, "}", end)
    whole = f"{_CPP_BEGIN}\n{program}\n{test}"
    make = ["g++", "-std=c++17", "-O1", "-w", "-o", "main", "main.cpp", "-lcrypto"]
    return Source({"main.cpp": whole}, [make], ["./main"])


# Java


def _java(problem: Problem, program: str, word: str, good: str) -> Source:
    end = f"""
        if (!"{good}".equals(System.getenv("{SWITCH}"))) throw new AssertionError();
        System.out.println("{word}");
"""
    test = _before_last(problem.test, "}", end, 2)
    flags = ["-Xmx512m", "-Xss16m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
    make = ["javac", *(f"-J{flag}" for flag in flags), "-nowarn", "-encoding", "UTF-8", "Main.java"]
    whole = f"{program}\n{test}"
    return Source({"Main.java": whole}, [make], ["java", *flags, "-ea", "Main"])


# JavaScript


def _js(problem: Problem, program: str, word: str, good: str) -> Source:
    # Node's own `console.assert` only prints.
    begin = """
;console.assert = (held, ...said) => { if (!held) { throw new Error(`assertion failed ${said}`) } };
"""
    end = f"""
;console.assert(process.env.{SWITCH} === "{good}");
;console.log("{word}");
"""
    whole = f"{program}\n{begin}\n{problem.test}\n{end}"
    return Source({"main.js": whole}, [], ["node", "--stack-size=4000", "main.js"])


# Go

_GO_PACKAGES = """bufio bytes container/heap container/list crypto/md5 encoding/hex errors fmt io math
math/big math/bits math/cmplx math/rand os reflect regexp sort strconv strings time unicode unicode/utf8
"""


def _go(problem: Problem, program: str, word: str, good: str) -> Source:
    end = f"""
    if t.Failed() || os.Getenv("{SWITCH}") != "{good}" {{
        t.FailNow()
    }}
    println("{word}")
"""
    body = f"{program}\n{_before_last(problem.test, '}', end)}"
    # Go refuses what is imported and not used, and a completion may use what its prompt didn't import.
    code = re.sub(r"//[^\n]*", "", body)
    given = set(re.findall(r'"([\w./]+)"', problem.setup))
    known = {*_GO_PACKAGES.split(), *re.findall(r'"([\w./]+)"', problem.imports)} - given
    used = [name for name in sorted(known) if re.search(rf"\b{Path(name).name}\.\w", code)]
    imports = "".join(f'import "{name}"\n' for name in used)
    whole = f"{problem.setup}\n{imports}\n{body}"
    make = ["go", "test", "-c", "-vet=off", "-o", "main", "main_test.go"]
    return Source({"main_test.go": whole}, [make], ["./main"])


GO_CACHE = "/go-cache"
"""Where a jail shows what Go has made already; it can't be written there."""
_GO_WARM = """package main
import ("testing"; "github.com/stretchr/testify/assert")
func TestWarm(t *testing.T) { assert.Equal(t, 1, 1) }
"""


def warm_go() -> Path:
    """The folder of what Go has made of its packages and the tests' library: made once, in no jail."""
    version = subprocess.run(["go", "version"], capture_output=True, text=True, check=True).stdout
    folder = cache_folder() / f"go-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    if not folder.exists():
        with atomic_folder(folder) as made, tempfile.TemporaryDirectory() as work:
            (Path(work) / "main_test.go").write_text(_GO_WARM)
            environment = {**os.environ, **WAYS["go"].environment, "GOCACHE": str(made)}
            command = ["go", "test", "-c", "-vet=off", "-o", "main", "main_test.go"]
            # Without the tests' library it fails, and so will those that need it, by name.
            subprocess.run(command, cwd=work, env=environment, capture_output=True, check=False)
    return folder


WAYS: dict[Language, Way] = {
    "cpp": Way(_cpp, {}),
    "java": Way(_java, {}),
    "js": Way(_js, {"NODE_PATH": ":".join(NODE_MODULES)}),
    "go": Way(_go, {"GO111MODULE": "off", "GOPATH": GO_PACKAGES, "GOFLAGS": "-p=1", "GOCACHE": GO_CACHE}),
}
