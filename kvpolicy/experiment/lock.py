"""A directory for one process at a time, where the system can tell. The lock dies with its process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvpolicy.errors import CompareError
from kvpolicy.words import clip, in_line

HOLDER = ".running"
"""Names the process that has a directory. What it says counts only while the lock is held."""


@contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Make a directory and keep it for this process; `what` names what runs, as in `a search`.

    Raises:
        CompareError: another process has it, or it can't be made.
    """
    try:
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        import fcntl
    except OSError as error:
        raise CompareError(f"{in_line(directory)}: the results can't be written there: {error}") from error
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    holder = directory / HOLDER
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CompareError(
            f"{in_line(directory)}: {what} is running there{_named(holder)}; wait for it, or choose another "
            "directory (--out)"
        ) from error
    except OSError:  # a file system without locks
        pass
    with suppress(OSError):  # a full disk: the lock counts, not its name
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
            if made:
                directory.rmdir()  # where nothing came into it
        os.close(handle)


def _named(holder: Path) -> str:
    try:
        return f" ({clip(holder.read_text(encoding='utf-8'))})"
    except (OSError, UnicodeDecodeError):
        return ""
