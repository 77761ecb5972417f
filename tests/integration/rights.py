"""What an API server says about callers, kept in memory: for what a real one cannot be made to say at the right moment.

tests/cluster/test_auth.py asks a real one.
"""

import time
from dataclasses import dataclass, field

from hone.rpc.auth import TokenInfo

ALICE = TokenInfo(user="alice", groups=("team-a",))
TRAINER = TokenInfo(
    user="system:serviceaccount:team-a:hone-trainer",
    extra={
        "authentication.kubernetes.io/pod-name": ("demo-a2-0-x7k2p",),
        "authentication.kubernetes.io/pod-uid": ("uid-1",),
    },
)


@dataclass
class Cluster:
    """What an API server knows, and how often it was asked; it may be away, slow, or refuse the service itself."""

    tokens: dict[tuple[str, str], TokenInfo] = field(default_factory=dict)
    rights: set[tuple[str, str, str]] = field(default_factory=set)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    error: Exception | None = None
    pause_s: float = 0.0
    attempt: "Attempt | None" = None
    """Of the trainer's pod; without it, attempt 2."""

    def review_token(self, token: str, audience: str) -> TokenInfo | None:
        self._answer("token", token, audience)
        return self.tokens.get((token, audience))

    def may(self, who: TokenInfo, verb: str, namespace: str) -> bool:
        self._answer("may", who.user, verb, namespace)
        return (who.user, verb, namespace) in self.rights

    def owner_of(self, namespace: str, pod: str, uid: str) -> "Attempt | None":
        self._answer("owner", namespace, pod, uid)
        return (self.attempt or Attempt()) if (namespace, pod, uid) == ("team-a", "demo-a2-0-x7k2p", "uid-1") else None

    def _answer(self, *question: str) -> None:
        self.asked.append(question)
        time.sleep(self.pause_s)
        if self.error:
            raise self.error


@dataclass(frozen=True)
class Attempt:
    namespace: str = "team-a"
    job: str = "demo"
    attempt: int = 2
