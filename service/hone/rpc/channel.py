"""What both ends agree on: addresses, sizes, keepalive, and how a caller's machine is told from the service's."""

import hashlib
import ipaddress
import os
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from hone.errors import Unavailable, UserError

MACHINE_KEY = "hone-machine"
"""Metadata key under which a client sends machine_id()."""
MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024
KEEPALIVE_S = 30
"""A client asks so often whether the other end is still there; published in docs/api.md, more often is refused."""
KEEPALIVE_TIMEOUT_S = 10

_Options = list[tuple[str, int]]


def channel_options(address: str) -> _Options:
    """Options of a client's channel."""
    options = [
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.enable_retries", 0),  # the client retries, by error type, in one place
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def server_options() -> _Options:
    """Options of the server."""
    return [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_S * 1000 // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),  # or a second service would share the port without a word
    ]


def default_server() -> str:
    """HONE_SERVER, else the service of this machine that owns HONE_HOME. Raises Unavailable when there is neither."""
    if server := os.environ.get("HONE_SERVER"):
        return server
    try:
        from hone.home import owner
        from hone.settings import Settings
    except ImportError:  # only the client is installed
        owned = None
    else:
        owned = owner(Settings().home)
    if owned is None or not owned.address:
        raise Unavailable("No Hone service is known here.", fix="Start `hone serve`, or set HONE_SERVER to host:port.")
    return owned.address


def default_namespace() -> str:
    """HONE_NAMESPACE, else `default`."""
    return os.environ.get("HONE_NAMESPACE") or "default"


def is_local(address: str) -> bool:
    """Whether an address to listen on, or to connect to, can only be reached from this machine."""
    if address.startswith("unix:"):
        return True
    host = split_address(address)[0]
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises UserError."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{address!r} is not an address.", fix="Write host:port, as in 127.0.0.1:7465.")
    return host, int(port)


@lru_cache
def machine_id() -> str:
    """The same for every process that sees this machine's files, and another elsewhere.

    The kernel's boot id tells machines apart, the host name containers on one machine.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = f"{boot.read_text() if boot.exists() else ''}/{socket.gethostname()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_on_this_machine(peer: str, machine: str | None) -> bool:
    """Whether the caller's files are ours: by the machine id that a client of Hone sends, which a tunnel does not
    change, and by its address, as gRPC writes it (`ipv4:127.0.0.1:53412`, `ipv6:[::1]:53412`, `unix:…`)."""
    if machine is not None and machine != machine_id():
        return False
    family, _, address = unquote(peer).partition(":")
    if family == "unix":
        return True
    try:
        return _is_own(split_address(address)[0])
    except (UserError, ValueError):
        return False


def _is_own(host: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound to."""
    address = ipaddress.ip_address(host.partition("%")[0])
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
