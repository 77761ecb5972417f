"""No connection that the request did not ask for.

Workers need no network: inputs are fetched before they start and outputs are sent after they ended, both by the
supervisor. The guard makes that a fact: a worker may talk to its peers, to the scorers that its request names, and to
nobody else; a library that tries is stopped with the address it wanted.
"""

import ipaddress
import socket
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed


def forbid_network(peers: Collection[str] = ()) -> None:
    """Refuse every socket.connect and name look-up but of loopback and `peers`, from now until the process ends.

    C++ code that opens sockets itself (gloo, NCCL) is not seen; it only connects to peers.
    """
    allowed = frozenset(peers) | {"localhost", socket.gethostname()}

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.connect":
            address = arguments[1]
            if isinstance(address, tuple) and not _is_allowed(str(address[0]), allowed):
                raise _refused(f"{address[0]}:{address[1]}")
        elif event == "socket.getaddrinfo" and arguments[0] and not _is_allowed(_text(arguments[0]), allowed):
            raise _refused(_text(arguments[0]))

    sys.addaudithook(hook)


def hosts(urls: Iterable[str]) -> set[str]:
    """Names and addresses of the hosts of URLs, as they are now: asked before the guard stands."""
    found = set()
    for url in urls:
        name = urlsplit(url).hostname or ""
        found.add(name)
        with suppress(OSError):  # whoever asks it says that it cannot be found
            found |= {str(address[4][0]) for address in socket.getaddrinfo(name, None)}
    return found


def _text(host: object) -> str:
    return host.decode() if isinstance(host, bytes) else str(host)


def _is_allowed(host: str, allowed: frozenset[str]) -> bool:
    if host in allowed:
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refused(address: str) -> RunFailed:
    return RunFailed(
        TrainerExit.INTERNAL, f"A library tried to connect to {address}, which the request did not ask for."
    )
