"""The real `hone` in processes of its own: exit codes, JSON, Ctrl-C, pipes, runs that outlive the command."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .terminal import HONE, Terminal

LONG = {"steps": "3000", "pause_ms": "20"}
"""A run of a minute, for tests that end it before."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, quick_python: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HONE_HOME of its own, whose runs train nothing."""
    place = tmp_path / "home"
    monkeypatch.setenv("HONE_HOME", str(place))
    monkeypatch.setenv("HONE_TRAINER_PYTHON", str(quick_python))
    monkeypatch.setenv("HONE_GRACE_S", "5")
    monkeypatch.delenv("HONE_SERVER", raising=False)
    return place


@pytest.fixture
def request_file(inputs: Path, tmp_path: Path) -> Callable[..., Path]:
    """A request file; labels say what the pretended training does."""

    def write(name: str = "demo", **labels: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        data = {
            "name": name,
            "labels": labels,
            "model": {"source": "file://inputs/model"},
            "dataset": {"source": "file://inputs/rows.jsonl"},
            "method": {"sft": {}},
            "adapter": {"lora": {}},
            "compute": {"gpus_per_node": 0},
        }
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return path

    return write


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start `hone`; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> "subprocess.Popen[str]":
        command = [HONE, *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield begin
    for process in started:
        with process:
            process.kill()


def hone(*arguments: object, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    command = [HONE, *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )


def answer(*arguments: object) -> Any:
    """The JSON that a command prints; it has to succeed."""
    done = hone(*arguments, "--json")
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Lines of stdout up to one that holds the text."""
    assert process.stdout
    lines = ""
    for line in process.stdout:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came in:\n{lines}\n{process.stderr.read() if process.stderr else ''}")


def wait_for_state(job: str, *states: str) -> Any:
    """Look at a job until it is in one of the states."""
    return wait_for_job(job, lambda found: found["state"] in states)


def wait_for_job(job: str, is_so: Callable[[Any], bool]) -> Any:
    """Look at a job until something is so."""
    deadline = time.monotonic() + 60
    while not is_so(found := answer("get", job)):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_a_run_shows_plan_progress_outputs_and_the_next_step(request_file: Callable[..., Path]) -> None:
    done = hone("run", request_file(steps="20"))
    assert done.returncode == 0, done
    assert done.stdout.startswith("Fits on the CPU (1 process): ")
    for line in (
        r"  \d\d:\d\d:\d\d  running  ",
        r"  \d\d:\d\d:\d\d  training    step \d+/20 · loss ",
        r"^Done in [\d.]+ s\.",
        r"^  training loss  1 .* 0\.05",
        r"^    adapter/ +\S+ (B|KiB)  /.*/adapter",
        r"^  Next: hone try demo-\w{5} · hone get demo-\w{5} · hone download demo-\w{5} DIRECTORY",
    ):
        assert re.search(line, done.stdout, re.MULTILINE), (line, done.stdout)
    assert done.stderr == ""


def test_a_run_under_json_leaves_one_job_on_stdout_and_progress_on_stderr(request_file: Callable[..., Path]) -> None:
    done = hone("run", request_file(), "--json")
    job = json.loads(done.stdout)
    assert (done.returncode, job["state"], job["outputs"][0]["kind"]) == (0, "SUCCEEDED", "adapter")
    assert isinstance(job["outputs"][0]["size_bytes"], int)
    assert "running" in done.stderr


def test_a_job_is_paused_looked_at_and_resumed_without_a_server(request_file: Callable[..., Path]) -> None:
    job = answer("submit", request_file(**LONG | {"steps": "600", "checkpoints": "1000"}))["id"]
    wait_for_job(job, lambda found: found["progress"])
    done = hone("pause", job)
    assert done.returncode == 0, done
    assert done.stdout == f"default/{job} is PAUSED. Next: hone resume {job}\n"
    screen = hone("get", job).stdout
    assert re.search(rf"^default/{job}  PAUSED  step \d+/600", screen, re.MULTILINE), screen
    assert re.search(r"^  last checkpoint  step \d+, \S+ B, \d+ s ago by attempt 1$", screen, re.MULTILINE), screen
    assert f"  Next: hone resume {job} · hone cancel {job}" in screen
    (saved,) = answer("checkpoints", job)["checkpoints"]
    assert saved["complete"] and f"goes on from step {saved['step']} when it is resumed" in screen
    table = hone("checkpoints", job).stdout
    assert table.startswith("STEP  ATTEMPT") and saved["sha256"] in table
    done = hone("resume", job)
    assert re.fullmatch(rf"default/{job} is (QUEUED|RUNNING)\. Next: hone watch {job}\n", done.stdout), done
    done = hone("watch", job)
    assert done.returncode == 0, done
    assert re.search(r"^  \d\d:\d\d:\d\d  checkpoint  step \d+ is stored, \S+ B$", done.stdout, re.MULTILINE)
    done = hone("pause", job)
    assert (done.returncode, done.stdout) == (2, "") and "SUCCEEDED" in done.stderr


def test_a_failed_run_says_why_shows_its_last_lines_and_ends_with_1(request_file: Callable[..., Path]) -> None:
    done = hone("run", request_file(ending="crash"))
    assert done.returncode == 1
    assert re.search(r"^demo-\w{5}  FAILED after .* at step 3 of 3 · a bug of Hone's", done.stdout, re.MULTILINE), done
    assert "it was asked to fail" in done.stdout
    assert "the last line before the end" in done.stdout
    assert re.search(r"^  Next: .*hone logs demo-\w{5}$", done.stdout, re.MULTILINE)


def test_a_bad_request_tells_everything_and_starts_nothing(request_file: Callable[..., Path]) -> None:
    done = hone("run", request_file(), "--set", "training.learnig_rate=1", "--set", "adapter.lora.rank=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "demo.yaml cannot run: 2 problems, nothing was started." in done.stderr
    assert answer("list") == {"jobs": []}


def test_a_missing_input_is_told_before_anything_is_recorded(request_file: Callable[..., Path], inputs: Path) -> None:
    (inputs / "rows.jsonl").unlink()
    done = hone("run", request_file())
    assert done.returncode == 2
    assert f"{inputs / 'rows.jsonl'}" in done.stderr
    assert answer("list") == {"jobs": []}


def test_what_is_not_served_yet_is_refused_with_2(request_file: Callable[..., Path]) -> None:
    split = ("--set", "compute.strategy=zero3", "--set", "compute.processes_per_node=2")
    done = hone("run", request_file(), *split, "--set", "quantization=nf4", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["reason"] == "NOT_SERVED_YET"


@pytest.fixture
def chain(request_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Three requests, of which the second and third need what the one before leaves."""

    def write(**endings: str) -> Path:
        documents = []
        for number, name in enumerate(("first", "second", "third")):
            data = yaml.safe_load(request_file(name, steps="5", ending=endings.get(name, "")).read_text())
            if number:
                data["model"]["source"] = f"job://{documents[-1]['name']}/adapter"
            documents.append(data)
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
        return path

    return write


@pytest.fixture
def adapters(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pretended training leaves: an adapter that says what its base is."""
    for name in ("first", "second", "third"):
        place = tmp_path / "made" / name / "adapter"
        place.mkdir(parents=True)
        (place / "adapter_model.safetensors").write_bytes(b"weights")
        config = {
            "base_model_name_or_path": f"file://{inputs / 'model'}",
            "peft_type": "LORA",
            "r": 16,
            "lora_alpha": 32,
        }
        (place / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    monkeypatch.setenv("HONE_TEST_OUTPUTS", str(tmp_path / "made"))


@pytest.mark.usefixtures("adapters")
def test_a_chain_runs_in_order_and_once_more_only_what_is_missing(chain: Callable[..., Path]) -> None:
    done = hone("run", chain(), "--json")
    assert done.returncode == 0, done
    jobs = json.loads(done.stdout)["jobs"]
    assert [job["state"] for job in jobs] == ["SUCCEEDED"] * 3
    assert jobs[1]["resolved_spec"]["model"]["source"] == f"job://{jobs[0]['id']}/adapter"
    assert f"needs      job://{jobs[0]['id']}/adapter" in re.sub(" +", " ", hone("get", jobs[1]["id"]).stdout).replace(
        "needs ", "needs      "
    )
    again = hone("run", chain())
    assert again.returncode == 0 and again.stdout.count(", done before") == 3
    assert len(answer("list")["jobs"]) == 3


@pytest.mark.usefixtures("adapters")
def test_a_step_that_fails_ends_what_depends_on_it_and_is_made_anew(chain: Callable[..., Path]) -> None:
    done = hone("run", chain(second="crash"), "--set", "x=1")
    assert done.returncode == 2 and "holds 3 requests" in done.stderr
    done = hone("run", chain(second="crash"), "--json")
    assert done.returncode == 1, done
    first, second, third = json.loads(done.stdout)["jobs"]
    assert [first["state"], second["state"], third["state"]] == ["SUCCEEDED", "FAILED", "FAILED"]
    assert f"{second['id']}, whose adapter this one needs, is FAILED" in third["failure"]["message"]
    submitted = answer("submit", chain(second="crash"))["jobs"]
    assert submitted[0]["id"] == first["id"]
    assert submitted[1]["id"] == f"{second['id']}-2" and submitted[2]["id"] != third["id"]
    once = hone("submit", chain(), "--job-id", "x")
    assert once.returncode == 2 and "are for one request" in once.stderr


def test_jobs_can_be_listed_read_downloaded_and_deleted(request_file: Callable[..., Path], tmp_path: Path) -> None:
    job = json.loads(hone("run", request_file(), "--json").stdout)["id"]
    table = hone("list").stdout.splitlines()
    assert table[0].split() == ["NAME", "STATE", "METHOD", "MODEL", "PROGRESS", "LOSS", "GPUS", "AGE"]
    assert table[1].split()[:6] == [job, "SUCCEEDED", "sft", "model", "3/3", "0.3333"]
    assert max(map(len, table)) <= 100
    screen = hone("get", "demo").stdout  # by name
    assert screen.startswith(f"default/{job}  SUCCEEDED  step 3/3 · loss 0.3333")
    assert "sha256 of its manifest" in screen
    found = {one["name"]: one for one in json.loads(hone("plan", "--compare", job, "--json").stdout)["compared"]}
    assert found["adapter/"]["measured_bytes"] > 0 and found["a process"]["planned_bytes"] > 0
    assert len(screen.splitlines()) <= 24

    fetched = hone("download", job, tmp_path / "out")
    assert fetched.returncode == 0, fetched
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"

    assert hone("delete", job).returncode == 2  # nobody to ask
    assert hone("delete", job, "--artifacts", "--yes").returncode == 0
    gone = hone("get", job, "--json")
    assert gone.returncode == 3
    assert json.loads(gone.stdout)["error"]["exit_code"] == 3


def test_logs_print_what_the_process_wrote(request_file: Callable[..., Path]) -> None:
    hone("run", request_file(ending="crash"))
    assert "the last line before the end" in hone("logs", "demo").stdout
    assert len(hone("logs", "demo", "--tail", "1").stdout.splitlines()) == 1


def test_ctrl_c_without_a_terminal_cancels_cleanly_and_ends_with_130(
    request_file: Callable[..., Path], start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = start("run", request_file(**LONG))
    read_until(process, "step ")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.search(r"^demo-\w{5}  CANCELLED after ", out, re.MULTILINE), out
    assert answer("get", "demo")["state"] == "CANCELLED"


def test_a_run_outlives_its_command_and_watch_finds_it(
    request_file: Callable[..., Path], start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = start("run", request_file(steps="100", pause_ms="50"))
    read_until(process, "step ")
    process.kill()
    process.wait()
    done = hone("watch", "demo")
    assert done.returncode == 0, done
    assert "Done in " in done.stdout
    assert (tmp_path / "starts").read_text().count("\n") == 1


def test_ctrl_c_on_watch_leaves_the_job_running(
    request_file: Callable[..., Path], start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    job = answer("submit", request_file(**LONG))["id"]
    process = start("watch", job)
    read_until(process, "step ")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"Still running. hone watch {job} comes back to it; hone cancel {job} stops it." in out
    assert answer("get", job)["state"] == "RUNNING"
    assert answer("cancel", job)["state"] == "CANCELLED"
    assert hone("watch", job).returncode == 1


def test_a_watch_goes_on_when_the_command_that_served_it_is_killed(
    request_file: Callable[..., Path], start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    run = start("run", request_file(steps="400", pause_ms="50"))
    read_until(run, "step ")
    watch = start("watch", "demo", "--json")
    read_until(watch, '"progress"')
    run.kill()
    out, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0, out
    seqs = [json.loads(line)["seq"] for line in out.splitlines()]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))  # none missing, none doubled


def test_a_service_is_submitted_to_and_watched_over_grpc(
    request_file: Callable[..., Path], start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    serve = start("serve", "--address", "127.0.0.1:0")
    address = _address(serve)
    accepted = hone("submit", request_file(), "--server", address)
    match = re.fullmatch(r"default/(demo-\w{5}) accepted\. Next: hone watch demo-\w{5}\n", accepted.stdout)
    assert match, accepted
    assert hone("--server", address, "watch", match[1]).returncode == 0
    assert hone("watch", match[1]).returncode == 0  # the owner of HONE_HOME, without being named
    assert answer("submit", request_file(), "--validate-only", "--server", address)["state"] == "PENDING"
    assert len(answer("list")["jobs"]) == 1
    second = hone("serve", "--address", "127.0.0.1:0")
    assert second.returncode == 2
    assert f"process {serve.pid}" in second.stderr
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(timeout=20) == 0


def test_a_server_that_is_not_there_ends_with_5() -> None:
    done = hone("list", "--server", "127.0.0.1:9", "--json")
    assert done.returncode == 5
    assert json.loads(done.stdout)["error"]["reason"] == "UNAVAILABLE"


def test_a_home_that_cannot_be_written_ends_with_5(home: Path) -> None:
    home.write_text("a file", encoding="ascii")
    done = hone("list")
    assert done.returncode == 5
    assert str(home) in done.stderr
    assert "HONE_HOME" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(request_file: Callable[..., Path]) -> None:
    script = f'"{HONE}" spec | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_doctor_says_that_this_machine_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HONE_TRAINER_PYTHON")
    found = answer("doctor")
    assert found["ready"]
    assert found["methods"]["sft"] == "ready"
    assert [check["name"] for check in found["checks"]] == ["machine", "GPUs", "trainer", "home", "store", "service"]


def test_doctor_names_the_python_that_lacks_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HONE_TRAINER_PYTHON", str(tmp_path / "no-such-python"))
    done = hone("doctor")
    assert done.returncode == 1
    assert done.stdout.startswith("Not ready: see trainer.")
    assert str(tmp_path / "no-such-python") in done.stdout


def test_prune_removes_the_working_files_of_a_failed_run(request_file: Callable[..., Path], home: Path) -> None:
    hone("run", request_file(ending="crash"))
    scratch = next(home.glob("runs/default/*/attempt-1")) / "scratch"
    scratch.mkdir()
    (scratch / "model.safetensors").write_bytes(b"what a trainer leaves that was killed")
    done = hone("prune", "--yes")
    assert done.returncode == 0, done
    assert not scratch.exists()
    assert "the last line before the end" in hone("logs", "demo").stdout


def test_ctrl_c_on_run_asks_and_no_goes_on(request_file: Callable[..., Path]) -> None:
    terminal = Terminal("run", request_file(steps="100", pause_ms="50"))
    terminal.read_until(r"step \d+/100")
    terminal.type("\x03")
    terminal.read_until(r"Cancel the run\? \[y/N\]")
    terminal.type("n\r")
    terminal.read_until(r"step \d+/100")
    assert terminal.exit_code() == 0
    assert "Done in" in terminal.seen


@pytest.mark.parametrize("keys", ["y\r", "\x03"])
def test_ctrl_c_on_run_asks_and_yes_or_a_second_one_cancels(request_file: Callable[..., Path], keys: str) -> None:
    terminal = Terminal("run", request_file(**LONG))
    terminal.read_until(r"step \d+/3,000")
    terminal.type("\x03")
    terminal.read_until(r"Cancel the run\? \[y/N\]")
    terminal.type(keys)
    assert terminal.exit_code() == 130
    assert "CANCELLED" in terminal.seen


def _address(serve: "subprocess.Popen[str]") -> str:
    assert serve.stderr
    for line in serve.stderr:
        if match := re.search(r"listening on (\S+?),", line):
            return match[1]
    raise AssertionError("hone serve never said where it listens")
