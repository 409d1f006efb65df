"""Commands of `layerwise` in processes of their own, for tests that kill them.

Importing torch takes seconds, so one process imports everything once and forks for each command: a command starts in
milliseconds, dies alone, and cannot take the tests' own process with it. Run as a program, this file is that process.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT = 120.0  # seconds of wall time after which a command hangs; the machine may be busy


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    code      exit code; minus the number of the signal that ended it; None: still running after LIMIT, and killed
    output    what it wrote to stdout and stderr
    seconds   of processor time
    """

    arguments: tuple[str, ...]
    code: int | None
    output: str
    seconds: float

    @property
    def typed(self) -> bool:
        """Whether it ended well, or with an error that a user can act on."""
        return self.code in (0, 1, 2, 3, 65, 73, 75) and "Traceback" not in self.output

    def __str__(self) -> str:
        return f"layerwise {' '.join(self.arguments)}: {self.code} after {self.seconds:.2f} s\n{self.output[-3000:]}"


class Running:
    """Commands that run one after another in a process."""

    def __init__(self, pid: int, finish: Any, folder: Path, commands: Sequence[Sequence[str]]) -> None:
        self.pid, self._finish, self._folder, self._commands = pid, finish, folder, commands
        self._file = os.pidfd_open(pid)

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself within so many seconds."""
        return bool(select.select([self._file], [], [], seconds)[0])

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # until `outcomes`, nobody else has its number

    def outcomes(self) -> list[Outcome]:
        """Those of the commands that began."""
        hangs = not self.wait(LIMIT)
        if hangs:
            self.kill()
        status = self._finish(self.pid)
        os.close(self._file)
        ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        found = []
        for number, arguments in enumerate(self._commands):
            output, result = self._folder / f"{number}.txt", self._folder / f"{number}.json"
            if not output.exists():
                break
            text = output.read_text(errors="replace")
            if result.exists():
                found.append(Outcome(tuple(arguments), **json.loads(result.read_text()), output=text))
                result.unlink()
            else:
                found.append(Outcome(tuple(arguments), None if hangs else ended, text, 0.0))
            output.unlink()
        return found


class Commands:
    """The process that forks; used as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Commands:
        (self._folder / "cache").mkdir(parents=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self._folder / "cache"),
            "XDG_STATE_HOME": str(self._folder / "state"),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def _ask(self, **question: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        *commands: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str] = {},
        limits: Mapping[str, int] = {},
        before: str = "",
    ) -> Running:
        """Begin commands, each a list of arguments, in the folder `cwd`.

        Args:
            limits: resource to bytes, as {"RLIMIT_AS": 8 << 30}.
            before: a statement that the process executes first.
        """
        written = self._folder / "written"
        written.mkdir(exist_ok=True)
        pid = self._ask(
            commands=commands, cwd=str(cwd), environment=environment, limits=limits, before=before, written=str(written)
        )
        return Running(pid, lambda pid: self._ask(finish=pid), written, commands)

    def run(self, *commands: Sequence[str], cwd: Path, **options: Any) -> list[Outcome]:
        return self.start(*commands, cwd=cwd, **options).outcomes()

    def call(self, *arguments: str, cwd: Path, **options: Any) -> Outcome:
        return self.run(arguments, cwd=cwd, **options)[0]


def serve() -> None:
    """Fork for each line of stdin that names commands, and answer with the number of the process; for one that names
    such a process, answer with how it ended.
    """
    answers = os.dup(1)
    os.dup2(2, 1)
    _import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        if "finish" in asked:
            answer = os.waitpid(asked["finish"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                os.close(0)
                os.close(answers)
                _work(asked)
        os.write(answers, f"{answer}\n".encode())
    os._exit(0)  # at once: there is nothing to tidy


def _import_everything() -> None:
    modules = (
        "layerwise.cli layerwise.pipeline.probe layerwise.render.report layerwise.render.tables "
        "layerwise.pipeline.results layerwise.pipeline.schedule "
        "torch._dynamo sklearn.datasets matplotlib.figure matplotlib.backends.backend_agg"
    )
    for module in modules.split():
        importlib.import_module(module)
    # Writes go to the page cache alone: a killed process loses nothing of it, and these tests cut no power.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]


def _work(asked: dict[str, Any]) -> None:
    """Never returns."""
    import resource
    import traceback

    code: int | None = 70
    try:
        os.chdir(asked["cwd"])
        os.environ.update(asked["environment"])
        for name, limit in asked["limits"].items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        exec(asked["before"], {})  # noqa: S102 - a test's own text
        for number, arguments in enumerate(asked["commands"]):
            _redirect(Path(asked["written"], f"{number}.txt"))
            began = time.process_time()
            try:
                code = _main(arguments)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            result = {"code": code, "seconds": time.process_time() - began}
            Path(asked["written"], f"{number}.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code or 0)


def _redirect(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _main(arguments: list[str]) -> int:
    from layerwise.cli import main

    try:
        main(arguments, prog_name="layerwise")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    serve()
