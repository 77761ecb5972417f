"""Servers that integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .servers import S3Server, find_tool, run_s3


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session; its tests are skipped where it is not built."""
    program = find_tool("versitygw")
    if program is None:
        pytest.skip("versitygw is not there: `make servers` builds it")
    with run_s3(program, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, request: pytest.FixtureRequest) -> Path:
    """The directory of a new bucket; its name is the bucket's."""
    return s3_server.make_bucket(f"test-{abs(hash(request.node.nodeid)) % 10**12}")
