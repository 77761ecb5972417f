"""Who may: callers by their bearer token and Kubernetes' own rules, trainers by the token of their pod.

Called by services.py around every call, before anything of a request is looked at; so a refusal is the same whether
what was asked for exists or not. Kubernetes decides: a TokenReview says who calls, a SubjectAccessReview whether they
may create (or get, or list) Jobs in the namespace. A caller's token and a pod's have different audiences, so neither
can stand for the other. No answer and no fresh one before it is UNAVAILABLE, never a refusal.

Tokens are kept nowhere: answers are remembered under their digests.
"""

import base64
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from hone.errors import HoneError, InvalidRequest, Refused, Unauthenticated, Unavailable, Violation
from hone.rpc.access import TOKEN_KEY
from hone.rpc.answers import Answers

CALLERS = "hone"
"""Audience of a caller's token."""
TRAINERS = "hone-report"
"""Audience of the token that a trainer's pod is given."""
VERBS: Mapping[str, str] = {
    "PlanJob": "create",
    "PreflightJob": "create",
    "CreateJob": "create",
    "GetJob": "get",
    "ListJobs": "list",
    "CancelJob": "create",
    "PauseJob": "create",
    "ResumeJob": "create",
    "DeleteJob": "create",
    "WatchJob": "get",
    "WatchJobs": "list",
    "StreamLogs": "get",
    "ListEvents": "list",
    "QueryMetrics": "get",
    "ListCheckpoints": "get",
    "ListOutputs": "get",
}
"""RPC → what a caller must be allowed to do with Jobs in the namespace."""
caller: ContextVar[str] = ContextVar("caller", default="")
"""Who makes the call that is being served, as Kubernetes calls them; empty where nobody is asked."""
SUBJECTS = ("parent", "name", "job")
"""The field of a request that names what it is about: the first of these that it has."""
_NAMESPACE = re.compile(r"namespaces/([^/]+)(?:/|$)")
_THREADS = 4
POD_TOKEN = {"kept_s": 3600.0, "again_s": 1800.0}
"""How long the answer to a pod's token is believed. The token is worth no more than its pod, and whether that is still
there the backend tells of what it has seen; asked each minute, a thousand pods would be most of what the API server
hears of the service."""
_COMPLAINS_EVERY_S = 30.0
_log = logging.getLogger(__name__)
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """Whose a token is, as the API server says."""

    user: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Reviews(Protocol):
    """The two questions to the API server. Both raise Unavailable, or ClusterError, when it does not answer them."""

    def review_token(self, token: str, audience: str) -> TokenInfo | None:
        """Whose the token is; None when it is not accepted for that audience."""

    def may(self, who: TokenInfo, verb: str, namespace: str) -> bool:
        """Whether they may do that with Jobs in the namespace."""


class Owner(Protocol):
    """The attempt that a pod belongs to."""

    @property
    def namespace(self) -> str: ...
    @property
    def job(self) -> str: ...
    @property
    def attempt(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody whose token is good."""

    digest: bytes
    info: TokenInfo


class Gate(Protocol):
    """Lets a call pass, or raises."""

    async def identify(self, metadata: Mapping[str, Any]) -> Caller:
        """Who calls. Raises Unauthenticated, or Unavailable when nobody can tell."""

    async def permit(self, who: Caller, method: str, request: Any) -> None:
        """Whether they may make this call. Raises Refused, or Unavailable when nobody can tell."""

    def close(self) -> None:
        """No more calls come."""


class CallerGate:
    """People and programs: by what they may do with Jobs in the namespace."""

    def __init__(self, reviews: Reviews, **times: float) -> None:
        """`times` are those of Answers, for tests."""
        self._reviews = reviews
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hone-auth")
        self._tokens: Answers[TokenInfo | None] = Answers(self._threads, **times)
        self._rights: Answers[bool] = Answers(self._threads, **times)

    async def identify(self, metadata: Mapping[str, Any]) -> Caller:
        """Who calls."""
        return await _identify(self._tokens, self._reviews, metadata, CALLERS)

    async def permit(self, who: Caller, method: str, request: Any) -> None:
        """Whether they may do that with Jobs in the request's namespace."""
        namespace = namespace_of(request)
        verb = _verb(method, request)
        allowed = await self._rights.get(
            (who.digest, verb, namespace), _asked(lambda: self._reviews.may(who.info, verb, namespace))
        )
        if not allowed:
            raise Refused(
                f"{who.info.user} may not {verb} Jobs in namespace {namespace!r}.",
                fix=f"Ask who runs the namespace; `kubectl auth can-i {verb} jobs.batch -n {namespace}` tells.",
            )

    def close(self) -> None:
        """No more calls come."""
        self._threads.shutdown(wait=False)


class TrainerGate:
    """Trainers: each pod for the job and the attempt that it belongs to, and for nothing else."""

    def __init__(self, reviews: Reviews, owner_of: Callable[[str, str, str], Owner | None], **times: float) -> None:
        """`owner_of(namespace, pod, uid)` is the backend's word on whose a pod is: nobody's once it is gone."""
        self._reviews = reviews
        self._owner_of = owner_of
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hone-auth-report")
        self._tokens: Answers[TokenInfo | None] = Answers(self._threads, **{**POD_TOKEN, **times})
        self._owners: Answers[Owner | None] = Answers(self._threads, **times)

    async def identify(self, metadata: Mapping[str, Any]) -> Caller:
        """Which pod reports."""
        return await _identify(self._tokens, self._reviews, metadata, TRAINERS)

    async def permit(self, who: Caller, method: str, request: Any) -> None:
        """Whether the report is about the pod's own attempt."""
        namespace, pod, uid = _pod(who.info)
        owner = await self._owners.get((namespace, pod, uid), _asked(lambda: self._owner_of(namespace, pod, uid)))
        if owner is None or _names(owner) != (request.job, request.attempt):
            raise Refused(
                f"Pod {pod} may not report for {request.job}, attempt {request.attempt}.",
                fix="A pod reports for the job and the attempt that it runs.",
            )

    def close(self) -> None:
        """No more calls come."""
        self._threads.shutdown(wait=False)


def namespace_of(request: Any) -> str:
    """The namespace that a request is about. Raises InvalidRequest where it names none."""
    field = next(name for name in SUBJECTS if name in request.DESCRIPTOR.fields_by_name)
    text = getattr(request, field)
    if match := _NAMESPACE.match(text):
        return match[1]
    message = f"{text[:80]!r} names no namespace: it begins with namespaces/{{namespace}}."
    raise InvalidRequest([Violation(path=field, value=text[:80], message=message)])


def _verb(method: str, request: Any) -> str:
    """Listing the events of one job is reading that job."""
    return "get" if method == "ListEvents" and "/jobs/" in request.parent else VERBS[method]


async def _identify(
    tokens: "Answers[TokenInfo | None]", reviews: Reviews, metadata: Mapping[str, Any], audience: str
) -> Caller:
    token = _bearer(metadata)
    digest = hashlib.sha256(token.encode()).digest()
    info = await tokens.get(digest, _asked(lambda: reviews.review_token(token, audience)))
    if info is None or _seconds_left(token) <= 0:
        raise Unauthenticated(
            f"The token is not accepted: it has expired, was revoked, or is not of the audience {audience!r}.",
            fix=f"Make a new one: kubectl create token <account> -n <namespace> --audience {audience}",
        )
    return Caller(digest=digest, info=info)


def _bearer(metadata: Mapping[str, Any]) -> str:
    """The token of a call."""
    kind, _, token = str(metadata.get(TOKEN_KEY, "")).partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise Unauthenticated(
            "This service wants to know who calls, and no bearer token came.",
            fix="Set HONE_TOKEN_FILE (or HONE_TOKEN): kubectl create token <account> -n <namespace> --audience hone",
        )
    return token.strip()


def _seconds_left(token: str) -> float:
    """How long a token that was accepted lasts, by its own word; for ever where it does not say."""
    try:
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        return float(claims["exp"]) - time.time()
    except (ValueError, LookupError, TypeError):
        return math.inf


def _asked(ask: Callable[[], Any]) -> Callable[[], Any]:
    """A question whose every failure is that nobody can tell now: no caller is to blame for it, and no stranger is told
    why."""

    def question() -> Any:
        try:
            return ask()
        except HoneError as error:
            _complaint.tell(str(error))
            raise Unavailable(
                "Who calls, and what they may, cannot be looked up now.",
                fix="Try again; the service's log and its /readyz say why.",
            ) from error

    return question


class _Complaint:
    """Why nobody can be looked up: logged when it changes, and once in a while, however many ask."""

    def __init__(self) -> None:
        self._text = ""
        self._told_at = -math.inf

    def tell(self, text: str) -> None:
        """Log it, unless that was just done."""
        if text != self._text or time.monotonic() - self._told_at > _COMPLAINS_EVERY_S:
            self._text, self._told_at = text, time.monotonic()
            _log.warning("callers cannot be looked up: %s", text)


_complaint = _Complaint()


def _pod(info: TokenInfo) -> tuple[str, str, str]:
    """Namespace, name and uid of the pod that a token is bound to."""
    _, _, account = info.user.partition("system:serviceaccount:")
    pod, uid = (next(iter(info.extra.get(key, ())), "") for key in (_POD_NAME, _POD_UID))
    if not account or not pod or not uid:
        raise Refused("The token is of no pod.", fix="Only the token that the pod of a trainer is given can report.")
    return account.partition(":")[0], pod, uid


def _names(owner: Owner) -> Sequence[Any]:
    return f"namespaces/{owner.namespace}/jobs/{owner.job}", owner.attempt
