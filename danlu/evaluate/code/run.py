"""Samples through the sandbox: reference solutions first, then each sample, as many at once as cores."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

from danlu.core.sandbox.host import Backend, Jail
from danlu.core.sandbox.limits import Limits
from danlu.core.toolchains import TOOLCHAINS
from danlu.evaluate.code.languages import run_source, shown
from danlu.evaluate.code.problems import NAMES, Language, Problem
from danlu.evaluate.code.samples import LONGEST, Sample

T = TypeVar("T")
K = TypeVar("K")
MAKE_SECONDS = 60.0
FIRST_LIMIT = 30.0
"""Seconds that a reference solution may take."""


@dataclass(frozen=True)
class Verdict:
    """How a program did in its test."""

    passed: bool
    how: str
    """passed, failed, raised, not compiled, timed out, ended, too much memory, too much output, too long."""
    said: str = ""
    call: str = ""
    """Python: the last call, and what came of it."""
    output: str = ""
    seconds: float = 0.0


class Runner:
    """Jails that take programs. Use with `with`. Raises UserError where the machine can't hold a program."""

    def __init__(self, languages: Iterable[Language], workers: int, backend: Backend) -> None:
        places = [place for language in languages for place in shown(language)]
        self.workers = workers
        self._make = lambda number: Jail(backend, number, places)
        self.jails: SimpleQueue[tuple[int, Jail]] = SimpleQueue()
        self.pool = ThreadPoolExecutor(workers)
        self.open = [self._make(0)]
        self.open += [self._make(number) for number in range(1, workers)]
        for number, jail in enumerate(self.open):
            self.jails.put((number, jail))

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for jail in self.open:
            jail.close()

    def inside(self, work: Callable[[Jail], T]) -> T:
        """Done with the next jail that is free."""
        number, jail = self.jails.get()
        try:
            return work(jail)
        except (RuntimeError, OSError):
            # The jail is gone, which no program should bring about: once more, in a new one.
            jail.close()
            jail = self.open[number] = self._make(number)
            return work(jail)
        finally:
            self.jails.put((number, jail))

    def each(self, work: Iterable[tuple[K, Callable[[Jail], T]]]) -> Iterator[tuple[K, T]]:
        """(a key, what to do in a jail) → (the key, what came of it), as they are done."""
        todo, running = iter(work), dict[Future[T], K]()
        while True:
            # A few more than there are jails, so that none waits for the next.
            for key, one in islice(todo, 2 * self.workers - len(running)):
                running[self.pool.submit(self.inside, one)] = key
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for ready in done:
                yield running.pop(ready), ready.result()


def check(problem: Problem, program: str, seconds: float) -> Callable[[Jail], Verdict]:
    """A program in the problem's test."""

    def work(jail: Jail) -> Verdict:
        if len(program.encode("utf-8", "surrogatepass")) > LONGEST:
            return Verdict(False, "too long", f"a program of more than {LONGEST} bytes is not run")
        return _in(jail, problem, program, seconds)

    return work


def _in(jail: Jail, problem: Problem, program: str, seconds: float) -> Verdict:
    if problem.language == "python":
        found = jail.examine(program, problem.imports, problem.test, problem.names, Limits(seconds=seconds))
        return Verdict(found.passed, found.how, found.said, found.call, found.output, found.seconds)
    ran, passed = run_source(jail, problem, program, MAKE_SECONDS, seconds)
    made = problem.language == "js"  # nothing is made there
    if passed:
        return Verdict(True, "passed", seconds=ran.seconds[-2])
    place = min(len(ran.codes), 2 - made) - 1
    output = ran.outputs[max(place, 0)].strip()
    if ran.why != "ended" or not ran.codes:
        how = ran.why
    elif ran.codes[place] is None:
        how = "timed out"
    elif place == 0 and not made:
        how = "not compiled"
    else:
        how = "failed" if ran.codes[place] else "ended"
    last = output.splitlines()[-1:] or [""]
    return Verdict(
        False, how, last[0][:400], output=output, seconds=ran.seconds[place] if ran.seconds else 0.0
    )


def missing_toolchains(problems: Mapping[str, Problem]) -> dict[str, str]:
    """Of the languages that problems are in, those that can't be run here, and what is missing."""
    found = {}
    for language in dict.fromkeys(problem.language for problem in problems.values()):
        if language != "python" and (missing := TOOLCHAINS[language].missing()):
            package = TOOLCHAINS[language].package
            found[NAMES[language]] = f"{' and '.join(missing)} not found; Debian's package is {package}"
    return found


def references(
    runner: Runner, problems: Mapping[str, Problem], done: Mapping[str, Verdict]
) -> Iterator[tuple[str, Verdict]]:
    """Each problem's own solution in its own test."""
    yield from runner.each(
        (name, check(problem, problem.program(problem.reference), FIRST_LIMIT))
        for name, problem in problems.items()
        if name not in done
    )


def limit(reference: Verdict, least: float, factor: float) -> float:
    """Seconds that samples get: a multiple of what the reference takes here, so that no machine decides."""
    return max(least, factor * reference.seconds)


def key_of(problem: Problem, program: str) -> str:
    """What a verdict hangs on: the same program in the same test needn't run again."""
    text = json.dumps([asdict(problem), program], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def distinct(problems: Mapping[str, Problem], samples: Sequence[Sample]) -> dict[str, Sample]:
    """Each program once, by its key."""
    return {key_of(problems[sample.task], sample.program): sample for sample in samples}
