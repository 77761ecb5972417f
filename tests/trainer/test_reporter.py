"""Reports over the wire: a token that is renewed, TLS of a private authority, a service that comes and goes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from hone.errors import StorageError, Unavailable
from hone.job import Event, EventType
from hone.rpc.report import Reporter
from hone.v1 import report_service_pb2, report_service_pb2_grpc

from ..integration.certificates import Authority, authority
from ..integration.servers import free_port
from .conftest import MakeAttempt


@dataclass
class Service(report_service_pb2_grpc.ReportServiceServicer):  # type: ignore[misc]
    """Records what it is told, and by whom."""

    tokens: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def ReportEvents(self, request: Any, context: Any) -> Any:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        self.requests.append(request)
        return report_service_pb2.ReportEventsResponse(acked_seq=request.events[-1].seq)


def serve(service: Service, port: int, credentials: Any = None) -> Any:
    server = grpc.server(ThreadPoolExecutor(2))
    report_service_pb2_grpc.add_ReportServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{port}"
    if credentials is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, credentials)
    server.start()
    return server


@pytest.fixture
def trust(tmp_path: Path) -> Authority:
    return authority(tmp_path / "authority")


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service, trust: Authority, tmp_path: Path) -> Iterator[str]:
    """A service behind TLS."""
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    trust.sign(cert, key)
    port = free_port()
    server = serve(service, port, grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())]))
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def events(*seqs: int) -> Sequence[Event]:
    return [Event(seq=seq, time=datetime.now(UTC), type=EventType.NOTE) for seq in seqs]


def test_the_token_is_read_anew_for_every_call(
    make_attempt: MakeAttempt, service: Service, address: str, trust: Authority, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    reporter = Reporter(address, make_attempt().run, token_file=token, ca_file=trust.ca)
    for text, seqs in (("first", (1, 2)), ("second\n", (3,))):
        token.write_text(text)
        assert reporter.send(events(*seqs)) == seqs[-1]
    reporter.close()
    assert service.tokens == ["Bearer first", "Bearer second"]
    request = service.requests[0]
    assert (request.job, request.attempt, request.nonce) == ("namespaces/default/jobs/tiny-1", 1, "nonce-1")


def test_a_certificate_of_another_authority_is_not_trusted_and_the_right_one_is_taken_up(
    make_attempt: MakeAttempt, address: str, trust: Authority, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority(tmp_path / "other").ca.read_bytes())
    reporter = Reporter(address, make_attempt().run, ca_file=ca)
    with pytest.raises(Unavailable):
        reporter.send(events(1), timeout_s=3)
    ca.write_bytes(trust.ca.read_bytes())
    assert reporter.send(events(1)) == 1
    reporter.close()


def test_a_token_that_is_not_there_is_told_with_its_file(make_attempt: MakeAttempt, address: str) -> None:
    with pytest.raises(StorageError, match="/no/such/token cannot be read"):
        Reporter(address, make_attempt().run, token_file=Path("/no/such/token")).send(events(1))


def test_a_service_that_was_away_is_found_again(make_attempt: MakeAttempt, service: Service) -> None:
    port = free_port()
    reporter = Reporter(f"127.0.0.1:{port}", make_attempt().run)
    with pytest.raises(Unavailable):
        reporter.send(events(1), timeout_s=1)
    server = serve(service, port)
    assert reporter.send(events(1)) == 1
    reporter.close()
    server.stop(None).wait()
    assert service.tokens == [""]
