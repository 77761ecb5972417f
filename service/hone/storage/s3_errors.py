"""What S3 and botocore say, in sentences with a value and a fix. No secret is ever part of one.

The one place where foreign exceptions of s3:// become ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError

from hone.errors import HoneError, IntegrityError, NotFound, StorageError, StorageUnavailable


@dataclass(frozen=True, kw_only=True)
class Place:
    """What an operation is about, for its message."""

    bucket: str
    endpoint: str
    """URL, or `AWS`."""
    access_key: str
    """The id, which is no secret; empty when there is none."""
    url: str
    """`s3://bucket/key`."""


_RIGHTS = "s3:GetObject, PutObject, DeleteObject, ListBucket and AbortMultipartUpload on the bucket"
_KEYS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the keys of this server"

_TEMPORARY = frozenset(
    {
        *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestLimitExceeded"),
        *("Throttling", "ThrottlingException", "TooManyRequests", "ConditionalRequestConflict", "OperationAborted"),
        "PreconditionFailed",  # the object changed while it was read
        *("409", "429", "500", "502", "503", "504"),
    }
)
_ALTERED = frozenset({"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
_REFUSED = {
    "NoSuchBucket": (
        "there is no bucket {bucket!r} at {endpoint}.",
        "Create it, or correct the bucket in HONE_STORE or the endpoint in AWS_ENDPOINT_URL_S3.",
    ),
    "InvalidBucketName": ("{bucket!r} is no bucket name.", "Use 3 to 63 lower-case letters, digits, `.` and `-`."),
    "InvalidAccessKeyId": ("{endpoint} does not know access key {access_key!r}.", f"{_KEYS}."),
    "SignatureDoesNotMatch": ("the secret key is not the one of access key {access_key!r} at {endpoint}.", f"{_KEYS}."),
    "AccessDenied": (
        "access key {access_key!r} may not do this at {endpoint}.",
        f"Give it {_RIGHTS} {{bucket!r}}.",
    ),
    "ExpiredToken": ("the session token of access key {access_key!r} has expired.", "Renew the credentials."),
    "InvalidToken": ("{endpoint} refuses the session token of access key {access_key!r}.", "Renew AWS_SESSION_TOKEN."),
    "RequestTimeTooSkewed": (
        "the clocks of this machine and of {endpoint} differ too much.",
        "Set this machine's clock.",
    ),
    "PermanentRedirect": ("bucket {bucket!r} is in another region.", "Set AWS_REGION to the region of the bucket."),
    "QuotaExceeded": ("the quota of bucket {bucket!r} is used up.", "Free some space or raise the quota."),
    "NotImplemented": ("{endpoint} does not implement what Hone needs.", "Use a current version of the server."),
}
_SAME_AS = {
    "403": "AccessDenied",
    "Forbidden": "AccessDenied",
    "301": "PermanentRedirect",
    "AuthorizationHeaderMalformed": "PermanentRedirect",
    "XMinioStorageFull": "QuotaExceeded",
    "501": "NotImplemented",
    "TokenRefreshRequired": "ExpiredToken",
    "XAdminUserNotFound": "InvalidAccessKeyId",  # versitygw
}


@contextmanager
def s3_errors_as_storage(
    locate: Callable[[], Place],
    *,
    unmapped: tuple[type[Exception], ...] = (),
    unmapped_codes: frozenset[str] = frozenset(),
) -> Iterator[None]:
    """Map whatever botocore and s3transfer raise in the block; what is an answer to the caller passes as it is."""
    try:
        yield
    except unmapped:
        raise
    except ClientError as error:
        if code_of(error) in unmapped_codes:
            raise
        raise _from_answer(error, locate()) from error
    except (BotoCoreError, RetriesExceededError) as error:
        raise _from_library(error, locate()) from error


def _from_library(error: Exception, place: Place) -> HoneError:
    """No answer came: what botocore itself says."""
    match error:
        case boto.FlexibleChecksumError():
            return IntegrityError(f"{place.url}: its bytes do not have the checksum that the store keeps for it.")
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            return StorageError(f"{place.url}: there are no S3 credentials.", fix=f"{_KEYS}, or AWS_PROFILE.")
        case boto.CredentialRetrievalError() | boto.TokenRetrievalError() | boto.ProfileNotFound():
            return StorageError(f"{place.url}: S3 credentials cannot be had: {error}.", fix=f"{_KEYS}.")
        case boto.SSLError():
            return StorageError(
                f"{place.url}: the certificate of {place.endpoint} is not trusted.",
                fix="Set AWS_CA_BUNDLE to the certificate of its authority.",
            )
        case boto.ParamValidationError():
            return StorageError(f"{place.url} is not a valid S3 address.", fix="Check the bucket in HONE_STORE.")
        case boto.HTTPClientError() | boto.IncompleteReadError() | boto.ConnectionError() | RetriesExceededError():
            return StorageUnavailable(
                f"{place.url}: {place.endpoint} does not answer ({type(error).__name__}).",
                fix="Check that the server runs and that AWS_ENDPOINT_URL_S3 is its address.",
            )
    return StorageError(f"{place.url}: {error}.", fix="Check the AWS_* variables.")


def code_of(error: ClientError) -> str:
    """The error code of an answer; an answer without a body, as HEAD gives, has its HTTP status instead."""
    return str(error.response.get("Error", {}).get("Code", ""))


def answer_to_error(code: str, said: str, place: Place, *, status: int = 0) -> HoneError:
    """An error code of S3 as an error of ours."""
    code = _SAME_AS.get(code, code)
    if code in {"NoSuchKey", "404", "NotFound"}:
        return NotFound(f"{place.url} does not exist.")
    if code in _REFUSED:
        values = {"bucket": place.bucket, "endpoint": place.endpoint, "access_key": place.access_key}
        message, fix = (text.format(**values) for text in _REFUSED[code])
        return StorageError(f"{place.url}: {message}", fix=fix)
    if code in _TEMPORARY or status >= 500:
        return StorageUnavailable(f"{place.url}: {place.endpoint} answered {code}.", fix="Send it again later.")
    if code in _ALTERED:
        return IntegrityError(f"{place.url}: the bytes that arrived at {place.endpoint} are not those that were sent.")
    return StorageError(
        f"{place.url}: {place.endpoint} refused with {code}: {said}", fix="See the log of the S3 server."
    )


def _from_answer(error: ClientError, place: Place) -> HoneError:
    said = str(error.response.get("Error", {}).get("Message", ""))
    return answer_to_error(code_of(error), said, place, status=error.response["ResponseMetadata"]["HTTPStatusCode"])
