"""Plays the trainer in a pod, for tests of the backend: `python -m hone_trainer pod` finds it first.

It keeps the trainer's contract (events and ranks' lines on stdout, termination message, exit code) and trains nothing.
Labels of the request say what it does: `steps` and `pause_ms` between them, `ending`: a number is its exit code with a
reason, `mute-<n>` the same without one, `deaf` ignores SIGTERM, `greedy` takes memory until it is killed, `chatty`
writes more than the kubelet keeps. With `on` only the node of that number ends so, the others go on. With `reports` it
also sends its events to the service, with `uploads` it leaves a complete adapter in the store, with `checkpoints` it
tells of a checkpoint when it is asked to stop.
"""

import contextlib
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hone.errors import HoneError
from hone.job import Event
from hone.run import FAILURE_CLASSES, Run, TrainerExit, spec_hash

NODE = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
_run = Run.from_yaml(Path(os.environ["HONE_SPEC_FILE"]).read_text(encoding="utf-8"))
_labels = _run.spec.labels
_seq = 0
_unsent: list[Event] = []
_last_words: dict[str, Any] = {}
_reporter: Any = None


def say(text: str) -> None:
    """One line, by one write."""
    os.write(1, (text + "\n").encode())


def event(
    kind: str, message: str, *, step: int | None = None, fields: dict[str, str] | None = None, **metrics: float
) -> None:
    """What only node 0 does."""
    global _seq
    _seq += 1
    if NODE == 0:
        now = datetime.now(UTC)
        data = {"seq": _seq, "type": kind, "message": message, "metrics": metrics, "fields": fields or {}, "step": step}
        say(json.dumps({**data, "time": now.isoformat()}))
        if kind == "checkpoint":
            _last_words["checkpoint"] = {**data, "time": now.isoformat()}
        if "reports" in _labels:
            report(Event(time=now, **data))


def report(new: Event) -> None:
    """Send what the service has not taken; it may be gone, and what it never takes it reads from the log."""
    global _reporter
    if _reporter is None:
        from hone.rpc.report import Reporter

        token, authority = (Path(os.environ[f"HONE_REPORT_{name}_FILE"]) for name in ("TOKEN", "CA"))
        _reporter = Reporter(os.environ["HONE_REPORT_ADDRESS"], _run, token_file=token, ca_file=authority)
    _unsent.append(new)
    with contextlib.suppress(HoneError):
        taken = _reporter.send(_unsent, timeout_s=1.0)
        _unsent[:] = [unsent for unsent in _unsent if unsent.seq > taken]


def upload() -> None:
    """A small adapter, complete by its manifest, the event that tells of it, and the record of the run."""
    from hone.storage import JobLayout, open_store, upload_directory

    layout = JobLayout(_run.namespace, _run.job)
    directory = Path(os.environ["HONE_WORK"]) / "adapter"
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    store = open_store(_run.store)
    manifest = upload_directory(store, directory, layout.adapter, workers=1)
    told = {"kind": "adapter", "place": "adapter", "uri": store.url(layout.adapter), "sha256": manifest.digest}
    event("output", "adapter is complete", fields={**told, "size_bytes": str(manifest.size_bytes)})
    outputs = {"adapter": {**told, "size_bytes": manifest.size_bytes}}
    result = {"attempt": _run.attempt, "spec_hash": spec_hash(_run.spec), "outputs": outputs}
    store.put_bytes(layout.result, json.dumps(result).encode())


def stop(*_: Any) -> None:
    """On SIGTERM."""
    if "checkpoints" in _labels:
        place = f"attempt-{_run.attempt}/checkpoints/step-000007"
        told = {"place": place, "uri": f"{_run.store}/{place}", "size_bytes": "7", "sha256": "7" * 64, "removes": ""}
        event("checkpoint", "the checkpoint of step 7 is complete", step=7, fields=told)
    fail(17, "Stopped on request.")


def fail(code: int, message: str) -> None:
    """End with a reason."""
    ranks = _run.launch.processes_per_node
    failure = {
        "failure_class": FAILURE_CLASSES[TrainerExit(code)],
        "message": message,
        "next_step": "Mend it.",
        "rank": NODE * ranks,
        "exit_code": code,
        "log_tail": ["the last line"],
    }
    Path("/dev/termination-log").write_text(json.dumps({**failure, **_last_words}), encoding="utf-8")
    sys.exit(code)


def main() -> None:
    """Report steps, then end as asked."""
    ending = _labels.get("ending", "0") if _labels.get("on", str(NODE)) == str(NODE) else "0"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ending == "deaf" else stop)
    say("the trainer starts")
    event("phase", "training")
    for step in range(1, int(_labels.get("steps", "3")) + 1):
        time.sleep(int(_labels.get("pause_ms", "10")) / 1000)
        event("progress", f"step {step}", loss=1.0 / step)
        for rank in range(NODE * _run.launch.processes_per_node, (NODE + 1) * _run.launch.processes_per_node):
            say(f"[rank {rank}] step {step} of rank {rank}")
    if "uploads" in _labels:
        upload()
    if ending == "greedy":
        hoard = []
        while True:
            hoard.append(b"x" * (64 << 20))
    if ending == "chatty":
        for number in range(60_000):
            say(f"[rank 0] {number:06} {'x' * 240}")
        time.sleep(25)  # the kubelet looks at the sizes of logs every ten seconds
        event("note", "the end")
    if ending.startswith("mute-"):
        say("the last words")
        os._exit(int(ending.removeprefix("mute-")))
    if ending.isdecimal() and int(ending):
        fail(int(ending), f"It was asked to end with {ending}.")
    say("the trainer ends")


if __name__ == "__main__":
    main()
