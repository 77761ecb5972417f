"""`hone serve` for bench.py, whose Jobs are suspended from the start, as Kueue's webhook makes them where Kueue is.

Only what it renders is changed, by one field; nothing else of the service is.
"""

import asyncio
from typing import Any

from hone.backends.kubernetes import backend
from hone.rpc.server import serve
from hone.settings import Settings

_render = backend.render_job


def _suspended(*arguments: Any, **options: Any) -> dict[str, Any]:
    job = _render(*arguments, **options)
    job["spec"]["suspend"] = True
    return job


if __name__ == "__main__":
    backend.render_job = _suspended
    asyncio.run(serve(Settings()))
