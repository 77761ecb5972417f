"""What a service says of itself: probes, grpc.health.v1 and its log, from a process of its own."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from hone.job import State
from hone.rpc.client import Client

from .hone_server import MakeSpec, ServerProcess, quick, running, wait_until
from .postgres import find_postgres, run_postgres
from .servers import free_port

_LOOKS_OFTEN = "import hone.rpc.server as s; s.LOOK_S = 0.2; "


@pytest.fixture
def http() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def server(tmp_path: Path, quick_python: Path, http: str) -> Iterator[ServerProcess]:
    settings = {"HONE_HTTP_ADDRESS": http, "HONE_LOG_FORMAT": "json", "HONE_LOG_LEVEL": "debug"}
    with running(ServerProcess(tmp_path / "home", quick_python, **settings)) as server:
        yield server


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def value_of(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of that name that have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_a_service_tells_what_it_did(server: ServerProcess, http: str, make_spec: MakeSpec) -> None:
    assert get(http, "/healthz") == (200, "ok\n")
    code, text = get(http, "/readyz")
    assert code == 200 and "[+] database: sqlite:///" in text
    with Client(server.address) as client:
        job = client.submit(quick(make_spec))
        assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
        with pytest.raises(Exception, match="There is no job"):
            client.get("nothing")
    found = get(http, "/metrics")[1]
    assert value_of(found, "hone_jobs", namespace="default", state="SUCCEEDED") == 1
    assert value_of(found, "hone_rpc_seconds_count", method="CreateJob", code="OK") == 1
    assert value_of(found, "hone_rpc_seconds_count", method="GetJob", code="NOT_FOUND") == 1
    assert value_of(found, "hone_rpc_streams_ended_total", method="WatchJob", code="OK") == 1
    assert value_of(found, "hone_rpc_streams_open", method="WatchJob") == 0
    assert value_of(found, "hone_reconcile_step_seconds_count", result="ok") > 0
    for line in server.log.splitlines():
        assert {"time", "level", "logger", "message", "namespace", "job"} <= json.loads(line).keys()


def test_a_database_that_goes_away_and_comes_back_is_told_and_nothing_is_lost(
    tmp_path: Path, quick_python: Path, http: str, make_spec: MakeSpec
) -> None:
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with run_postgres(programs) as database:
        settings = {"HONE_HTTP_ADDRESS": http, "HONE_DATABASE": database.make_database("hone")}
        code = _LOOKS_OFTEN + "import asyncio; asyncio.run(s.serve(s.Settings()))"
        with running(ServerProcess(tmp_path / "home", quick_python, code=code, **settings)) as server:
            with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)

                def serving() -> bool:
                    answer = stub.Check(health_pb2.HealthCheckRequest(service="hone.v1.TrainingService"))
                    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

                job = client.submit(quick(make_spec, steps=100, pause_ms=50))
                wait_until(lambda: client.get(job.id).progress is not None)
                assert "[+] leader: this service reconciles" in get(http, "/readyz")[1]
                assert serving()
                with database.stopped():
                    wait_until(lambda: not serving(), timeout_s=20)
                    code_, text = get(http, "/readyz")
                    assert code_ == 503 and "[-] database: " in text and database.password not in text
                    assert get(http, "/healthz")[0] == 200
                wait_until(serving, timeout_s=20)
                assert get(http, "/readyz")[0] == 200
                assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
                steps = [event.step for event in client.events(job.id) if event.type == "progress"]
                assert steps == list(range(1, 101))
            assert database.password not in server.log
