"""Every error that Hone raises on purpose.

    HoneError
    ├── UserError            the caller can mend it; sending it again unchanged never helps
    │   ├── InvalidRequest   one or many violations: path, value, fix
    │   ├── NotFound
    │   ├── AlreadyExists
    │   ├── WrongState       right request, wrong moment
    │   ├── Unauthenticated  nobody knows who calls
    │   ├── Refused          not allowed, or over a quota
    │   └── NotServed        known, and not built yet
    ├── TemporaryError       sending it again may help; retried by type, in one place
    │   ├── Unavailable      the service, its database, the cluster or the Hub cannot be reached
    │   └── StorageUnavailable
    └── PermanentError       nobody's request is at fault; a person has to look
        ├── IntegrityError   bytes are not what their manifest says
        ├── StorageError     the store or the database cannot be used: credentials, bucket, full disk, no right
        ├── ClusterError     the cluster refuses what the service asks: no right, a policy, an object that is not ours
        └── InternalError    a bug of ours

A message says what was wrong, the value, and the fix. `reason` is the stable word that machines read
(google.rpc.ErrorInfo.reason, the `reason` key of `--json`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that is wrong with a request."""

    path: str
    """Dotted path of the field, as in the YAML file: `adapter.lora.rank`. Empty for the request as a whole."""
    message: str
    """What is wrong, with the value, and the fix; one or two sentences."""
    value: Any = None
    """The value as it was given; None when the field is absent."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class HoneError(Exception):
    """Root of the tree. `str(error)` is the sentence for people."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message} {fix}".strip())


class UserError(HoneError):
    """The caller can mend it."""

    reason = "BAD_REQUEST"


class InvalidRequest(UserError):
    """The request breaks rules; `violations` holds every one of them."""

    reason = "INVALID_FIELDS"

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        count = len(self.violations)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head}:", *(f"  {violation}" for violation in self.violations)]))


class NotFound(UserError):
    """No such job, checkpoint, output or file."""

    reason = "NOT_FOUND"


class AlreadyExists(UserError):
    """The id is taken, or the request id was used with another body."""

    reason = "JOB_ID_TAKEN"


class RequestIdReused(AlreadyExists):
    """The same request_id came with another body."""

    reason = "REQUEST_ID_REUSED"


class WrongState(UserError):
    """The job is in a state in which this cannot be done."""

    reason = "WRONG_STATE"


class Unauthenticated(UserError):
    """No token came, or one that is not accepted: expired, or made for somebody else."""

    reason = "UNAUTHENTICATED"


class Refused(UserError):
    """Not allowed here, or over a quota."""

    reason = "REFUSED"


class CursorTooOld(UserError):
    """Events before this cursor are no longer kept."""

    reason = "CURSOR_TOO_OLD"


class NotServed(UserError):
    """A method, strategy or backend that the specification knows and this version does not run yet."""

    reason = "NOT_SERVED_YET"


class TemporaryError(HoneError):
    """Sending the same thing again may help."""

    reason = "TEMPORARY"


class Unavailable(TemporaryError):
    """The service, its database, the cluster or the Hub cannot be reached."""

    reason = "UNAVAILABLE"


class StorageUnavailable(TemporaryError):
    """The artefact store did not answer, or asked to slow down."""

    reason = "STORAGE_UNAVAILABLE"


class PermanentError(HoneError):
    """Nobody's request is at fault; a person has to look."""

    reason = "PERMANENT"


class IntegrityError(PermanentError):
    """Bytes are not what their manifest says."""

    reason = "INTEGRITY"


class StorageError(PermanentError):
    """The artefact store or the database cannot be used: wrong credentials, missing bucket, full disk, no right."""

    reason = "STORAGE_REFUSED"


class ClusterError(PermanentError):
    """The cluster refuses what the service asks of it: no right, a policy, an object that is somebody else's."""

    reason = "CLUSTER_REFUSED"


class InternalError(PermanentError):
    """A bug of ours."""

    reason = "INTERNAL"
