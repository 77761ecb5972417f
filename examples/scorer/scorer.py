"""A scorer for `rewards: [{http: {url: …}}]` that runs an answer's code against the tests of its row.

    python scorer.py [--host 127.0.0.1] [--port 8099] [--python /usr/bin/python3]

    POST /score  {"prompts": […], "answers": ["def f(x): …", …], "rows": [{"tests": "assert f(1) == 2"}, …]}
    200          {"scores": [1.0, …]}: 1 where code and tests end without an error in time, else 0

The code of an answer is its last block of Python, or all of it. It runs in a process of its own: no environment, an
empty directory that is removed, limits on CPU time, memory, size and number of files, and processes, and an end with
everything that it started after TIME_S. Read README.md before you point it at anything: a process is no wall.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PYTHON = os.path.realpath(sys.executable)
"""What runs the code; a virtual environment's own may be hidden from the user that answers run as."""
TIME_S = 5
CPU_S = 3
MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
OPEN_FILES = 32
PROCESSES = 0
"""That it may start beside itself; the limit counts a user's processes, so it holds where the scorer is not root."""
MAX_REQUEST_BYTES = 16 << 20
NOBODY = 65534
_FENCE = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


def score(answer: str, row: dict[str, Any]) -> float:
    """1 where the code of an answer passes the row's tests."""
    found = _FENCE.findall(answer)
    program = f"{found[-1] if found else answer}\n{row.get('tests', '')}\n"
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        return float(_passes(program, directory))


def works() -> bool:
    """Whether any code can pass."""
    try:
        return score("x = 1", {}) == 1
    except OSError:
        return False


def _passes(program: str, directory: str) -> bool:
    process = subprocess.Popen(
        [PYTHON, "-I", "-c", program],
        cwd=directory,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=True,
        preexec_fn=_limit,
    )
    try:
        return process.wait(TIME_S) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Everything in its session, itself included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _limit() -> None:
    """In the new process, before the answer's code runs."""
    for what, most in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if os.getuid() == 0:  # root's processes are not counted
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))


class Handler(BaseHTTPRequestHandler):
    """POST /score, and GET /healthz."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Whether it is there."""
        self._answer(200 if self.path == "/healthz" else 404, {})

    def do_POST(self) -> None:
        """Score one batch, one answer after the other."""
        size = int(self.headers.get("Content-Length") or 0)
        if not 0 < size <= MAX_REQUEST_BYTES:
            self.close_connection = True
            self._answer(413, {"error": f"a request has 1 to {MAX_REQUEST_BYTES} bytes"})
            return
        try:
            body = json.loads(self.rfile.read(size))
            pairs = list(zip(body["answers"], body["rows"], strict=True))
        except (ValueError, KeyError, TypeError) as error:
            self._answer(400, {"error": f"answers and rows of equal length are expected: {error}"})
            return
        self._answer(200, {"scores": [score(answer, row) for answer, row in pairs]})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *_arguments: object) -> None:
        """Nothing: answers are not for logs."""


def main() -> None:
    """Serve until it is stopped."""
    global PYTHON
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8099, help="port to listen on (default: %(default)s)")
    parser.add_argument("--python", default=PYTHON, help="interpreter that runs answers (default: %(default)s)")
    arguments = parser.parse_args()
    PYTHON = arguments.python
    if not works():
        sys.exit(f"{PYTHON} cannot be run by the user that answers run as: name another with --python.")
    server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"listening on {arguments.host}:{server.server_port}", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
