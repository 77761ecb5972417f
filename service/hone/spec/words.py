"""Words that Kubernetes and the network take: names, keys of labels, images, addresses. Each type refuses the rest.

Used by the platform's configuration (hone.cluster); the sentences hold the value and the fix.
"""

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

OWN_PREFIXES = ("hone.dev/", "app.kubernetes.io/", "batch.kubernetes.io/", "kueue.x-k8s.io/")
"""Labels and annotations below these are set by Hone, Kubernetes and Kueue alone."""
OWN_LABELS = ("job-name", "controller-uid")
"""Labels that the Job controller sets besides."""

_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._-]*(:[0-9]+)?(/[a-z0-9._-]+)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\]")
_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.%-]+)*/?|file:///[^\s?#]+")
_OWN_VARIABLE = re.compile(
    r"(HONE_|AWS_|POD_|PYTHON).*|JOB_COMPLETION_INDEX|HOME|USER|PATH|TMPDIR|HF_(HOME|TOKEN|ENDPOINT)|"
    r"(https?|no)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|GRPC_DEFAULT_SSL_ROOTS_FILE_PATH|\w+_CACHE_DIR",
    re.IGNORECASE,
)


def _object_name(value: str) -> str:
    if len(value) > 253 or not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a Kubernetes name: lower-case letters, digits, '-' and '.'")
    return value


def _namespace(value: str) -> str:
    if len(value) > 63 or not re.fullmatch(_LABEL, value):
        raise ValueError(f"{value!r} is not a namespace: at most 63 lower-case letters, digits and hyphens")
    return value


def _data_key(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", value) or value in (".", ".."):
        raise ValueError(f"{value!r} is not a key of a Secret or ConfigMap: letters, digits, '-', '_' and '.'")
    return value


def _key(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if (
        len(name) > 63
        or not _QUALIFIED.fullmatch(name)
        or (slash and (len(prefix) > 253 or not _NAME.fullmatch(prefix)))
    ):
        raise ValueError(f"{value!r} is not a key: write name, or example.com/name with at most 63 after the slash")
    return value


def _free_key(value: str) -> str:
    if value.startswith(OWN_PREFIXES) or value in OWN_LABELS:
        raise ValueError(f"{value!r} is set by Hone, Kubernetes or Kueue: choose another key")
    return _key(value)


def _image(value: str) -> str:
    if not _IMAGE.fullmatch(value):
        raise ValueError(f"{value!r} is not an image: write registry.example.com/team/hone-trainer@sha256:…")
    return value


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{value!r} is not an address: write host:port, as in hone.hone-system.svc:7465")
    return value


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or " " in value:
        raise ValueError("this is not an http:// or https:// address without user-info")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError(f"{value!r} is not the name of an environment variable")
    if _OWN_VARIABLE.fullmatch(value):
        raise ValueError(f"{value!r} is set by Hone: another field of this file decides it")
    return value


def _store(value: str) -> str:
    if not _STORE.fullmatch(value) or "/../" in f"{value}/":
        raise ValueError("this is not the address of a store: write s3://bucket/prefix")
    return value


def _bytes(value: Any) -> Any:
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT])i\s*", value) if isinstance(value, str) else None
    if isinstance(value, bool):
        raise ValueError("is true or false where a number is expected")
    return int(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1) if match else value


ObjectName = Annotated[str, AfterValidator(_object_name)]
Namespace = Annotated[str, AfterValidator(_namespace)]
DataKey = Annotated[str, AfterValidator(_data_key)]
Key = Annotated[str, AfterValidator(_key)]
FreeKey = Annotated[str, AfterValidator(_free_key)]
Image = Annotated[str, AfterValidator(_image)]
Address = Annotated[str, AfterValidator(_address)]
Url = Annotated[str, AfterValidator(_url)]
Variable = Annotated[str, AfterValidator(_variable)]
StoreUri = Annotated[str, AfterValidator(_store)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
"""Whole bytes, or as Kubernetes writes them: 512Mi, 64Gi."""
