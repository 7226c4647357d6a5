"""Programs that try to get out of the jail, to harm what is in it, or to pass a test without solving it.

Each defines `f`, of which a test wants `f(20) == 22`. What a program gets hold of, `f` returns. Run as a
program this file tries all of them and prints what went wrong: a list in JSON. It needs the standard library
only, so that another user with another Python can run it.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.core.sandbox.host import Jail
from danlu.core.sandbox.limits import Limits

TEST = "assert f(20) == 22"
SMALL = Limits(seconds=1, memory_bytes=512 << 20, processes=32)
GAINS = re.compile(
    r"4711|connected|^wrote|traced|read \d|mounted|unshared|says 0|made many|too much|made it|found what"
)
"""What a program says that got what it was after."""


@dataclass
class World:
    """What a program may try to reach: a secret, a server, a socket, a process."""

    secret: Path
    servers: list[socket.socket]
    victim: "subprocess.Popen[bytes]"

    def program(self, name: str) -> str:
        return PROGRAMS[name].format(
            secret_file=self.secret,
            port=self.servers[0].getsockname()[1],
            victim=self.victim.pid,
            prefix=sys.base_prefix,
        )

    def harm(self) -> list[str]:
        """What has happened to it."""
        found = []
        with open(f"/proc/{self.victim.pid}/stat", encoding="ascii") as file:
            state = file.read().rpartition(")")[2].split()[0]
        if state not in "SDR":  # stopped, traced or dead
            found.append(f"the victim is in state {state}")
        if self.secret.read_text() != SECRET:
            found.append("the secret was changed")
        for server in self.servers:
            try:
                server.accept()
            except BlockingIOError:
                continue
            found.append("a connection came in")
        found += [f"{p} is there" for p in (*Path("/").glob("danlu-h*"), *Path("/").glob("*/danlu-h*"))]
        return found


SECRET = "the danlu-secret is 4711"


@contextmanager
def world() -> Iterator[World]:
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(dir=Path.home(), prefix="danlu-secret-"))
        secret = Path(home) / "danlu-secret"
        secret.write_text(SECRET)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0danlu-hostile-{server.getsockname()[1]}")
        abstract.listen()
        for one in (server, abstract):
            one.settimeout(0)
        victim = subprocess.Popen(["sleep", "600"])
        try:
            yield World(secret, [server, abstract], victim)
        finally:
            victim.kill()
            victim.wait()


def attempt(jail: Jail, world: World, name: str) -> list[str]:
    """What is wrong after this program was run twice: against the test, and for what it gets hold of."""
    source, begin = world.program(name), time.monotonic()
    wrong = []
    found = jail.examine(source, "", TEST, ["f"], SMALL)
    if found.passed:
        wrong.append(f"it passes: {found}")
    if time.monotonic() - begin > SMALL.seconds + 3:
        wrong.append("it took too long")
    gained = jail.examine(source, "", "result = str(f(20))", ["f"], SMALL)
    if GAINS.search(str(gained.result)):
        wrong.append(f"it gained: {gained}")
    if not jail.examine("def f(x):\n    return x + 2", "", TEST, ["f"], SMALL).passed:
        wrong.append("an honest program no longer passes")
    if len(left := below(jail.process.pid)) > 2:  # bubblewrap or our starter, and the warden
        wrong.append(f"processes are left: {left}")
    return [f"{name}: {one}" for one in wrong + world.harm()]


def below(process: int) -> list[int]:
    """This process and all that come from it."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


PROGRAMS: dict[str, str] = {
    # Out, over a network
    "connects to the host": """
import socket
def f(x):
    with socket.create_connection(("127.0.0.1", {port}), 2) as there:
        there.sendall(b"out")
        return "connected"
""",
    "sends a packet": """
import socket
def f(x):
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", {port}))
""",
    "an abstract socket of the host": """
import socket
def f(x):
    there = socket.socket(socket.AF_UNIX)
    there.connect("\\0danlu-hostile-{port}")
    return "connected"
""",
    "a socket to the host of a virtual machine": """
import socket
def f(x):
    return str(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
""",
    "raw packets": """
import socket
def f(x):
    return str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
""",
    # Out, over files
    "reads the home of its user": """
def f(x):
    return open("{secret_file}").read()
""",
    "looks for the secret everywhere": """
import os
def f(x):
    found = []
    for folder, _, names in os.walk("/"):
        if folder.startswith(("/usr", "/lib", "/opt", "{prefix}")):
            continue
        found += [os.path.join(folder, name) for name in names if "danlu-secret" in name]
    return found or "nothing"
""",
    "reads passwords": """
def f(x):
    return open("/etc/shadow").read()
""",
    "writes to the system": """
def f(x):
    for place in ("/usr/lib/danlu-hostile", "/danlu-hostile", "/etc/danlu-hostile", "/dev/danlu-hostile"):
        try:
            open(place, "w").write("here")
            return f"wrote {{place}}"
        except OSError:
            pass
    return "could write nowhere"
""",
    "changes danlu's code": """
def f(x):
    open("/danlu/danlu/core/sandbox/examine.py", "a").write("passed = True")
    return 22
""",
    "a link out of its folder": """
import os
def f(x):
    os.symlink("{secret_file}", "/tmp/link")
    return open("/tmp/link").read()
""",
    "a link where a file will be written": """
import os
def f(x):
    os.symlink("/danlu/danlu/core/sandbox/limits.py", "/tmp/main.py")
    open("/tmp/main.py", "w").write("")
    return 22
""",
    "climbs out of the root": """
import os
def f(x):
    os.chroot("/tmp")
    for _ in range(20):
        os.chdir("..")
    return os.listdir(".")
""",
    "opens a file by its number": """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    handle = (ctypes.c_ubyte * 136)(8, 0, 0, 0, 1, 0, 0, 0, 2)
    found = libc.open_by_handle_at(os.open("/tmp", os.O_RDONLY), handle, 0)
    return os.listdir(found) if found >= 0 else os.strerror(ctypes.get_errno())
""",
    # Out, over processes
    "reads other processes": """
import os
def f(x):
    seen = [name for name in os.listdir("/proc") if name.isdigit()]
    return [open(f"/proc/{{name}}/environ").read() for name in seen] or "saw none"
""",
    "signals to the parent": """
import os, signal
def f(x):
    for target in (os.getppid(), 0, -1, 1, {victim}):
        try:
            os.kill(target, signal.SIGKILL)
        except OSError:
            pass
    return "sent"
""",
    "stops everybody": """
import os, signal
def f(x):
    for target in range(2, 3000):
        try:
            os.kill(target, signal.SIGSTOP)
        except OSError:
            pass
    return "sent"
""",
    "traces its parent": """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    for target in (os.getppid(), 1, {victim}):
        if libc.ptrace(16, target, 0, 0) == 0:
            return f"traced {{target}}"
    return "could trace nobody"
""",
    "writes into other processes' memory": """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    there = (ctypes.c_ulong * 2)(0x400000, 8)
    for target in range(1, 200):
        if target != os.getpid() and libc.process_vm_readv(target, there, 1, there, 1, 0) > 0:
            return f"read {{target}}"
    return "could read nobody"
""",
    "becomes root": """
import os
def f(x):
    for change in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0])):
        try:
            change()
            return open("/etc/danlu-hostile", "w").write("root")
        except OSError:
            pass
    return "could not"
""",
    "mounts": """
import ctypes
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"proc", b"/tmp", b"proc", 0, b"") == 0:
        return "mounted"
    return "could not"
""",
    "makes a namespace in which it is root": """
import ctypes
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) == 0 or libc.syscall(435, (ctypes.c_ulong * 11)(0x10000000), 88) >= 0:
        return "unshared"
    return "could not"
""",
    "a set-uid program": """
import subprocess
def f(x):
    done = subprocess.run(["su", "-c", "id -u"], input="", capture_output=True, text=True, timeout=5)
    return f"su says {{done.stdout}}"
""",
    # Harm: more than it may have
    "forks without end": """
import os
def f(x):
    while True:
        try:
            os.fork()
        except OSError:
            pass
""",
    "counts the processes it can make": """
import os, time
def f(x):
    made = 0
    try:
        for _ in range(2000):
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            made += 1
    except OSError:
        pass
    return f"made {{'many' if made > 64 else 'few'}}"
""",
    "threads without end": """
import threading, time
def f(x):
    made = 0
    try:
        while made < 2000:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            made += 1
    except RuntimeError:
        pass
    return f"made {{'many' if made > 64 else 'few'}}"
""",
    "memory without end": """
def f(x):
    kept = []
    while True:
        kept.append(bytearray(10_000_000))
""",
    "memory in many processes": """
import os, time
def f(x):
    for _ in range(16):
        if os.fork() == 0:
            kept = bytearray(b"x") * 150_000_000
            time.sleep(60)
    time.sleep(60)
""",
    "output without end": """
def f(x):
    while True:
        print("x" * 10_000)
""",
    "files without end": """
import os
def f(x):
    written = 0
    try:
        for number in range(10_000):
            with open(f"/tmp/{{number}}", "wb") as file:
                for _ in range(10):
                    written += file.write(bytes(1_000_000))
    except OSError:
        pass
    return "too much" if written > 80_000_000 else "little"
""",
    "a file that seems long": """
import os, signal
def f(x):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open("/tmp/long", "wb") as file:
        file.truncate(10**12)
    return "made it"
""",
    "shared memory that stays": """
import ctypes
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.shmget(0x0DA71, 1_000_000, 0o666)
    libc.shmget(0x0DA71, 1_000_000, 0o1666)
    return "found what another left" if found >= 0 else "made"
""",
    "an endless loop": """
def f(x):
    while True:
        pass
""",
    "sleeps": """
import time
def f(x):
    time.sleep(1000)
""",
    "ignores signals": """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def f(x):
    while True:
        time.sleep(1)
""",
    "stops itself": """
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        pass
""",
    "recursion until it crashes": """
import sys, threading
sys.setrecursionlimit(10**9)
def f(x):
    return f(x)
""",
    "leaves a child behind": """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(0.1)
        os._exit(0)
    return "left one"
""",
    "a thread that outlives the test": """
import threading, time
def forever():
    while True:
        time.sleep(0.1)
threading.Thread(target=forever).start()
def f(x):
    return "left one"
""",
    # To pass without solving it
    "ends before the test": """
import os
os._exit(0)
""",
    "ends in the test": """
import os
def f(x):
    os._exit(0)
""",
    "exits with success": """
import sys
def f(x):
    sys.exit(0)
""",
    "something at the exit": """
import atexit
atexit.register(print, "passed")
def f(x):
    raise SystemExit(0)
""",
    "prints the success line": """
import json, sys
for stream in (sys.stdout, sys.stderr, sys.__stdout__):
    print("passed", file=stream)
    print(json.dumps({{"how": "passed", "said": "", "call": "", "result": None}}), file=stream, flush=True)
def f(x):
    print("passed")
    return 21
""",
    "writes verdicts to all descriptors": """
import json, os, struct
def f(x):
    passed = ["passed", "", "", None]
    for found in (passed, ["", *passed], {{"how": "passed"}}, ["returned", 22]):
        text = json.dumps(found).encode()
        for number in range(64):
            if number != 4:
                try:
                    os.write(number, struct.pack("Q", len(text)) + text)
                except OSError:
                    pass
    return 21
""",
    "closes all descriptors": """
import os
def f(x):
    os.closerange(0, 65536)
    return 22
""",
    "answers nonsense": """
import os
def f(x):
    for number in range(3, 64):
        try:
            os.write(number, b"\\xff" * 4096)
        except OSError:
            pass
    return 21
""",
    "is equal to everything": """
class Any:
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    __hash__ = object.__hash__
def f(x):
    return Any()
""",
    "a number that is equal to everything": """
class Any(int):
    def __eq__(self, other):
        return True
    __hash__ = int.__hash__
def f(x):
    return Any(21)
""",
    "replaces builtins": """
import builtins
class Never(Exception):
    pass
builtins.AssertionError = Never
for name in ("abs", "all", "any", "sorted", "len", "compile", "exec"):
    setattr(builtins, name, lambda *args, **kwargs: True)
def f(x):
    return 21
""",
    "replaces the checker": """
import sys
for name, module in list(sys.modules.items()):
    for attribute in ("examine", "encode", "decode", "Candidate"):
        if "danlu" in name and hasattr(module, attribute):
            setattr(module, attribute, lambda *args, **kwargs: ("passed", "", "", None))
def f(x):
    return 21
""",
    "replaces modules": """
import sys, types
class Passed(types.ModuleType):
    def __getattr__(self, name):
        return lambda *args, **kwargs: "passed"
for name in list(sys.modules):
    if name not in ("sys", "builtins"):
        sys.modules[name] = Passed(name)
def f(x):
    return 21
""",
    "looks for the test in frames": """
import re, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [str(value) for value in frame.f_locals.values()] + [str(frame.f_code.co_consts)]
        seen += [str(value) for value in frame.f_globals.values()]
        frame = frame.f_back
    found = [re.search(r"f.20. == (\\d+)", text) for text in seen]
    return next((int(one[1]) for one in found if one), "not found")
""",
    "looks for the test among all objects": """
import gc, re
def f(x):
    seen = [str(one)[:100_000] for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
    found = [re.search(r"f.20. == (\\d+)", text) for text in seen]
    return next((int(one[1]) for one in found if one), "not found")
""",
    "looks for the test in memory": """
import ctypes, re, sys
def f(x):
    try:
        with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
            for line in maps:
                begin, end = (int(one, 16) for one in line.split()[0].split("-"))
                memory.seek(begin)
                if found := re.search(rb"f.20. == (\\d+)", memory.read(end - begin)):
                    return int(found[1])
    except OSError:
        pass
    around = (id(x) >> 20 << 20), 1 << 20
    found = re.search(rb"f.20. == (\\d+)", ctypes.string_at(*around))
    return int(found[1]) if found else "not found"
""",
    "an exception called passed": """
class passed(Exception):
    pass
def f(x):
    raise passed("passed")
""",
    "an exception that no test catches": """
class passed(BaseException):
    pass
def f(x):
    raise passed("passed")
""",
    "interrupts": """
def f(x):
    raise KeyboardInterrupt
""",
    "a value that holds itself": """
def f(x):
    value = []
    value.append(value)
    return value
""",
    "a value too long": """
def f(x):
    return "x" * 100_000_000
""",
}


if __name__ == "__main__":
    complaints: list[Any] = []
    with world() as around:
        for backend in sys.argv[1:]:
            with Jail(backend, 1) as held:  # type: ignore[arg-type]
                for program in PROGRAMS:
                    complaints += attempt(held, around, program)
    print(json.dumps(complaints))
