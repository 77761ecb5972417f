"""Pausing and resuming over a real server: the trainer's own supervisor stores checkpoints and fetches them again."""

from pathlib import Path

import pytest

from hone.backends.run_files import read_process
from hone.errors import NotFound
from hone.job import EventType, State
from hone.rpc.client import Client
from hone.run import RunDirectory
from hone.storage import JobLayout, open_store, read_manifest, verify_directory

from .hone_server import MakeSpec, ServerProcess, quick, wait_until
from .test_rpc import client, server

__all__ = ["client", "server"]


def test_a_paused_run_goes_on_where_it_was_under_one_watch(
    server: ServerProcess, client: Client, make_spec: MakeSpec
) -> None:
    job = client.submit(quick(make_spec, steps=60, pause_ms=50, labels={"checkpoints": "1000"}))
    stream = client.watch(job.id)
    seen = [next(stream)]
    wait_until(lambda: (found := client.get(job.id).progress) is not None and found.step > 3)
    assert client.pause(job.id).state in (State.PAUSING, State.PAUSED)
    wait_until(lambda: client.get(job.id).state is State.PAUSED)
    assert_nothing_runs(server, job.namespace, job.id)
    (saved,) = client.checkpoints(job.id)
    paused = client.get(job.id)
    assert paused.progress and paused.progress.step == saved.step < 60
    assert paused.state_reason == f"It is paused, and goes on from step {saved.step} when it is resumed."
    assert client.resume(job.id).state is not State.PAUSED
    seen += stream
    states = [event.fields["state"] for event in seen if event.type == EventType.STATE]
    assert states == ["PENDING", "RUNNING", "PAUSING", "PAUSED", "PENDING", "RUNNING", "SUCCEEDED"]
    assert [event.step for event in seen if event.type == EventType.PROGRESS] == list(range(1, 61))
    ended = client.get(job.id)
    assert [(attempt.state, attempt.counted) for attempt in ended.attempts] == [
        (State.CANCELLED, False),
        (State.SUCCEEDED, True),
    ]
    assert [output.attempt for output in client.outputs(job.id)] == [2]


def test_what_is_listed_as_complete_is_there_and_what_was_removed_is_not(
    server: ServerProcess, client: Client, make_spec: MakeSpec
) -> None:
    spec = quick(make_spec, steps=10, pause_ms=300, labels={"checkpoints": "2"})
    job = client.wait(client.submit(spec).id)
    assert job.state is State.SUCCEEDED
    found = client.checkpoints(job.id)
    assert len(found) > spec.training.checkpoint.keep == 2  # one that a newer one overtakes is never sent
    assert [checkpoint.complete for checkpoint in found] == [False] * (len(found) - 2) + [True, True]
    steps = [checkpoint.step for checkpoint in found]
    assert steps == sorted(set(steps)) and steps[-1] == 10
    store, layout = open_store((server.home / "artifacts").as_uri()), JobLayout(job.namespace, job.id)
    for checkpoint in found:
        key = layout.output(checkpoint.place)
        assert checkpoint.uri == store.url(key)
        if checkpoint.complete:
            manifest = verify_directory(store, key, digest=checkpoint.sha256)
            assert manifest.size_bytes == checkpoint.size_bytes
        else:
            with pytest.raises(NotFound):
                read_manifest(store, key)


def test_a_job_that_was_paused_before_it_saved_anything_begins_again(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, steps=120, pause_ms=50))
    wait_until(lambda: client.get(job.id).progress is not None)
    client.pause(job.id)
    wait_until(lambda: client.get(job.id).state is State.PAUSED)
    assert "begins again" in client.get(job.id).state_reason and client.checkpoints(job.id) == []
    client.resume(job.id)
    assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
    second = [event.step for event in client.events(job.id) if event.type == EventType.PROGRESS and event.attempt == 2]
    assert second == list(range(1, 121))


def assert_nothing_runs(server: ServerProcess, namespace: str, job: str) -> None:
    for path in (server.home / "runs" / namespace / job).glob("attempt-*"):
        process = read_process(RunDirectory(Path(path)))
        wait_until(lambda process=process: process is None or not process.is_alive, timeout_s=10)  # type: ignore[misc]
