"""Processes of their own that need not import torch: forks of one process that has done that and nothing else.

The import takes four seconds, more than most tests that need another process. Nothing of this project is imported in
the process that is forked, no thread runs in it, and it has computed no gradient, which torch would refuse in its
forks. What has to see the start of Python itself, such as a hash seed or a signal while torch is imported, needs a real
start.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Process:
    """A process that runs; `wait` returns how it ended."""

    def __init__(self, server: Fresh, pid: int, outputs: tuple[str, str], arguments: list[str]) -> None:
        self.server, self.pid, self.outputs, self.arguments = server, pid, outputs, arguments

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Return status, output and errors as `subprocess.run` does; a process that takes longer is killed."""
        status = self.server._ask({"wait": self.pid}, timeout, self.pid)
        out, err = (Path(path).read_text(encoding="utf-8") for path in self.outputs)
        return subprocess.CompletedProcess(self.arguments, os.waitstatus_to_exitcode(status), out, err)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Fresh:
    """Starts processes; the one that they are forks of is started with the first of them."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def close(self) -> None:
        if self._running is not None:
            self._running.communicate()  # its input ends, and so does it
        self._folder.cleanup()

    def start(
        self,
        program: str | Path,
        *words: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        text: str = "",
    ) -> Process:
        """Start a program, given as its text or as the path of a file.

        Args:
            words: ``sys.argv`` behind the program.
            env: all variables, where they are not those of this process.
            text: what the program can read from its standard input.
        """
        self._count += 1
        given, out, err = (os.path.join(self._folder.name, f"{self._count}-{name}") for name in ("in", "out", "err"))
        Path(given).write_text(text, encoding="utf-8")
        request = {
            "file": str(program) if isinstance(program, Path) else None,
            "code": program if isinstance(program, str) else None,
            "words": words,
            "env": dict(os.environ) if env is None else env,
            "cwd": str(cwd or Path.cwd()),
            "streams": [given, out, err],
        }
        return Process(self, self._ask(request, 120.0), (out, err), [str(program), *words])

    def run(self, program: str | Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Start a program and wait for its end."""
        return self.start(program, *words, **options).wait()

    def _ask(self, request: dict[str, Any], timeout: float, pid: int | None = None) -> int:
        if self._running is None:
            command = [sys.executable, __file__]
            self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._running.stdin is not None
        assert self._running.stdout is not None
        self._running.stdin.write(json.dumps(request).encode() + b"\n")
        late = not select.select([self._running.stdout], [], [], timeout)[0]
        if late and pid is not None:
            os.kill(pid, signal.SIGKILL)
        answer = int(self._running.stdout.readline())
        assert not late, f"a process took longer than {timeout} seconds"
        return answer


def serve() -> dict[str, Any] | None:
    """Fork for every request, and answer with the process or with its status; return the request in the fork."""
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        if "wait" in request:
            _, answer = os.waitpid(request["wait"], 0)
        else:
            answer = os.fork()
            if answer == 0:
                return dict(request)
        os.write(1, f"{answer}\n".encode())
    return None


def become(request: dict[str, Any]) -> None:
    """Make a fork the process that was asked for, and run its program as Python's start does."""
    for number, path in enumerate(request["streams"]):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["file"]:
        sys.argv = [request["file"], *request["words"]]
        sys.path[0] = str(Path(request["file"]).parent)
        runpy.run_path(request["file"], run_name="__main__")
    else:
        sys.argv = ["-c", *request["words"]]
        sys.path[0] = ""
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    import torch.nn.parallel  # noqa: F401 - what all forks have

    asked = serve()
    if asked is not None:
        become(asked)
