"""The service that a command talks to: the one that was named, else the one that owns HONE_HOME, else this process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.cli.environment import read_settings
from hone.errors import Unavailable

if TYPE_CHECKING:
    from hone.rpc.client import Client


@dataclass(frozen=True)
class Connection:
    """A client, and where the other end is."""

    client: "Client"
    in_this_process: bool
    """The service ends with this command; runs that it started go on by themselves."""


@contextmanager
def connect(server: str, namespace: str) -> Iterator[Connection]:
    """A client of that service; closed at the end, and so is a service of our own."""
    from hone.rpc.client import Client

    read_settings()  # a variable that cannot be read is told before anything starts
    with ExitStack() as stack:
        try:
            client, own = Client(server, namespace=namespace), False
        except Unavailable:
            if server:
                raise
            client, own = Client(_own_service(stack), namespace=namespace), True
        yield Connection(stack.enter_context(client), own)


def _own_service(stack: ExitStack) -> str:
    from hone.rpc.server import LocalService

    return stack.enter_context(LocalService()).address
