"""The `export-flash` command in processes of its own, each forked from one that has run it once.

A fresh process spends most of its seconds on imports; a forked one starts at once and is a process like any other, to be
signalled, limited and killed. `python tests/export/forked.py` is the process that forks; `Forks` talks to it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_LONGEST = 600  # seconds until a process that hangs is ended


@dataclass(frozen=True)
class Blow:
    """What befalls an export `seconds` after it has said for the `event`th time what it is doing.

    signal: one that the process gets; 0: the disk of `fill`, a folder, is filled up.
    """

    event: int
    signal: int = 0
    fill: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """Exit code (negative: the signal that killed it), and what was written to stdout and stderr."""

    code: int
    shown: str


class Forks:
    """Runs commands one at a time, the first one in the process that all others are forked from."""

    def __init__(self, folder: Path, *first: object) -> None:
        self._output = folder / "output"
        command = [sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has none of the other threads
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        ended = self.run(*first)
        assert ended.code == 0, ended.shown

    def run(self, *arguments: object, blow: Blow | None = None, file_bytes: int | None = None) -> Ended:
        """`file_bytes`: no file may grow beyond."""
        order = {
            "arguments": [str(argument) for argument in arguments],
            "output": str(self._output),
            "blow": asdict(blow) if blow else None,
            "file_bytes": file_bytes,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ended(code, self._output.read_text())

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    answers = os.dup(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        if number == 0:
            code = _run(order)
        elif child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            signal.alarm(_LONGEST)
            os._exit(_run(order))
        os.write(answers, f"{code}\n".encode())


def _run(order: dict[str, Any]) -> int:
    from export import cli

    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    if order["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    if order["blow"] is not None:
        _expect(Blow(**order["blow"]))
    code = 0
    try:
        cli.main(order["arguments"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _expect(blow: Blow) -> None:
    from export.console import StageBars

    count, step = 0, StageBars.step

    def counted(bars: StageBars, detail: str) -> None:
        nonlocal count
        step(bars, detail)
        count += 1
        if count == blow.event:
            threading.Timer(blow.seconds, _strike, [blow]).start() if blow.seconds else _strike(blow)

    StageBars.step = counted  # type: ignore[method-assign]


def _strike(blow: Blow) -> None:
    if blow.signal:
        os.kill(os.getpid(), blow.signal)
        return
    with (Path(blow.fill) / "filler").open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


if __name__ == "__main__":
    _serve()
