"""An API server's refusals: each becomes the error whose type says what to do. Sentences are those of real servers."""

import json
from typing import Any

import pytest

from hone.backends.kubernetes.answers import (
    ApiUnavailable,
    Conflict,
    Expired,
    NotAdmitted,
    NotAuthenticated,
    NotValid,
    Refusal,
    error_of,
)
from hone.errors import AlreadyExists, ClusterError, HoneError, InternalError, NotFound

ACCOUNT = "system:serviceaccount:hone:hone"


def answer(code: int, reason: str, message: str, **details: Any) -> str:
    return json.dumps(
        {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message, "details": details}
    )


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (400, "BadRequest", NotValid),
        (401, "Unauthorized", NotAuthenticated),
        (404, "NotFound", NotFound),
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", Conflict),
        (410, "Expired", Expired),
        (413, "RequestEntityTooLarge", NotValid),
        (422, "Invalid", NotValid),
        (429, "TooManyRequests", ApiUnavailable),
        (500, "InternalError", ApiUnavailable),
        (503, "ServiceUnavailable", ApiUnavailable),
        (504, "Timeout", ApiUnavailable),
        (418, "Teapot", InternalError),
    ],
)
def test_every_code_has_its_type(code: int, reason: str, kind: type[HoneError]) -> None:
    assert type(error_of(code, answer(code, reason, "because"))) is kind


def test_what_asks_for_patience_says_for_how_long_and_whether_anything_was_done() -> None:
    slow = error_of(429, answer(429, "TooManyRequests", "slow down", retryAfterSeconds=7))
    asked = error_of(429, "", retry_after="3")
    broken = error_of(500, "upstream broke")
    assert isinstance(slow, ApiUnavailable) and (slow.pause_s, slow.was_not_done) == (7.0, True)
    assert isinstance(asked, ApiUnavailable) and asked.pause_s == 3.0
    assert isinstance(broken, ApiUnavailable) and not broken.was_not_done
    assert "upstream broke" in str(broken)


def test_a_missing_right_is_named_with_its_verb_its_resource_and_the_fix() -> None:
    message = (
        f'jobs.batch is forbidden: User "{ACCOUNT}" cannot create resource "jobs" in API group "batch" '
        'in the namespace "team-b"'
    )
    error = error_of(403, answer(403, "Forbidden", message))
    assert type(error) is ClusterError
    assert error.message == f"{ACCOUNT} has no right to create jobs.batch in namespace team-b."
    assert "Install the tenant chart in team-b" in error.fix
    assert f"kubectl auth can-i create jobs.batch -n team-b --as {ACCOUNT}" in error.fix


def test_a_missing_right_in_the_core_group_and_outside_namespaces_is_named_as_well() -> None:
    message = f'nodes is forbidden: User "{ACCOUNT}" cannot list resource "nodes" in API group "" at the cluster scope'
    error = error_of(403, answer(403, "Forbidden", message))
    assert str(error).startswith(f"{ACCOUNT} has no right to list nodes.")


@pytest.mark.parametrize(
    ("code", "message", "details", "refusal"),
    [
        (
            403,
            'jobs.batch "a-a1" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1, used: '
            "count/jobs.batch=2, limited: count/jobs.batch=2",
            {},
            Refusal.QUOTA,
        ),
        (
            403,
            'jobs.batch "a-a1" is forbidden: unable to create in namespace x because it is being terminated',
            {"causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]},
            Refusal.NAMESPACE,
        ),
        (400, 'admission webhook "check.example.com" denied the request: no cost label', {}, Refusal.POLICY),
        (
            422,
            "jobs.batch \"a-a1\" is forbidden: ValidatingAdmissionPolicy 'cost' with binding 'cost' denied request: "
            "no cost label",
            {},
            Refusal.POLICY,
        ),
        (403, 'pods "a" is forbidden: violates PodSecurity "restricted:latest": privileged', {}, Refusal.POLICY),
    ],
)
def test_what_admission_refuses_keeps_its_sentence_and_says_who_refused(
    code: int, message: str, details: dict[str, Any], refusal: Refusal
) -> None:
    error = error_of(code, answer(code, "Forbidden", message, **details))
    assert isinstance(error, NotAdmitted)
    assert (error.refusal, error.message) == (refusal, message)
    assert error.fix


def test_a_webhook_that_does_not_answer_is_temporary() -> None:
    message = 'Internal error occurred: failed calling webhook "check.example.com": connection refused'
    assert isinstance(error_of(500, answer(500, "InternalError", message)), ApiUnavailable)


def test_a_long_answer_is_cut() -> None:
    assert len(error_of(500, "x" * 10_000).message) < 700
