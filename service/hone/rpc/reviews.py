"""The two questions of auth.py, as an API server answers them: TokenReview and SubjectAccessReview."""

from collections.abc import Mapping
from typing import Any

from hone.backends.kubernetes.client import Api, path_of
from hone.rpc.auth import TokenInfo

_TOKENS = path_of("tokenreviews", group="authentication.k8s.io/v1")
_RIGHTS = path_of("subjectaccessreviews", group="authorization.k8s.io/v1")


class ClusterReviews:
    """Asked with the service's own rights (`create` of both reviews). Raises what Api raises."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def review_token(self, token: str, audience: str) -> TokenInfo | None:
        """Whose the token is, when it is accepted for that audience."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        status = self._api.create(_TOKENS, body).get("status", {})
        # An authenticator that knows no audiences leaves them out, and its tokens are good for anything: not for us.
        if not status.get("authenticated") or audience not in status.get("audiences", ()):
            return None
        return _info(status.get("user", {}))

    def may(self, who: TokenInfo, verb: str, namespace: str) -> bool:
        """Whether they may do that with Jobs there."""
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": who.user,
                "uid": who.uid,
                "groups": list(who.groups),
                "extra": {key: list(values) for key, values in who.extra.items()},
                "resourceAttributes": {"namespace": namespace, "verb": verb, "group": "batch", "resource": "jobs"},
            },
        }
        return bool(self._api.create(_RIGHTS, body).get("status", {}).get("allowed"))


def _info(user: Mapping[str, Any]) -> TokenInfo:
    return TokenInfo(
        user=user.get("username", ""),
        uid=user.get("uid", ""),
        groups=tuple(user.get("groups") or ()),
        extra={key: tuple(values) for key, values in (user.get("extra") or {}).items()},
    )
