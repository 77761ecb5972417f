"""What an API server's refusals mean: its status codes and sentences as our errors. Pure; called by client.py."""

import json
import re
from enum import StrEnum
from typing import Any

from hone.errors import AlreadyExists, ClusterError, HoneError, InternalError, NotFound, TemporaryError, Unavailable

_NO_RIGHT = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"'
    r'(?: in API group "(?P<group>[^"]*)")?(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_MAX_SENTENCE = 600


class ApiUnavailable(Unavailable):
    """No answer, or one that asks for patience."""

    def __init__(self, message: str, *, fix: str = "", pause_s: float = 0.0, was_not_done: bool = False) -> None:
        self.pause_s = pause_s
        """How long the server asked to wait; 0 when it did not say."""
        self.was_not_done = was_not_done
        """Whether it is certain that nothing was changed."""
        super().__init__(message, fix=fix)


class NodeUnreachable(ApiUnavailable):
    """The API server answers, and the node whose log it was asked for does not."""


class NotAuthenticated(ApiUnavailable):
    """The token or certificate is not accepted, now; the next one may be."""


class Expired(TemporaryError):
    """410: what was asked for is no longer kept; list again."""


class Conflict(TemporaryError):
    """409: the object is another one than was meant, or changed meanwhile; look again."""


class Refusal(StrEnum):
    """What refused to admit an object."""

    QUOTA = "quota"
    POLICY = "policy"
    """A webhook or an admission policy of the platform, or Pod Security."""
    NAMESPACE = "namespace"
    """It is being deleted."""


class NotAdmitted(ClusterError):
    """Admission refused an object that the service may create. The sentence is the server's own."""

    def __init__(self, refusal: Refusal, sentence: str, *, fix: str = "") -> None:
        self.refusal = refusal
        super().__init__(sentence, fix=fix)


class NotValid(ClusterError):
    """400 or 422: the object cannot be, whoever asks."""


def error_of(code: int, text: str, *, retry_after: str | None = None) -> HoneError:
    """The error for an answer that is none of success."""
    status = _status(text)
    sentence = _sentence(status, text, code)
    if "admission webhook" in sentence and "denied the request" in sentence:  # with whatever code the webhook chose
        return NotAdmitted(Refusal.POLICY, sentence, fix=_POLICY_FIX)
    if code in (429, 500, 502, 503, 504):
        return _unavailable(code, sentence, status, retry_after)
    if code == 403:
        return _forbidden(sentence, status)
    if code == 422 and "ValidatingAdmissionPolicy" in sentence:
        return NotAdmitted(Refusal.POLICY, sentence, fix=_POLICY_FIX)
    if code == 409:
        taken = status.get("reason") == "AlreadyExists"
        return AlreadyExists(sentence) if taken else Conflict(sentence)
    if code == 401:
        return NotAuthenticated(
            f"The API server does not accept the service's credentials: {sentence}",
            fix="Look whether its service account still exists and whether its token was revoked; restart it then.",
        )
    kind = {404: NotFound, 410: Expired, 400: NotValid, 413: NotValid, 422: NotValid}.get(code)
    return kind(sentence) if kind else InternalError(f"The API server answered {code}: {sentence}")


_POLICY_FIX = "Ask who runs the cluster: the policy, or cluster.* of the chart's values, has to change."


def _unavailable(code: int, sentence: str, status: dict[str, Any], retry_after: str | None) -> ApiUnavailable:
    asked = retry_after or str(status.get("details", {}).get("retryAfterSeconds", ""))
    pause_s = float(asked) if asked.isdigit() else 0.0
    if "/containerLogs/" in sentence:
        return NodeUnreachable(f"The node that has the log does not answer: {sentence}")
    what = "asks to slow down" if code == 429 else f"cannot answer now ({code})"
    return ApiUnavailable(f"The API server {what}: {sentence}", pause_s=pause_s, was_not_done=code == 429)


def _forbidden(sentence: str, status: dict[str, Any]) -> HoneError:
    if match := _NO_RIGHT.search(sentence):
        return _no_right(match)
    causes = {cause.get("reason") for cause in status.get("details", {}).get("causes") or ()}
    if "NamespaceTerminating" in causes or "is being terminated" in sentence:
        return NotAdmitted(Refusal.NAMESPACE, sentence, fix="Use a namespace that stays.")
    if "exceeded quota" in sentence or "failed quota" in sentence:
        return NotAdmitted(
            Refusal.QUOTA,
            sentence,
            fix="It is tried again; end or delete what is not needed, or have the quota raised.",
        )
    return NotAdmitted(Refusal.POLICY, sentence, fix=_POLICY_FIX)


def _no_right(match: re.Match[str]) -> ClusterError:
    user, verb, resource, group, namespace = match.group("user", "verb", "resource", "group", "namespace")
    what = f"{resource}.{group}" if group else resource
    where = f" in namespace {namespace}" if namespace else ""
    asks = f"kubectl auth can-i {verb} {what}{f' -n {namespace}' if namespace else ''} --as {user}"
    fix = f"Install the tenant chart in {namespace}" if namespace else "Upgrade the service's chart"
    return ClusterError(
        f"{user} has no right to {verb} {what}{where}.", fix=f"{fix}, which gives that right; `{asks}` asks for it."
    )


def _status(text: str) -> dict[str, Any]:
    try:
        status = json.loads(text)
    except ValueError:
        return {}
    return status if isinstance(status, dict) and status.get("kind") == "Status" else {}


def _sentence(status: dict[str, Any], text: str, code: int) -> str:
    sentence = str(status.get("message") or text).strip() or f"no text, code {code}"
    return sentence if len(sentence) <= _MAX_SENTENCE else sentence[: _MAX_SENTENCE - 1] + "…"
