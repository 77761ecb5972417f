"""What the Hub's refusals and silences become: the real libraries against a server that answers one status."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hone.run import TrainerExit, is_retried
from hone_trainer.failure import RunFailed, failure_of
from hone_trainer.hub import hub_failure

FETCH = """
import sys
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import _fetch_repository
try:
    _fetch_repository("model.source", "hf://org/name@main", "org/name@main", weights=True)
except RunFailed as error:
    print(error)
    sys.exit(int(error.code))
"""
ROWS = """
import sys
from hone_trainer.hub_rows import main
sys.exit(main("dataset.source", "hf://org/name", "", sys.argv[1], "", "train[:10]"))
"""
Endpoint = Callable[[int], str]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """Starts a Hub on loopback that answers every request with one status."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(script: str, place: Path, address: str, **more: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(place / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(place)], env=environment, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (401, TrainerExit.USER, False),
        (403, TrainerExit.USER, False),
        (404, TrainerExit.USER, False),
        (500, TrainerExit.STORAGE, True),
    ],
)
def test_a_refusal_is_not_asked_again_and_an_outage_is(
    endpoint: Endpoint, tmp_path: Path, status: int, code: TrainerExit, again: bool
) -> None:
    found, said = ask(FETCH, tmp_path, endpoint(status))
    assert found == code, said
    assert said.startswith("model.source: hf://org/name@main")
    assert is_retried(failure_of(RunFailed(code, said))) is again


def test_a_hub_that_cannot_be_reached_is_an_outage(tmp_path: Path) -> None:
    found, said = ask(FETCH, tmp_path, "http://127.0.0.1:9")
    assert found == TrainerExit.STORAGE, said
    assert "the Hub cannot be reached" in said


def test_a_hub_that_is_switched_off_is_a_fault_of_the_set_up(tmp_path: Path) -> None:
    found, said = ask(FETCH, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert found == TrainerExit.USER, said
    assert "HF_HUB_OFFLINE forbids" in said


def test_rows_of_the_hub_are_told_apart_alike(endpoint: Endpoint, tmp_path: Path) -> None:
    found, said = ask(ROWS, tmp_path, endpoint(404))
    assert found == TrainerExit.USER, said
    assert '"message": "dataset.source: hf://org/name' in said


def test_a_full_cache_is_a_full_disk_and_anything_else_is_what_the_caller_says() -> None:
    full = hub_failure(OSError(errno.ENOSPC, "x"), field="f", source="hf://a/b", otherwise=TrainerExit.DATA)
    assert full.code == TrainerExit.DISK_FULL
    other = hub_failure(ValueError("Unknown split"), field="f", source="hf://a/b", otherwise=TrainerExit.DATA)
    assert (other.code, other.message) == (
        TrainerExit.DATA,
        "f: hf://a/b could not be fetched: ValueError: Unknown split",
    )
