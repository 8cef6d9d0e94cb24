"""The command `kvpolicy` in a fork of a process that imported already: as in a new one, without loading torch again.

What is about a new process itself (its imports, a broken installation, bytes that are no text) starts one.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import transformers

from kvpolicy.cli.main import main
from kvpolicy.plugins import registry

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn of forks otherwise
_DEFAULTS = [("default", None, DeprecationWarning, "__main__", 0)]

RUNNING = ("generate", "compare", "calibrate", "tune", "check", "lm-eval")
"""Commands that run a model. torch's pools of threads don't outlive a fork, so that these are forks of a process that
has imported what they need and has never computed anything."""

LATE = (
    "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto", "kvpolicy.hf.generation",
    "kvpolicy.experiment.comparison", "kvpolicy.experiment.plot", "kvpolicy.report.write", "matplotlib.pyplot",
    "pandas", "statsmodels.stats.api",
)  # fmt: skip
"""What commands import when they need it."""
SINGLE = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""So that no import starts a thread."""


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
        return python("-m", "kvpolicy", *arguments, cwd=cwd, env=env, site=site)

    def run() -> None:
        sys.argv = ["kvpolicy", *arguments]
        main()

    def fork(where: str) -> int:
        child = os.fork()
        if child == 0:
            _run(run, _request(cwd, env, site, where))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return _completed(["kvpolicy", *arguments], fork)


def python(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, site: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...` or `python -c CODE`, in a process that may compute; else as `kvpolicy`."""

    def ask(where: str) -> int:
        asked, told = _server()
        asked.write(json.dumps({**_request(cwd, env, site, where), "arguments": arguments}) + "\n")
        asked.flush()
        return int(told.readline())

    return _completed([sys.executable, *arguments], ask)


def _request(cwd: Path | None, env: Mapping[str, str] | None, site: Path | None, where: str) -> dict[str, Any]:
    return {
        "cwd": str(cwd or Path.cwd()),
        "env": {**os.environ, **(env or {})},
        "site": None if site is None else str(site),
        "where": where,
    }


def _completed(command: list[str], run: Callable[[str], int]) -> subprocess.CompletedProcess[str]:
    with TemporaryDirectory() as where:
        status = run(where)
        texts = [(Path(where) / name).read_bytes().decode() for name in ("out", "err")]
    return subprocess.CompletedProcess(command, status, *texts)


@lru_cache(maxsize=1)
def _server() -> tuple[Any, Any]:
    """Pipes to and from the process that is forked for each request, started when the first is made."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", "import gc; gc.disable(); import forked; forked.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **SINGLE},
    )

    def end() -> None:
        process.communicate()  # it ends with its input

    atexit.register(end)
    return process.stdin, process.stdout


def serve() -> None:
    """Fork for each line of the input, and say how each fork ended."""
    import torch

    for late in LATE:
        with suppress(ImportError):
            import_module(late)
    registry()
    assert torch.get_num_threads() == threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(partial(_python, request["arguments"]), request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _python(arguments: list[str]) -> None:
    how, what, *words = arguments
    if how == "-m":
        sys.argv = [what, *words]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [how, *words]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _run(run: Callable[[], None], request: dict[str, Any]) -> NoReturn:
    status = 70
    gc.freeze()  # what was there before is no garbage of the command, and looked through would be copied
    gc.enable()
    signal.alarm(300)  # a fork that waits for a lock that a thread of its parent held would wait for ever
    try:
        where = Path(request["where"])
        for number, file, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, where / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (2, where / "err", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            os.dup2(os.open(file, flags), number)
        os.environ.clear()
        os.environ.update(request["env"])
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, encoding=encoding) for i, mode in enumerate("rww"))
        os.chdir(request["cwd"])
        if request["site"] is not None:
            sys.path.insert(0, request["site"])
        warnings.resetwarnings()
        warnings.filters.extend(_DEFAULTS)  # type: ignore[attr-defined]
        registry.cache_clear()
        transformers.logging.set_verbosity_error()
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
