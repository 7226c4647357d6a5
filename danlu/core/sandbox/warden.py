"""The jail's first process: warm, it forks what runs a program, and judges from outside how that ended.

Nothing that a program sends is trusted here, and nothing of the warden's can be reached by it: a program runs
as another user (as root) or without any capability (else), in namespaces of its own for processes, mounts and
shared memory, behind a filter of system calls. For each a guard is forked, which watches it and ends it with
all that it has started. Standard library only.
"""

import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from danlu.core.sandbox import jail, kernel
from danlu.core.sandbox.examine import Wire, answer, examine
from danlu.core.sandbox.limits import Limits

WARM = """abc array bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions
functools hashlib heapq inspect itertools json math operator queue random re statistics string textwrap typing
"""
"""What programs often import; read once, before the forks."""
FOLDER = "/tmp"
PAUSE = 0.05
"""Seconds between two looks at a program's memory."""
GRACE = 0.5
"""Seconds after which a guard ends a program itself; the examiner's own clock comes first."""
KEPT = 10_000
"""Bytes of a program's output that are reported."""


# Inside a forked process


def set_limits(limits: Limits) -> None:
    """Those of the kernel, for this process and each that it starts."""
    one, size = resource.setrlimit, limits.memory_bytes
    if limits.address_space:
        one(resource.RLIMIT_AS, (size, size))
    one(resource.RLIMIT_DATA, (size, size))
    one(resource.RLIMIT_CORE, (0, 0))
    one(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    one(resource.RLIMIT_NOFILE, (256, 256))
    cpu = int(limits.seconds * (os.cpu_count() or 1)) + 1
    one(resource.RLIMIT_CPU, (cpu, cpu + 1))


def confine(limits: Limits, user: int | None, filter_program: bytes) -> None:
    """Gives up every privilege, for good, and sets what the kernel itself limits."""
    set_limits(limits)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # After the change of user, which is refused where the new one has too many processes.
    resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))
    kernel.drop_capabilities()
    kernel.filter_calls(filter_program)


def _only(*kept: int) -> None:
    """Closes all descriptors but the first three and these."""
    last = 2
    for number in sorted(kept):
        os.closerange(last + 1, number)
        last = number
    os.closerange(last + 1, 65536)


def _stdio(stdin: int, output: int) -> None:
    os.dup2(stdin, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _fork(work: Callable[[], Any]) -> int:
    """A process that does this and ends, whatever happens. Returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        work()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


# A guard: one program


class Guard:
    """Starts a program's processes, and watches them to their end."""

    def __init__(self, limits: Limits, users: tuple[int, int] | None, filter_program: bytes) -> None:
        self.limits = limits
        self.candidate_user: int | None
        self.examiner_user: int | None
        self.candidate_user, self.examiner_user = users or (None, None)
        self.filter_program = filter_program
        self.begin = time.monotonic()
        self.outputs: list[bytearray] = []

    def python(self, control: Wire) -> dict[str, Any]:
        """A candidate and its examiner, whose verdict comes with the token that only it was given.

        Both are forked before the request is read, so that nothing of the test was ever in the candidate's
        memory.
        """
        calls, answers, orders, verdict, output = os.pipe(), os.pipe(), os.pipe(), os.pipe(), os.pipe()
        null = os.open("/dev/null", os.O_RDWR)

        def examiner() -> None:
            os.setsid()
            _stdio(null, null)
            _only(answers[0], calls[1], orders[0], verdict[1])
            self._confine(self.examiner_user)
            kernel.undumpable()
            asked = json.loads(Wire(orders[0], -1).receive())
            wire, until = Wire(answers[0], calls[1]), self.begin + self.limits.seconds
            found = examine(asked["context"], asked["test"], tuple(asked["names"]), wire, until)
            Wire(-1, verdict[1]).send(json.dumps([asked["token"], *found]).encode())

        def candidate() -> None:
            self._move_in(null, output[1], calls[0], answers[1])
            wire = Wire(calls[0], answers[1])
            answer(wire.receive().decode("utf-8", "surrogatepass"), wire)

        judge = _fork(examiner)
        self._part()
        process = _fork(candidate)
        for one in (calls[0], *answers, orders[0], verdict[1], output[1], null):
            os.close(one)
        source, order = control.receive(), control.receive()
        token = json.loads(order)["token"]
        # Where the candidate or the examiner couldn't start, what is watched ends at once.
        with suppress(BrokenPipeError):
            Wire(-1, calls[1]).send(source)
            os.close(calls[1])
            Wire(-1, orders[1]).send(order)
        messages, why = self._watch(process, [output[0]], verdict[0])
        self._end(judge)
        given, how, said, call, result = messages[0] if messages else (token, why, "", "", None)
        if given != token:
            how = "ended"
        return self._report() | {"how": how, "said": said, "call": call, "result": result}

    def commands(self, control: Wire) -> dict[str, Any]:
        """Programs one after the other in one folder, until one fails that must not."""
        asked = json.loads(control.receive())
        status, outputs = os.pipe(), [os.pipe() for _ in asked["steps"]]
        null = os.open("/dev/null", os.O_RDWR)

        def first() -> None:
            self._move_in(null, null, status[1], *(writes for _, writes in outputs), proc=True)
            kernel.undumpable()  # the programs run as the same user, and can see it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            for name, text in asked["files"].items():
                os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
                with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
                    file.write(text)
            for step, (_, writes) in zip(asked["steps"], outputs, strict=True):
                begin = time.monotonic()
                code = self._run(step["argv"], step["environment"], writes, begin + step["seconds"])
                report = json.dumps([code, time.monotonic() - begin])
                Wire(-1, status[1]).send(report.encode())
                if code != 0 and not step["may_fail"]:
                    break

        self._part()
        process = _fork(first)
        for one in (status[1], *(writes for _, writes in outputs), null):
            os.close(one)
        steps, why = self._watch(process, [reads for reads, _ in outputs], status[0])
        return self._report() | {"how": why, "steps": steps}

    def _move_in(self, stdin: int, output: int, *kept: int, proc: bool = False) -> None:
        """The first process of its namespaces becomes the program's: alone, with a /tmp of its own."""
        os.setsid()
        _stdio(stdin, output)
        _only(*kept)
        kernel.unshare(kernel.NEWNS)
        user = self.candidate_user if self.candidate_user is not None else 0
        options = f"mode=700,size={self.limits.file_bytes},nr_inodes=10000,uid={user},gid={user}"
        kernel.mount("danlu", FOLDER, "tmpfs", kernel.NOSUID | kernel.NODEV, options)
        if proc:
            kernel.mount("proc", "/proc", "proc", kernel.NOSUID | kernel.NODEV | kernel.NOEXEC)
        else:
            kernel.unmount("/proc")
        os.chdir(FOLDER)
        self._confine(self.candidate_user)

    def _part(self) -> None:
        """The next child is the first process of namespaces of its own."""
        kernel.unshare(kernel.NEWPID | kernel.NEWIPC)

    def _confine(self, user: int | None) -> None:
        confine(self.limits, user, self.filter_program)

    def _end(self, process: int) -> None:
        """Ends it, and with the first process of a namespace all others in it; waits until they are gone."""
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    def _memory(self, first: int) -> int:
        """Resident bytes of all processes in the namespace of this one."""
        space = _namespace(str(first))
        return _resident(name for name in _numbers() if space and _namespace(name) == space)

    def _end_others(self, child: int) -> None:
        """What a program has left running, from the first process of its namespace: all others in it."""
        os.kill(-1, signal.SIGKILL)

    def _run(self, argv: list[str], environment: dict[str, str], output: int, until: float) -> int | None:
        """A program's code of exit, or None where it took too long. All that it started ends with it."""

        def program() -> None:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.execvpe(argv[0], argv, environment)

        child, status = _fork(program), None
        while status is None and (left := until - time.monotonic()) > 0:
            signal.sigtimedwait({signal.SIGCHLD}, left)
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    status = ended[1]
                    break
        with suppress(ProcessLookupError, ChildProcessError):
            self._end_others(child)
            while True:
                os.wait()
        return None if status is None else os.waitstatus_to_exitcode(status)

    def _report(self) -> dict[str, Any]:
        texts = [data[:KEPT].decode("utf-8", "replace") for data in self.outputs]
        return {"outputs": texts, "seconds": time.monotonic() - self.begin}

    def _watch(self, process: int, outputs: list[int], messages: int) -> tuple[list[Any], str]:
        """Until the pipe of messages is closed. Returns them, and why no more came."""
        said: dict[int, bytearray] = {end: bytearray() for end in (*outputs, messages)}
        self.outputs = [said[end] for end in outputs]
        last, why, written = self.begin + self.limits.seconds + GRACE, "ended", 0
        open_ends = list(said)

        def read(seconds: float) -> bool:
            nonlocal written
            ready, _, _ = select.select(open_ends, [], [], seconds)
            for end in ready:
                part = os.read(end, 65536)
                if not part:
                    open_ends.remove(end)
                elif end == messages:
                    said[end] += part
                else:
                    written += len(part)
                    said[end] += part[: max(0, KEPT - len(said[end]))]
            return bool(ready)

        while messages in open_ends:
            left = last - time.monotonic()
            if left <= 0:
                why = "timed out"
            elif not read(min(left, PAUSE)) and self._memory(process) > self.limits.memory_bytes:
                why = "too much memory"
            elif written > self.limits.output_bytes:
                why = "too much output"
            else:
                continue
            break
        self._end(process)
        while open_ends and written <= self.limits.output_bytes:  # all that could write is gone
            read(0)
        found, data = [], bytes(said[messages])
        while len(data) >= 8:
            size = 8 + int.from_bytes(data[:8], "little")
            if len(data) < size:
                break
            found.append(json.loads(data[8:size]))
            data = data[size:]
        return found, why


def _wait(child: int) -> int:
    """Until this child has ended; others, of which this process is the last parent, are reaped meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return status


class Unconfined(Guard):
    """For --unsafe: the same without a jail, as the user that danlu is. Limits hold for each process."""

    def _move_in(self, stdin: int, output: int, *kept: int, proc: bool = False) -> None:
        os.setsid()
        _stdio(stdin, output)
        _only(*kept)
        os.chdir(self.folder)
        self._confine(None)

    def _part(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="danlu-unsafe-")

    def _confine(self, user: int | None) -> None:
        set_limits(self.limits)

    def _end(self, process: int) -> None:
        super()._end(process)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)  # its session began with it

    def _memory(self, first: int) -> int:
        return _resident(name for name in _numbers() if _session(name) == first)

    def _end_others(self, child: int) -> None:
        os.killpg(child, signal.SIGKILL)

    def _report(self) -> dict[str, Any]:
        shutil.rmtree(self.folder, ignore_errors=True)
        return super()._report()


def _numbers() -> Iterable[str]:
    return filter(str.isdigit, os.listdir("/proc"))


def _session(process: str) -> int:
    try:
        return os.getsid(int(process))
    except OSError:
        return 0


def _resident(processes: Iterable[str]) -> int:
    """Bytes of memory that these use together."""
    total = 0
    for name in processes:
        try:
            with open(f"/proc/{name}/statm", "rb") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # gone meanwhile
    return total


def _namespace(process: str) -> str:
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except OSError:
        return ""


# The warden


def serve(control: int, users: tuple[int, int] | None, kind: type[Guard] = Guard) -> None:
    """Answers requests until the other end of this socket is closed, by whatever its owner's end was."""
    for name in WARM.split():
        __import__(name)
    wire = Wire(control, control)
    filter_program = kernel.call_filter()
    wire.send(b"ready")
    while True:
        try:
            head = json.loads(wire.receive())
        except EOFError:
            return
        reads, writes = os.pipe()

        def guard(head: dict[str, Any] = head, writes: int = writes) -> None:
            watcher = kind(Limits(**head["limits"]), users, filter_program)
            work = {"python": watcher.python, "commands": watcher.commands}[head["kind"]]
            Wire(-1, writes).send(json.dumps(work(wire)).encode())

        process = _fork(guard)
        os.close(writes)
        try:
            report = Wire(reads, -1).receive()
        except EOFError:
            report = json.dumps({"how": "broken"}).encode()
        os.close(reads)
        _wait(process)
        wire.send(report)


def main() -> None:
    """`warden CONTROL BACKEND ROOT USERS`: becomes the jail, and serves the socket CONTROL."""
    control, backend, root, users = json.loads(sys.argv[1])
    pair = tuple(users) if users else None
    if backend == "namespaces":
        jail.leave(privileged=bool(users))
        if child := os.fork():
            os.close(control)
            _wait(child)
            return
        jail.build(jail.Root(tuple(map(tuple, root))))
    serve(control, pair, Unconfined if backend == "none" else Guard)


if __name__ == "__main__":
    main()
