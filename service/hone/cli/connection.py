"""The service that a command talks to: the one that was named, else the one that owns HONE_HOME, else this process."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hone.cli.console import remarks
from hone.cli.environment import read_settings
from hone.errors import Unavailable, WrongState

if TYPE_CHECKING:
    from hone.job import Event, Job
    from hone.rpc.client import Client

OWNER_STARTS_S = 5.0
"""How long another service may take from owning HONE_HOME to listening."""


class Connection:
    """A client, and where its other end is."""

    def __init__(self, server: str, namespace: str) -> None:
        self._server = server or read_settings().server
        self._namespace = namespace
        self._stack = ExitStack()
        self.in_this_process = False
        """The service ends with this command; runs that it started go on by themselves."""
        with remarks().status("opening the service …"):
            self.client = self._open()

    def watch(self, job_id: str) -> Iterator["Event"]:
        """The job's events to its end, none missed and none doubled, also when the service moves.

        A command without a server may talk to the service inside another command; when that one ends, this one goes on
        with a service of its own.
        """
        seq = 0
        while True:
            try:
                for event in self.client.watch(job_id, after_seq=seq):
                    seq = event.seq
                    yield event
                return
            except Unavailable:
                if self._server:
                    raise
                self._move()

    def get(self, job_id: str) -> "Job":
        """The job, also when the service moves."""
        try:
            return self.client.get(job_id)
        except Unavailable:
            if self._server:
                raise
            self._move()
            return self.client.get(job_id)

    def close(self) -> None:
        """Close the client, and a service of our own."""
        self._stack.close()

    def _move(self) -> None:
        """To the service that owns HONE_HOME now, or to one of our own."""
        self._stack.close()
        self.client = self._open()

    def _open(self) -> "Client":
        from hone.rpc.client import Client

        deadline = time.monotonic() + OWNER_STARTS_S
        while True:
            try:
                client = Client(self._server or self._owner_or_self(), namespace=self._namespace)
                return self._stack.enter_context(client)
            except WrongState:  # another service took HONE_HOME meanwhile and will listen soon
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _owner_or_self(self) -> str:
        from hone.home import owner

        found = owner(read_settings().home)
        if found and found.address:
            return found.address
        from hone.rpc.server import LocalService

        service = self._stack.enter_context(LocalService())
        self.in_this_process = True
        return service.address


@contextmanager
def connect(server: str, namespace: str) -> Iterator[Connection]:
    """A connection for the length of the block."""
    connection = Connection(server, namespace)
    try:
        yield connection
    finally:
        connection.close()
