"""What a jailed program may use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each is enforced from outside the program; memory is that of all its processes together."""

    seconds: float = 10.0
    """On the clock; of processor time as much for each core."""
    memory_bytes: int = 1 << 30
    processes: int = 32
    """And threads."""
    output_bytes: int = 1 << 20
    """On stdout and stderr; what is more ends the program."""
    file_bytes: int = 64 << 20
    """All that it writes below /tmp, the only place it may write."""
    address_space: bool = True
    """Limit addresses too. The JVM, Go and Node reserve more than they use, and don't start then."""
