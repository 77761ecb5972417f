"""The client's half of who may: its token, and the authority whose service it trusts.

A service that others than this machine can reach speaks TLS only, so nothing here can send a token in the clear.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from hone.errors import UserError
from hone.rpc.channel import MACHINE_KEY, channel_options, is_local, machine_id

TOKEN_KEY = "authorization"


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a client says who calls, and how it knows the service."""

    token: str = ""
    token_file: Path | None = None
    """Read for each call: what is in it may be renewed. `token` comes first."""
    tls_ca: Path | None = None
    """Certificates of authorities, PEM; without them the usual ones, and plain text on this machine."""
    tls_server_name: str = ""
    """Name that the service's certificate has to carry, where it is reached by another (a forwarded port)."""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call. Raises UserError when the token cannot be read."""
        token = self.current_token()
        return ((MACHINE_KEY, machine_id()), *(((TOKEN_KEY, f"Bearer {token}"),) if token else ()))

    def current_token(self) -> str:
        """The token as it is now; empty without one."""
        if self.token or self.token_file is None:
            return self.token
        token = _read(self.token_file, "HONE_TOKEN_FILE").decode("ascii", "replace").strip()
        if not token.isascii() or not token.isprintable() or " " in token:
            raise UserError(f"{self.token_file} holds no token.", fix="Write one there, or correct HONE_TOKEN_FILE.")
        return token

    def open(self, address: str) -> grpc.Channel:
        """A connection for threads."""
        credentials, options = self._how(address)
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    def open_aio(self, address: str) -> grpc.aio.Channel:
        """A connection for an event loop."""
        credentials, options = self._how(address)
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _how(self, address: str) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
        options: list[tuple[str, Any]] = list(channel_options(address))
        if is_local(address) and self.tls_ca is None:
            return None, options
        if self.tls_server_name:
            options.append(("grpc.ssl_target_name_override", self.tls_server_name))
        roots = _read(self.tls_ca, "HONE_TLS_CA") if self.tls_ca else None
        return grpc.ssl_channel_credentials(root_certificates=roots), options


def default_access(*, token: str = "", tls_ca: Path | str | None = None) -> Access:
    """What is given, and for the rest HONE_TOKEN, HONE_TOKEN_FILE, HONE_TLS_CA and HONE_TLS_SERVER_NAME."""
    return Access(
        token=token or os.environ.get("HONE_TOKEN", ""),
        token_file=_path(os.environ.get("HONE_TOKEN_FILE")),
        tls_ca=_path(str(tls_ca) if tls_ca else os.environ.get("HONE_TLS_CA")),
        tls_server_name=os.environ.get("HONE_TLS_SERVER_NAME", ""),
    )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _read(path: Path, variable: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", fix=f"Correct {variable}.") from error
