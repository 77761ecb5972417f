"""Certificates for tests: an authority of their own, and what it signs."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Authority:
    """Signs; its certificate is `ca`."""

    place: Path

    @property
    def ca(self) -> Path:
        """What a client trusts."""
        return self.place / "ca.crt"

    def sign(self, cert: Path, key: Path, *, names: str = "DNS:localhost,IP:127.0.0.1", serial: int = 1) -> None:
        """Write a certificate for these names, and its key."""
        request = self.place / "request.pem"
        _openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=hone",
                 "-addext", f"subjectAltName={names}", "-keyout", key, "-out", request)  # fmt: skip
        _openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self.place / "ca.key", "-days", "2",
                 "-set_serial", str(serial), "-copy_extensions", "copyall", "-out", cert)  # fmt: skip


def authority(place: Path) -> Authority:
    """A new authority in a new directory."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    place.mkdir()
    found = Authority(place)
    _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", "/CN=test authority", "-addext", "basicConstraints=critical,CA:TRUE",
             "-keyout", place / "ca.key", "-out", found.ca)  # fmt: skip
    return found


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
