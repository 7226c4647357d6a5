"""Calls of the Linux kernel that Python lacks: namespaces, mounts, capabilities, filters of system calls.

The standard library only, since it is read inside the jail too. Each raises OSError where it is refused.
"""

import ctypes
import os
import platform
import struct

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
NEW_NAMESPACES = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x02000000 | 0x00000080
"""All of them, with control groups and time."""
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _done(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def unshare(flags: int) -> None:
    _done(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    texts = [ctypes.c_char_p(text.encode()) for text in (source, target, kind)]
    what = f"mount {source or kind} on {target}"
    _done(_libc.mount(*texts, ctypes.c_ulong(flags), ctypes.c_char_p(options.encode())), what)


def unmount(target: str) -> None:
    _done(_libc.umount2(ctypes.c_char_p(target.encode()), DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    texts = [ctypes.c_char_p(text.encode()) for text in (new, old)]
    _done(_libc.syscall(_NUMBERS["pivot_root"], *texts), "pivot_root")


def read_only(path: str) -> None:
    """A mount and all below it: nothing can be written, no setuid, no devices (mount_setattr, Linux 5.12)."""
    attributes = struct.pack("QQQQ", RDONLY | NOSUID | NODEV, 0, 0, 0)
    recursive = 0x8000
    text = ctypes.c_char_p(path.encode())
    result = _libc.syscall(_NUMBERS["mount_setattr"], -100, text, recursive, attributes, len(attributes))
    _done(result, f"mount_setattr {path}")


def undumpable() -> None:
    """Nobody of the same user may read this process's memory."""
    _prctl(4, 0)


def drop_capabilities() -> None:
    """All of them, for good: neither this process nor what it starts gets one again."""
    _prctl(38, 1)  # no new privileges
    for number in range(64):
        if _libc.prctl(23, number, 0, 0, 0) == 1:
            # Out of the bounding set, which takes a capability itself; without one there is none to take.
            _libc.prctl(24, number, 0, 0, 0)
    _libc.prctl(47, 4, 0, 0, 0)  # ambient ones
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _done(_libc.capset(header, none), "capset")


def _prctl(option: int, value: int) -> None:
    _done(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


# The filter of system calls: a program for the kernel's packet filter (seccomp(2)).

_DENIED = {
    "x86_64": {
        "ptrace": 101, "syslog": 103, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163,
        "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
        "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175,
        "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212, "clock_settime": 227,
        "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
        "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
        "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    },
    "aarch64": {
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89, "unshare": 97,
        "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116,
        "ptrace": 117, "reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170,
        "adjtimex": 171, "add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224, "swapoff": 225,
        "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265,
        "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "finit_module": 273, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
    },
}  # fmt: skip
_DENIED_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438,
    "mount_setattr": 442, "quotactl_fd": 443,
}  # fmt: skip
_MACHINE = platform.machine()
SUPPORTED = _MACHINE in _DENIED
_NUMBERS = _DENIED.get(_MACHINE, {}) | _DENIED_EVERYWHERE
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_CLONE3 = 435
_LOCAL_AND_INTERNET = (1, 2, 10)
"""Families of sockets: others, such as that to the host of a virtual machine, are in no network namespace."""
_TYPE_INTO_TERMINAL = 0x5412

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24
"""Where the filter finds the number of the call, the architecture, and the low half of two arguments."""


def call_filter() -> bytes:
    """What a jailed process may not ask the kernel for; the rest of its calls is let through."""
    steps: list[tuple[int, int, int, int]] = []

    def add(code: int, value: int, yes: int = 0, no: int = 0) -> None:
        steps.append((code, yes, no, value))

    add(_LOAD, _ARCHITECTURE)
    add(_EQUAL, _ARCH[_MACHINE], yes=1)
    add(_RETURN, _KILL)
    add(_LOAD, _NUMBER)
    if _MACHINE == "x86_64":  # the numbers of the x32 ABI
        add(_AT_LEAST, 0x40000000, no=1)
        add(_RETURN, _KILL)
    for number in sorted(_NUMBERS.values()):
        add(_EQUAL, number, no=1)
        add(_RETURN, _ERROR | _EPERM)
    # Its flags stand in memory, out of the filter's sight; libraries fall back to clone.
    add(_EQUAL, _CLONE3, no=1)
    add(_RETURN, _ERROR | _ENOSYS)
    add(_EQUAL, _CLONE[_MACHINE], no=4)
    add(_LOAD, _FIRST)
    add(_ANY_BIT, NEW_NAMESPACES, no=1)
    add(_RETURN, _ERROR | _EPERM)
    add(_RETURN, _ALLOW)
    add(_EQUAL, _SOCKET[_MACHINE], no=6)
    add(_LOAD, _FIRST)
    for place, family in enumerate(_LOCAL_AND_INTERNET):
        add(_EQUAL, family, yes=3 - place)
    add(_RETURN, _ERROR | _EAFNOSUPPORT)
    add(_RETURN, _ALLOW)
    add(_EQUAL, _IOCTL[_MACHINE], no=3)
    add(_LOAD, _SECOND)
    add(_EQUAL, _TYPE_INTO_TERMINAL, no=1)
    add(_RETURN, _ERROR | _EPERM)
    add(_RETURN, _ALLOW)
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def filter_calls(program: bytes) -> None:
    """For this process and all that it starts, for good. Privileges must have been dropped."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    whole = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    _done(_libc.prctl(22, 2, ctypes.byref(whole), 0, 0), "seccomp")
