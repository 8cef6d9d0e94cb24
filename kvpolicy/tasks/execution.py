"""Runs what a model wrote, where it was asked for: in a process of its own, with limits."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvpolicy.tasks.sample import Sample

MEMORY: Final = 1 << 30
"""Bytes of a program."""
FILES: Final = 1 << 20
"""Bytes of a file that it writes."""
# The parent says by the token that only this program knows that the tests came to their end: a program that exits
# before them, or prints what it likes, has not passed.
_RUN = """
import json, os, resource, sys
given = json.loads(sys.stdin.read())
told = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
for limit, value in given["limits"].items():
    limit = getattr(resource, limit)
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
token = given.pop("token")
space = {"__name__": "completion"}
exec(compile(given["program"], "completion.py", "exec"), space)
exec(compile(given["test"], "test.py", "exec"), space)
space["check"](space[given["entry"]])
os.write(told, token.encode())
os._exit(0)
"""


@dataclass(frozen=True)
class Program:
    """A scorer: 1 if prompt and completion pass the tests of a row.

    The program runs in a new interpreter that sees no site packages and no environment, in an empty directory, with
    limits on time, memory and sizes of files. That keeps accidents away; it is no sandbox against a program
    that means harm.
    """

    test: str
    """Source that defines `check(candidate)`."""
    entry: str
    """Name of the function to be checked."""
    seconds: float = 10.0
    memory: int = MEMORY

    def __call__(self, text: str, sample: Sample) -> float:
        """Run the completion `text` of the sample's prompt."""
        return float(self.passes(sample.prompt + text))

    def passes(self, program: str) -> bool:
        """Whether the tests of a program come to their end."""
        token = secrets.token_hex(16)
        limits = {
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": FILES,
            "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 64,
        }
        given = {"program": program, "test": self.test, "entry": self.entry, "token": token, "limits": limits}
        with tempfile.TemporaryDirectory(prefix="kvpolicy-") as home:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _RUN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=home,
                env={"PATH": os.defpath, "HOME": home},
                start_new_session=True,
            )
            try:
                told, _ = process.communicate(json.dumps(given).encode(), timeout=self.seconds)
            except subprocess.TimeoutExpired:
                told = b""
            finally:
                _end(process)
        return told == token.encode()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
