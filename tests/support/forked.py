"""The command `kvpolicy` in a fork of this process: what a new one does, without loading torch again.

What is about a new process itself (its imports, a broken installation, bytes that are no text) starts one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import transformers

from kvpolicy.cli.main import main
from kvpolicy.plugins import registry

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn of forks otherwise
_DEFAULTS = [("default", None, DeprecationWarning, "__main__", 0)]

RUNNING = ("generate", "compare", "calibrate", "tune", "check", "lm-eval")
"""Commands that run a model: in a process of their own, since torch's pools of threads don't always outlive a fork."""


def kvpolicy(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, site: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command.

    Args:
        arguments: its words.
        cwd: where it runs.
        env: environment variables to set.
        site: a directory of installed plugins.
    """
    if arguments[:1] and arguments[0] in RUNNING:
        path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH")]))
        given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})}
        command = [sys.executable, "-m", "kvpolicy", *arguments]
        return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False)
    with TemporaryFile("w+b") as out, TemporaryFile("w+b") as err:
        child = os.fork()
        if child == 0:
            _run(arguments, cwd, env or {}, site, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["kvpolicy", *arguments], os.waitstatus_to_exitcode(status), *texts)


def _run(
    arguments: tuple[str, ...], cwd: Path | None, env: Mapping[str, str], site: Path | None, out: int, err: int
) -> NoReturn:
    status = 70
    signal.alarm(300)  # a fork that waits for a lock that a thread of its parent held would wait for ever
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(env)
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, encoding=encoding) for i, mode in enumerate("rww"))
        if cwd is not None:
            os.chdir(cwd)
        if site is not None:
            sys.path.insert(0, str(site))
        warnings.resetwarnings()
        warnings.filters.extend(_DEFAULTS)  # type: ignore[attr-defined]
        registry.cache_clear()
        transformers.logging.set_verbosity_error()
        sys.argv = ["kvpolicy", *arguments]
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
