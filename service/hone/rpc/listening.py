"""How a service listens: where, with which certificate, and who is let in. Called by server.py.

What other machines can reach has a certificate and asks who calls; there is no setting that makes it otherwise.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import grpc

from hone.errors import UserError
from hone.rpc.auth import CallerGate, Gate, TrainerGate
from hone.rpc.channel import is_local, split_address
from hone.rpc.tls import server_credentials
from hone.service import Service
from hone.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Who is let in; where there is no gate, everybody."""

    callers: Gate | None = None
    trainers: Gate | None = None


EVERYBODY = Gates()


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a service listens, and how."""

    address: str
    credentials: grpc.ServerCredentials | None
    """None: plain text."""
    asks: bool
    """Whether callers are asked who they are."""

    @staticmethod
    def of(settings: Settings) -> "Listening":
        """As the settings say. Raises UserError for an address that would let in anybody, or a wrong certificate."""
        address, cert, key = settings.address, settings.tls_cert, settings.tls_key
        if bool(cert) != bool(key):
            raise UserError("A certificate needs its key.", fix="Set both HONE_TLS_CERT and HONE_TLS_KEY, or none.")
        asks = settings.auth == "kubernetes" or (settings.auth == "" and not is_local(address))
        if not is_local(address) and not (asks and cert):
            raise _open_to_all(address)
        credentials = server_credentials(cert, key) if cert and key else None
        return Listening(address=address, credentials=credentials, asks=asks)

    @property
    def manner(self) -> str:
        """In words, for the log."""
        how = "with TLS" if self.credentials else "plain text"
        who = "for callers whom Kubernetes knows" if self.asks else "without authentication"
        return f"{how}, {who}, for this machine only" if is_local(self.address) else f"{how}, {who}"


@contextmanager
def open_gates(service: Service, listening: Listening) -> Iterator[Gates]:
    """The gates of a service. Raises ClusterError where callers are to be looked up and no cluster is configured."""
    if not listening.asks:
        yield EVERYBODY
        return
    from hone.backends.kubernetes.client import Api  # late: `hone run` needs no cluster
    from hone.rpc.reviews import ClusterReviews

    with closing(Api()) as api, ExitStack() as stack:
        reviews = ClusterReviews(api)
        callers, trainers = CallerGate(reviews), TrainerGate(reviews, service.backend.owner_of)
        for gate in (callers, trainers):
            stack.callback(gate.close)
        yield Gates(callers=callers, trainers=trainers)


def grpc_address(address: str) -> str:
    """An address as gRPC writes it. Raises UserError where it is none."""
    if address.startswith("unix:"):
        return address
    host, port = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _open_to_all(address: str) -> UserError:
    return UserError(
        f"{address} can be reached from other machines, and so needs a certificate and callers who are known.",
        fix="Set HONE_TLS_CERT and HONE_TLS_KEY (who calls is asked of Kubernetes); or listen on 127.0.0.1:7465, and "
        "let callers forward a port: ssh -L 7465:127.0.0.1:7465 <this machine>.",
    )
