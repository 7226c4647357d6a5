"""Where jailed programs live: a root of their own, read-only, in namespaces of their own.

Two ways there: `bwrap` (bubblewrap) builds it, or `build` here does the same with the kernel's calls. The
standard library only: this runs in the process that becomes the jail.
"""

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

from danlu.core.sandbox import kernel

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt")
"""Programs and libraries, for reading."""
SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/java-17-openjdk",
    "/etc/java-21-openjdk",
    "/etc/ssl/openssl.cnf",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Root:
    """What can be seen in a jail, beside the system."""

    shown: tuple[tuple[str, str], ...]
    """Files and folders shown for reading, and where; not below /tmp, which each program has to itself."""

    def mounts(self) -> list[tuple[str, str]]:
        """All that is bound, in order; what of the system isn't here is left out."""
        system = [
            place for place in (*SYSTEM, *SETTINGS) if os.path.exists(place) and not os.path.islink(place)
        ]
        return [*((place, place) for place in system), *self.shown]

    def links(self) -> list[tuple[str, str]]:
        """Places of the system that are links, with what they name."""
        return [(place, os.readlink(place)) for place in SYSTEM if os.path.islink(place)]


def bwrap_command(program: str, root: Root, privileged: bool) -> list[str]:
    """bubblewrap's options. `privileged`: run by root, so that no user namespace is needed."""
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    if not privileged:
        command += ["--unshare-user", "--uid", "0", "--gid", "0"]
    command += ["--as-pid-1", "--cap-add", "ALL", "--clearenv"]
    for place in sorted(_folders_above([place for _, place in root.mounts()] + ["/dev/null"])):
        command += ["--perms", "0755", "--dir", place]
    for source, place in root.mounts():
        command += ["--ro-bind", source, place]
    for place, target in root.links():
        command += ["--symlink", target, place]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--proc", "/proc", "--perms", "0755", "--tmpfs", "/tmp", "--remount-ro", "/"]
    return command


def _folders_above(places: list[str]) -> set[str]:
    return {str(folder) for place in places for folder in PurePosixPath(place).parents if str(folder) != "/"}


def leave(privileged: bool) -> None:
    """Puts this process into namespaces of its own; its next child is the first process of the jail."""
    uid, gid = os.getuid(), os.getgid()
    if not privileged:
        kernel.unshare(kernel.NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    kernel.unshare(kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS)


def build(root: Root) -> None:
    """Gives the jail's first process a root of its own. Raises OSError where the kernel doesn't let it."""
    mounts, links = root.mounts(), root.links()  # while the old root is still in place
    kernel.mount("", "/", flags=kernel.PRIVATE | kernel.REC)
    # The new root is put over /tmp, and changes places with the old one, whose own /tmp is seen again then.
    kernel.mount("danlu", "/tmp", "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    for source, place in mounts:
        _bind(f"/old{source}", f"/new{place}")
        kernel.read_only(f"/new{place}")
    for place, target in links:
        os.symlink(target, f"/new{place}")
    for device in DEVICES:
        _bind(f"/old{device}", f"/new{device}")
    for name in ("proc", "tmp"):
        os.mkdir(f"/new/{name}", 0o755)
    # Before the old root goes: who isn't root may mount only what he could see already.
    kernel.mount("proc", "/new/proc", "proc", kernel.NOSUID | kernel.NODEV | kernel.NOEXEC)
    kernel.mount("danlu", "/new/tmp", "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=755,size=1m")
    kernel.mount("/new", "/new", flags=kernel.BIND | kernel.REC)
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    kernel.mount("", "/", flags=kernel.BIND | kernel.REMOUNT | kernel.RDONLY | kernel.NOSUID | kernel.NODEV)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        with open(target, "wb"):
            pass
    kernel.mount(source, target, flags=kernel.BIND | kernel.REC)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
