"""Errors to google.rpc.Status and back: the one table of codes, for the server's answers and the client's exceptions.

Every status carries an ErrorInfo with the error's reason; docs/api.md lists them. A status travels in HTTP/2 trailers,
of which a peer takes 8 KiB, so details are cut at 4 KiB; the count of violations is always told.
"""

import logging
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from hone import errors
from hone.errors import HoneError, InvalidRequest, Violation

DOMAIN = "hone.dev"
DETAILS_KEY = "grpc-status-details-bin"
MAX_STATUS_BYTES = 4096
MAX_MESSAGE_BYTES = 512
RETRY_DELAY_S = 1

_log = logging.getLogger(__name__)

CODES: Mapping[type[HoneError], grpc.StatusCode] = {
    errors.UserError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Refused: grpc.StatusCode.PERMISSION_DENIED,
    errors.CursorTooOld: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotServed: grpc.StatusCode.UNIMPLEMENTED,
    errors.TemporaryError: grpc.StatusCode.UNAVAILABLE,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.PermanentError: grpc.StatusCode.INTERNAL,
    errors.IntegrityError: grpc.StatusCode.DATA_LOSS,
    errors.StorageError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ClusterError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
_TYPES = {kind.reason: kind for kind in CODES}
_TYPES_WITHOUT_REASON: Mapping[grpc.StatusCode, type[HoneError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.UserError,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.WrongState,
    grpc.StatusCode.PERMISSION_DENIED: errors.Refused,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Refused,
    grpc.StatusCode.OUT_OF_RANGE: errors.CursorTooOld,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotServed,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.TemporaryError,
    grpc.StatusCode.CANCELLED: errors.TemporaryError,
}


def foreseen(error: Exception) -> HoneError:
    """The error that is told. What nobody foresaw is logged under an id, and only the id is told."""
    if isinstance(error, HoneError):
        return error
    error_id = uuid.uuid4().hex[:12]
    _log.error("internal error %s", error_id, exc_info=error)
    return errors.InternalError("Something failed that nobody foresaw.", fix=f"The service's log has it: {error_id}.")


async def abort(context: Any, error: HoneError) -> Any:
    """End a call with an error; always raises."""
    status = to_status(error)
    details = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(code_of(error), status.message, trailing_metadata=details)


def code_of(error: HoneError) -> grpc.StatusCode:
    """The code of an error: its own type's, or of the nearest type above."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def to_status(error: HoneError) -> status_pb2.Status:
    """An error as it travels: at most 4 KiB."""
    status = status_pb2.Status(code=code_of(error).value[0], message=_cut(_sentence(error), MAX_MESSAGE_BYTES))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.fix and not isinstance(error, InvalidRequest):
        info.metadata["fix"] = _cut(error.fix, MAX_MESSAGE_BYTES)
    if isinstance(error, InvalidRequest):
        info.metadata["violations"] = str(len(error.violations))
    for detail in (info, *_details(error)):
        status.details.add().Pack(detail)
    if isinstance(error, InvalidRequest):
        status.details.add().Pack(_bad_request(error, room=MAX_STATUS_BYTES - status.ByteSize() - 64))
    return status


def from_rpc_error(error: grpc.RpcError, *, address: str) -> HoneError:
    """The typed error that a failed call stands for."""
    code, text = error.code(), error.details() or ""
    status = _status_of(error)
    if status is None:
        return _without_status(code, text, address)
    info = _detail(status, error_details_pb2.ErrorInfo)
    kind = _TYPES.get(info.reason) or _TYPES_WITHOUT_REASON.get(code, errors.InternalError)
    if kind is InvalidRequest:
        return InvalidRequest(_violations(status, int(info.metadata.get("violations", "1"))))
    fix = info.metadata.get("fix", "")
    return kind(status.message.removesuffix(fix).strip(), fix=fix)


def _sentence(error: HoneError) -> str:
    if not isinstance(error, InvalidRequest):
        return str(error)
    first, count = str(error.violations[0]), len(error.violations)
    return first if count == 1 else f"{count} problems; the first: {first}"


def _details(error: HoneError) -> Iterator[Message]:
    if isinstance(error, errors.NotFound | errors.AlreadyExists):
        yield error_details_pb2.ResourceInfo(
            resource_type="hone.dev/Job", description=_cut(error.message, MAX_MESSAGE_BYTES)
        )
    elif isinstance(error, errors.WrongState | errors.StorageError | errors.ClusterError):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, description=_cut(error.message, MAX_MESSAGE_BYTES)
        )
        yield error_details_pb2.PreconditionFailure(violations=[violation])
    elif isinstance(error, errors.TemporaryError):
        yield error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_DELAY_S))


def _bad_request(error: InvalidRequest, *, room: int) -> error_details_pb2.BadRequest:
    found = error_details_pb2.BadRequest()
    for violation in error.violations:
        found.field_violations.add(
            field=_cut(violation.path, MAX_MESSAGE_BYTES),
            description=_cut(violation.message, MAX_MESSAGE_BYTES),
            reason=error.reason,
        )
        if found.ByteSize() > room:
            del found.field_violations[-1]
            break
    return found


def _cut(text: str, max_bytes: int) -> str:
    data = text.encode("utf-8", "replace")
    return text if len(data) <= max_bytes else data[: max_bytes - 3].decode("utf-8", "ignore") + "…"


def _status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _detail(status: status_pb2.Status, kind: Any) -> Any:
    found = kind()
    next((True for detail in status.details if detail.Unpack(found)), False)
    return found


def _violations(status: status_pb2.Status, count: int) -> list[Violation]:
    told = _detail(status, error_details_pb2.BadRequest).field_violations
    found = [Violation(path=violation.field, message=violation.description) for violation in told]
    if missing := count - len(found):
        found.append(Violation(path="", message=f"And {missing} more: `hone plan` (PlanJob) tells them all."))
    return found


_ADDRESS_FIX = "Start `hone serve`, or set HONE_SERVER to its address."
_CERTIFICATE_FIX = (
    "If it speaks TLS, set HONE_TLS_CA to the certificate of the authority that signed its own, and "
    "HONE_TLS_SERVER_NAME to a name in that where the address is another."
)


def _is_tls(text: str) -> bool:
    """Whether the two ends do not agree on TLS: a certificate that does not fit, or plain text to who expects none."""
    text = text.lower()
    hung_up = "failed to connect" in text and "socket closed" in text
    return hung_up or any(word in text for word in ("certificate", "ssl", "tls", "verification"))


def _without_status(code: grpc.StatusCode, text: str, address: str) -> HoneError:
    """What gRPC itself answers: nobody there, too late, too large, a server that is no Hone."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(
            f"No Hone service answers at {address} ({text}).", fix=_CERTIFICATE_FIX if _is_tls(text) else _ADDRESS_FIX
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.TemporaryError(
            f"The service at {address} did not answer in time.", fix="Try again, or wait longer."
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.NotServed(
            f"The service at {address} does not know this call ({text}).", fix="Update the service."
        )
    kind = _TYPES_WITHOUT_REASON.get(code, errors.InternalError)
    return kind(f"The service at {address} answered {code.name}: {text or 'nothing more'}.")
