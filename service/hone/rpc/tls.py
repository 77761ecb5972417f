"""The service's certificate: from two files, read again when they change. Called by server.py.

A Secret that is mounted changes under a running process; a certificate that is renewed is served with the next
connection, without a restart. A pair that does not fit together is what one sees in the middle of such a change: the
one before it is served on.
"""

import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from hone.errors import UserError

_log = logging.getLogger(__name__)


def server_credentials(cert: Path, key: Path) -> grpc.ServerCredentials:
    """Credentials of a server that follows the files. Raises UserError when they cannot be used now."""
    pair = _Pair(cert, key)
    fetch: Any = pair.renewed  # None stands for no change, which the stubs do not know
    return grpc.dynamic_ssl_server_credentials(pair.first(), fetch, require_client_authentication=False)


class _Pair:
    """Certificate and key, as they were last read."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] = ()

    def first(self) -> grpc.ServerCertificateConfiguration:
        """What is served first."""
        self._seen = self._marks()
        return self._read()

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is served from now on; None where nothing changed. Called for each new connection."""
        with self._lock:
            try:
                seen = self._marks()
                if seen == self._seen:
                    return None
                renewed = self._read()
            except UserError as error:
                _log.warning("the certificate is not renewed: %s", error)
                return None
            self._seen = seen
            _log.info("serving the renewed certificate in %s", self._cert)
            return renewed

    def _marks(self) -> tuple[object, ...]:
        try:
            return tuple((stat.st_ino, stat.st_mtime_ns) for stat in (self._cert.stat(), self._key.stat()))
        except OSError as error:
            raise _unreadable(error) from error

    def _read(self) -> grpc.ServerCertificateConfiguration:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self._cert, self._key)
            cert, key = self._cert.read_bytes(), self._key.read_bytes()
        except ssl.SSLError as error:
            raise UserError(
                f"{self._cert} and {self._key} are no certificate with its key: {error.reason}.",
                fix="Both are PEM; the certificate's file holds the whole chain, the service's own first.",
            ) from error
        except OSError as error:
            raise _unreadable(error) from error
        return grpc.ssl_server_certificate_configuration([(key, cert)])


def _unreadable(error: OSError) -> UserError:
    return UserError(
        f"{error.filename} cannot be read: {error.strerror}.", fix="Correct HONE_TLS_CERT and HONE_TLS_KEY."
    )
