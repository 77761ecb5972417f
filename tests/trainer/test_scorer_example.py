"""examples/scorer: what it scores, and code that loops, forks, fills memory or disk, or looks around."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "examples" / "scorer" / "scorer.py"


@pytest.fixture(scope="module")
def scorer() -> Any:
    spec = importlib.util.spec_from_file_location("scorer", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TIME_S, module.CPU_S = 2, 1
    for python in (module.PYTHON, "/usr/bin/python3"):
        module.PYTHON = python
        if module.works():
            return module
    pytest.skip("no Python here can be run by an unprivileged user")


RIGHT = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
TESTS = {"tests": "assert double(2) == 4\nassert double(-1) == -2"}


@pytest.mark.parametrize(
    ("answer", "row", "wanted"),
    [
        (RIGHT, TESTS, 1),
        ("def double(x): return 2 * x", TESTS, 1),
        (RIGHT.replace("2 * x", "x"), TESTS, 0),
        ("no code at all", TESTS, 0),
        (RIGHT, {}, 1),
    ],
)
def test_an_answer_scores_one_where_its_code_passes_the_tests(scorer: Any, answer: str, row: Any, wanted: int) -> None:
    assert scorer.score(answer, row) == wanted


MISCHIEF = {
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "fills memory": "x = bytearray(2 << 30)",
    "fills the disk": "open('x', 'wb').write(b'0' * (8 << 20))",
    "opens everything": "files = [open(__import__('os').devnull) for _ in range(100)]",
    "forks": "import os\nfor _ in range(10): os.fork()\nimport time; time.sleep(60)",
    "starts a process": "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)",
    "reads the environment": "import os; assert os.environ['SECRET'] == 'canary'",
    "writes elsewhere": "open('/scorer-was-here', 'w')",
}


@pytest.mark.parametrize("name", MISCHIEF)
def test_mischief_scores_nothing_and_leaves_nothing(
    scorer: Any, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "canary")
    monkeypatch.setattr(scorer.tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    marker = uuid.uuid4().hex
    assert scorer.score(f"{MISCHIEF[name]}\n# {marker}", {}) == 0
    assert time.monotonic() - began < 20
    assert not list(tmp_path.iterdir())
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended while it was looked at
            assert marker.encode() not in path.read_bytes()


@pytest.fixture
def address(scorer: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), scorer.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def test_it_speaks_the_reward_layers_protocol(address: str) -> None:
    from hone.spec.methods import HttpPart
    from hone_trainer.rewards import Answer
    from hone_trainer.rewards.scorer import Scorer

    asked = [Answer(prompt="p", text=text, num_tokens=3, row=TESTS) for text in (RIGHT, "x = 1")]
    client = Scorer(HttpPart(url=address))
    assert client(asked) == [1.0, 0.0]
    client.close()


def test_a_bad_request_is_answered_400(address: str) -> None:
    request = urllib.request.Request(address, data=b'{"answers": ["a"], "rows": []}')
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400 and "equal length" in json.loads(caught.value.read())["error"]
    caught.value.close()


def test_an_interpreter_that_answers_cannot_run_is_refused_at_the_start() -> None:
    done = subprocess.run([sys.executable, FILE, "--python", "/nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "name another with --python" in done.stderr


def test_it_starts_says_where_it_listens_and_ends_on_sigterm(scorer: Any) -> None:
    command = [sys.executable, FILE, "--port", "0", "--python", scorer.PYTHON]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline().startswith("listening on 127.0.0.1:")
        process.terminate()
        assert process.wait(10) == 0
