"""What the languages in which danlu runs code need of the machine; `danlu doctor` and the runner read it."""

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolchain:
    """Of one language. Debian's names; elsewhere they are called alike."""

    name: str
    programs: tuple[str, ...]
    package: str
    files: tuple[tuple[str, str], ...] = ()
    """Libraries that some tests need: a file of each (one of several, bars between), and how it is had."""

    def missing(self) -> list[str]:
        """Programs that aren't here; without one nothing of the language runs."""
        return [program for program in self.programs if shutil.which(program) is None]

    def missing_libraries(self) -> list[str]:
        """How those are had that aren't here; without one some reference solutions fail, and are named."""
        return [
            how for places, how in self.files if not any(Path(place).exists() for place in places.split("|"))
        ]


NODE_MODULES = ("/usr/lib/node_modules", "/usr/local/lib/node_modules", "/usr/share/nodejs")
"""Where npm and Debian put modules for all."""
GO_PACKAGES = "/usr/share/gocode"
"""Where Debian puts Go's packages."""

TOOLCHAINS = {
    "cpp": Toolchain(
        "C++",
        ("g++",),
        "g++",
        (
            ("/usr/include/boost/any.hpp", "the package libboost-dev"),
            ("/usr/include/openssl/md5.h", "the package libssl-dev"),
        ),
    ),
    "java": Toolchain("Java", ("javac", "java"), "default-jdk"),
    "js": Toolchain(
        "JavaScript",
        ("node",),
        "nodejs",
        (("|".join(f"{place}/js-md5" for place in NODE_MODULES), "npm install --global js-md5"),),
    ),
    "go": Toolchain(
        "Go",
        ("go",),
        "golang-go",
        (
            (
                f"{GO_PACKAGES}/src/github.com/stretchr/testify",
                "the package golang-github-stretchr-testify-dev",
            ),
        ),
    ),
}
