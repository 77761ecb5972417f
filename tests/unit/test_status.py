"""hone.rpc.status and hone.rpc.channel: every error has its code and reason, and comes back as what it was."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from hone import errors
from hone.errors import HoneError, InvalidRequest, Violation
from hone.rpc import channel, status


def all_kinds(kind: type[HoneError] = HoneError) -> Iterator[type[HoneError]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from all_kinds(inner)


OURS = [kind for kind in all_kinds() if kind.__module__ == "hone.errors"]


class Failed(grpc.RpcError):
    """A failed call as gRPC hands it to a client."""

    def __init__(self, code: grpc.StatusCode, text: str = "", data: bytes | None = None) -> None:
        self._answer = code, text, ((status.DETAILS_KEY, data),) if data is not None else ()

    def code(self) -> Any:
        return self._answer[0]

    def details(self) -> Any:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2]


def there_and_back(error: HoneError) -> HoneError:
    sent = status.to_status(error)
    assert sent.ByteSize() <= status.MAX_STATUS_BYTES
    return status.from_rpc_error(Failed(status.code_of(error), sent.message, sent.SerializeToString()), address="a:1")


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind is not InvalidRequest])
def test_every_error_comes_back_as_what_it_was(kind: type[HoneError]) -> None:
    again = there_and_back(kind("It is so.", fix="Do this."))
    assert (type(again), again.message, again.fix) == (kind, "It is so.", "Do this.")


def test_every_error_has_a_reason_of_its_own_and_a_code() -> None:
    reasons = [kind.reason for kind in OURS]
    assert len(set(reasons) - {"INTERNAL"}) == len([kind for kind in OURS if kind.reason != "INTERNAL"])
    assert set(OURS) == set(status.CODES)


def detail(error: HoneError, kind: Any) -> Any:
    found = kind()
    assert any(part.Unpack(found) for part in status.to_status(error).details)
    return found


@pytest.mark.parametrize("kind", OURS)
def test_the_reason_is_always_told(kind: type[HoneError]) -> None:
    error = InvalidRequest([Violation(path="a", message="b")]) if kind is InvalidRequest else kind("x")
    info = detail(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (kind.reason, "hone.dev")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (errors.NotFound, error_details_pb2.ResourceInfo),
        (errors.AlreadyExists, error_details_pb2.ResourceInfo),
        (errors.RequestIdReused, error_details_pb2.ResourceInfo),
        (errors.WrongState, error_details_pb2.PreconditionFailure),
        (errors.Unavailable, error_details_pb2.RetryInfo),
        (errors.StorageUnavailable, error_details_pb2.RetryInfo),
    ],
)
def test_errors_carry_the_detail_of_their_kind(kind: type[HoneError], wanted: Any) -> None:
    assert detail(kind("x"), wanted).ByteSize() > 0


def test_violations_come_back_each_with_its_path() -> None:
    error = InvalidRequest([Violation(path=f"a.b{n}", message=f"wrong {n}") for n in range(3)])
    again = there_and_back(error)
    assert isinstance(again, InvalidRequest)
    assert again.violations == error.violations


def test_too_many_violations_are_cut_and_counted() -> None:
    again = there_and_back(InvalidRequest([Violation(path=f"a.b{n}", message="x" * 300) for n in range(40)]))
    assert isinstance(again, InvalidRequest)
    *told, rest = again.violations
    assert 5 < len(told) < 40
    assert rest.message.startswith(f"And {40 - len(told)} more")


def test_one_endless_violation_is_cut_too() -> None:
    again = there_and_back(InvalidRequest([Violation(path="é" * 9000, message="é" * 9000)]))
    assert isinstance(again, InvalidRequest)
    assert again.violations[0].message.endswith("…")


def test_a_type_that_the_table_does_not_list_has_its_parents_code() -> None:
    class Odd(errors.NotFound):
        """Comes from a module of its own."""

    assert status.code_of(Odd("x")) is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.TemporaryError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.NotServed),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Refused),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_what_grpc_itself_answers_is_typed_too_and_names_the_address(code: Any, kind: type[HoneError]) -> None:
    error = status.from_rpc_error(Failed(code, "text"), address="there:7465")
    assert type(error) is kind
    assert "there:7465" in str(error)


def test_a_reason_of_a_newer_service_is_read_by_its_code() -> None:
    sent = status.to_status(errors.NotFound("gone"))
    info = error_details_pb2.ErrorInfo(reason="SOMETHING_NEW", domain="hone.dev")
    sent.details[0].Pack(info)
    again = status.from_rpc_error(
        Failed(grpc.StatusCode.NOT_FOUND, "gone", sent.SerializeToString()), address="there:7465"
    )
    assert type(again) is errors.NotFound


@pytest.mark.parametrize(
    ("peer", "machine", "here"),
    [
        ("unix:", None, True),
        ("unix:/tmp/x.sock", "other", False),
        ("ipv4:127.0.0.1:53412", None, True),
        ("ipv6:%5B::1%5D:53412", None, True),
        ("ipv4:127.0.0.1:53412", "other", False),  # through a tunnel
        ("ipv4:192.0.2.7:53412", None, False),
        ("ipv6:%5B2001:db8::1%5D:53412", None, False),
        ("", None, False),
    ],
)
def test_a_caller_is_on_this_machine_only_by_address_and_machine_id(peer: str, machine: str | None, here: bool) -> None:
    assert channel.is_on_this_machine(peer, machine) is here
    if machine is None:
        assert channel.is_on_this_machine(peer, channel.machine_id()) is here


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:7465", True),
        ("localhost:7465", True),
        ("[::1]:7465", True),
        ("unix:/tmp/x.sock", True),
        ("0.0.0.0:7465", False),
        ("[::]:7465", False),
        ("gpu-box:7465", False),
    ],
)
def test_only_loopback_and_sockets_are_local(address: str, local: bool) -> None:
    assert channel.is_local(address) is local


@pytest.mark.parametrize("address", ["7465", "localhost", "localhost:x", "localhost:99999", ":7465"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(errors.UserError, match="not an address"):
        channel.split_address(address)
