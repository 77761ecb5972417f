"""Hone: a fine-tuning service for shared GPU clusters.

`from hone import Client, AsyncClient, JobSpec`. Imports are lazy: `import hone` loads nothing but this file.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hone.rpc.client import AsyncClient, Client
    from hone.spec import JobSpec

__all__ = ["AsyncClient", "Client", "JobSpec", "__version__"]

_HOMES = {"AsyncClient": "hone.rpc.client", "Client": "hone.rpc.client", "JobSpec": "hone.spec"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hone' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
