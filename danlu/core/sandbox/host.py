"""Jails on this machine, each with a warm interpreter, that prove what they promise before use."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import danlu
from danlu.core.errors import UserError
from danlu.core.sandbox import jail, kernel
from danlu.core.sandbox.examine import Wire
from danlu.core.sandbox.limits import Limits
from danlu.core.sandbox.values import MAX_BYTES

Backend = Literal["bubblewrap", "namespaces", "none"]
"""What holds programs in; none is for `--unsafe`, and holds nothing."""
FIRST_USER = 61_000
"""Users of the jailed programs, when danlu is root: numbers that nobody on the machine has."""
INSIDE = "/danlu"
"""Where a jail shows danlu's own code."""


@dataclass(frozen=True)
class Examined:
    """How a candidate did in a test."""

    how: str
    """passed, failed, raised, timed out, ended, too much output, too much memory, test broken."""
    said: str
    """What was raised, in a line."""
    call: str
    """The last call of the candidate, and what came of it."""
    output: str
    """What the candidate printed, the beginning."""
    seconds: float
    result: Any
    """What the test has called `result`."""

    @property
    def passed(self) -> bool:
        return self.how == "passed"


@dataclass(frozen=True)
class Step:
    """A program to run."""

    argv: Sequence[str]
    seconds: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)
    may_fail: bool = False
    """Whether what comes after it runs all the same."""


@dataclass(frozen=True)
class Ran:
    """How programs ended, one after the other."""

    codes: list[int | None]
    """Of each that was run; negative: the number of the signal; None: it took too long."""
    seconds: list[float]
    outputs: list[str]
    """stdout and stderr together, the beginning."""
    why: str
    """Why there are no more: ended, timed out, too much output, too much memory."""


class Jail:
    """One jail, which runs one program at a time. Close it, or use it with `with`."""

    def __init__(self, backend: Backend, number: int, shown: Sequence[tuple[str, str]] = ()) -> None:
        """`number` tells jails apart that run side by side. Raises UserError where the machine has no way."""
        if sys.platform != "linux" or not kernel.SUPPORTED:
            raise UserError("code can be run in a jail of Linux on x86-64 and ARM only", "run it there")
        self.backend = backend
        privileged = os.geteuid() == 0 and _can_change_user()
        users = (FIRST_USER + 2 * number, FIRST_USER + 2 * number + 1) if privileged else None
        here, theirs = socket.socketpair()
        interpreter = os.path.realpath(sys.executable)
        places = [(str(Path(danlu.__file__).parent), f"{INSIDE}/danlu")]
        if not _is_below(sys.base_prefix, jail.SYSTEM):
            places.append((sys.base_prefix, sys.base_prefix))
        root = jail.Root((*places, *shown))
        with theirs:
            inner = json.dumps([theirs.fileno(), backend, root.shown, users])
            where = INSIDE if backend == "bubblewrap" else str(Path(danlu.__file__).parents[1])
            begin = f"import sys; sys.path.insert(0, {where!r})"
            code = f"{begin}; from danlu.core.sandbox import warden; warden.main()"
            command = [interpreter, "-I", "-S", "-B", "-c", code, inner]
            if backend == "bubblewrap":
                program = shutil.which("bwrap")
                if program is None:
                    raise UserError("bubblewrap (the program bwrap) is not installed", "install it")
                command = [*jail.bwrap_command(program, root, privileged), "--", *command]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
            )
        self._socket = here
        self._wire = Wire(here.fileno(), here.fileno())
        try:
            self._wire.receive()
        except EOFError:
            raise UserError(f"no jail with {backend}: {self._last_words()}", REMEDY) from None
        if backend != "none" and backend not in _PROVED:
            try:
                self._prove()
            except UserError:
                self.close()
                raise
            _PROVED.add(backend)

    def examine(
        self, source: str, context: str, test: str, names: Sequence[str], limits: Limits | None = None
    ) -> Examined:
        """A Python candidate in a test that calls these functions of it (`examine.py`)."""
        order = {"context": context, "test": test, "names": list(names), "token": secrets.token_hex(16)}
        found = self._ask("python", limits, _text(source), json.dumps(order).encode())
        return Examined(output=found.pop("outputs")[0], **found)

    def run(self, steps: Sequence[Step], files: Mapping[str, str], limits: Limits | None = None) -> Ran:
        """Programs one after the other, in a folder with these files, until one fails.

        The limit of time is for all together, and each has its own.
        """
        home = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
        order = {
            "steps": [
                asdict(step) | {"argv": list(step.argv), "environment": home | dict(step.environment)}
                for step in steps
            ],
            "files": dict(files),
        }
        found = self._ask("commands", limits, json.dumps(order).encode())
        codes, seconds = [code for code, _ in found["steps"]], [time for _, time in found["steps"]]
        return Ran(codes, seconds, found["outputs"], found["how"])

    def _prove(self) -> None:
        """Raises UserError where what a jail is for isn't so on this machine."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            test = f"result = found({server.getsockname()[1]}, {_FEW})"
            found = self.examine(_PROBE, "", test, ["found"], Limits(seconds=5, processes=_FEW)).result
        if not isinstance(found, list):
            raise UserError("a jail can't run a program", REMEDY)
        escapes = [str(one) for one in found]
        hungry = self.examine(_HUNGRY, "", "f()", ["f"], Limits(seconds=5, memory_bytes=256 << 20))
        if hungry.how == "passed":
            escapes.append("a program gets more memory than its limit")
        if self.examine(_ENDLESS, "", "f()", ["f"], Limits(seconds=0.2)).how != "timed out":
            escapes.append("a program runs longer than its limit")
        if escapes:
            raise UserError(
                f"the sandbox doesn't hold here with {self.backend}: {'; '.join(escapes)}", REMEDY
            )

    def _ask(self, kind: str, limits: Limits | None, *messages: bytes) -> dict[str, Any]:
        head = {"kind": kind, "limits": asdict(limits or Limits())}
        for message in (json.dumps(head).encode(), *messages):
            if len(message) > MAX_BYTES:
                raise UserError(f"a program of {len(message)} bytes", f"at most {MAX_BYTES} go into the jail")
            self._wire.send(message)
        try:
            found: dict[str, Any] = json.loads(self._wire.receive())
        except EOFError:
            raise RuntimeError(f"the jail ended: {self._last_words()}") from None
        if found["how"] == "broken":
            raise RuntimeError("a guard ended without a report")
        return found

    def _last_words(self) -> str:
        said = self.process.communicate()[1].decode("utf-8", "replace").strip().splitlines()
        return said[-1] if said else f"it ended with {self.process.returncode}"

    def close(self) -> None:
        self._socket.close()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()

    def __enter__(self) -> "Jail":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


REMEDY = (
    "run danlu as an ordinary user, or as the root of the machine itself, where user namespaces are allowed "
    "(kernel.unprivileged_userns_clone, AppArmor); `danlu doctor` says what is missing"
)

_PROVED: set[str] = set()
"""The ways that have been tried on this machine, and held."""
_FEW = 8
_PROBE = """
import ctypes, os, socket, time

def found(port, few):
    made, escapes = 0, []
    try:
        while made < 4 * few:
            if os.fork() == 0:
                time.sleep(10)
                os._exit(0)
            made += 1
    except OSError:
        pass
    if made > few:
        escapes.append(f"it starts {made} processes where {few} are allowed")
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        escapes.append("it reaches the network")
    except OSError:
        pass
    for place in ("/", "/usr", "/etc", "/danlu"):
        try:
            open(f"{place}/danlu-probe", "w").close()
            escapes.append(f"it writes to {place}")
        except OSError:
            pass
    if ctypes.CDLL(None).unshare(0x10000000) == 0:
        escapes.append("it makes namespaces")
    return escapes
"""
_HUNGRY = "def f():\n    return len(bytearray(b'x') * (512 << 20))"
_ENDLESS = "def f():\n    while True:\n        pass"


def _text(source: str) -> bytes:
    return source.encode("utf-8", "surrogatepass")


def _can_change_user() -> bool:
    """Whether root here is root outside too, or can at least become somebody else."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        maps = [tuple(map(int, line.split())) for line in file]
    wanted = FIRST_USER
    return any(first <= wanted < first + count for first, _, count in maps)


def _is_below(path: str, places: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(place) for place in places)
