"""When the clients try again: only where the service is unavailable, and only so often."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from tenacity import retry_if_exception_type, stop_after_attempt, wait_random_exponential

from hone.errors import Unauthenticated, Unavailable
from hone.rpc.status import from_rpc_error

RECONNECTS = 20
UNIX_RECONNECTS = 3
"""A unix socket is mostly that of a service inside another command, and does not come back once that has ended."""
LONGEST_PAUSE_S = 4.0

CALLS: Mapping[str, Any] = {
    "retry": retry_if_exception_type(Unavailable),
    "stop": stop_after_attempt(5),
    "wait": wait_random_exponential(multiplier=0.4, max=2.0),
    "reraise": True,
}
"""Arguments of tenacity for one call: five tries over about four seconds."""


class Reconnects:
    """Tries of a watch that was cut: twenty in a row without an answer, over about a minute; few on a unix socket."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._limit = UNIX_RECONNECTS if address.startswith("unix:") else RECONNECTS
        self._failures = 0

    def succeeded(self) -> None:
        """An answer came."""
        self._failures = 0

    def pause_s(self, error: grpc.RpcError, *, has_new_token: bool = False) -> float:
        """How long to wait before the next try. Raises the typed error where another try is of no use."""
        meaning = from_rpc_error(error, address=self._address)
        self._failures += 1
        may_help = isinstance(meaning, Unavailable) or (has_new_token and isinstance(meaning, Unauthenticated))
        if not may_help or self._failures > self._limit:
            raise meaning from error
        return min(0.1 * 2.0**self._failures, LONGEST_PAUSE_S) * random.uniform(0.7, 1.3)


@contextmanager
def typed_errors(address: str) -> Iterator[None]:
    """gRPC's errors leave as those of hone.errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address=address) from error
