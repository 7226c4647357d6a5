"""`danlu bench NAME`: a speed that danlu claims, measured beside its peer by a file of `benchmarks/`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from danlu.core.config import nearest
from danlu.core.errors import UserError
from danlu.core.options import BenchConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def bench(config: BenchConfig) -> dict[str, Any]:
    """Runs the benchmark in a process of its own, which prints its table on stderr; returns its result.

    Raises UserError for an unknown name, and where the benchmark refuses its options.
    """
    known = {file.stem.replace("_", "-"): file for file in sorted(BENCHMARKS.glob("[!_]*.py"))}
    name = config.name.replace("_", "-")
    if name not in known:
        hint = nearest(name, known).removeprefix("; ") if known else "they come with a checkout of danlu"
        raise UserError(f'no benchmark is called "{config.name}"', hint)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(known[name]), *config.options, "--json", str(result)]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if code == 2:
            raise UserError(f"{known[name].name} refuses its options", f"danlu bench {name} --options --help")
        if not result.exists():
            if "--help" in config.options or "-h" in config.options:
                return {}
            raise RuntimeError(f"{known[name].name} ended with {code} and wrote no result")
        return json.loads(result.read_text("utf-8"))
