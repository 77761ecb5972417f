"""grpcurl, which knows the API by reflection only, against a service of this process's own."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.rpc.server import LocalService
from hone.settings import Settings
from hone.spec import JobSpec

from .servers import find_tool

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def grpcurl(tmp_path: Path, quick_python: Path) -> Iterator[Call]:
    """Runs grpcurl with arguments; a mapping goes in as the message."""
    program = find_tool("grpcurl")
    if program is None:
        pytest.skip("grpcurl is not there: `make servers` builds it")
    settings = Settings(home=tmp_path / "home", trainer_python=str(quick_python))
    with LocalService(settings) as service:
        socket = service.address.removeprefix("unix:")

        def call(method: str, message: dict[str, Any] | None = None) -> "subprocess.CompletedProcess[str]":
            data = [] if message is None else ["-d", json.dumps(message)]
            command = [str(program), "-plaintext", "-unix", *data, socket, *method.split()]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

        yield call


def test_the_api_describes_itself(grpcurl: Call) -> None:
    assert "hone.v1.TrainingService" in grpcurl("list").stdout.splitlines()
    assert "CreateJob" in grpcurl("describe hone.v1.TrainingService").stdout


def test_a_request_goes_in_as_the_yaml_has_it_and_runs(grpcurl: Call, make_spec: Callable[..., JobSpec]) -> None:
    spec = make_spec().to_mapping()
    made = grpcurl("hone.v1.TrainingService/CreateJob", {"parent": "namespaces/default", "spec": spec, "job_id": "one"})
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["name"] == "namespaces/default/jobs/one"
    watched = grpcurl("hone.v1.TrainingService/WatchJob", {"name": "namespaces/default/jobs/one"})
    assert watched.returncode == 0, watched.stderr
    assert '"SUCCEEDED"' in watched.stdout
    found = json.loads(grpcurl("hone.v1.TrainingService/GetJob", {"name": "namespaces/default/jobs/one"}).stdout)
    assert found["state"] == "STATE_SUCCEEDED"
    assert found["outputs"][0]["kind"] == "adapter"


def test_errors_name_field_value_and_reason(grpcurl: Call) -> None:
    missing = grpcurl("hone.v1.TrainingService/GetJob", {"name": "namespaces/default/jobs/none"})
    assert "NotFound" in missing.stderr
    assert "NOT_FOUND" in missing.stderr
    wrong = grpcurl(
        "hone.v1.TrainingService/CreateJob",
        {"parent": "namespaces/default", "spec": {"name": "x", "training": {"learning_rate": 7}}},
    )
    assert "InvalidArgument" in wrong.stderr
    assert "training.learning_rate" in wrong.stderr
