"""`hone serve`: the service behind gRPC, until SIGTERM or Ctrl-C."""

from typing import Annotated

import typer

from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode


def serve(
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen. Default: HONE_ADDRESS, else 127.0.0.1:7465.")
    ] = "",
) -> int:
    """Serve the gRPC API, until SIGTERM or Ctrl-C. Runs that it started go on, and are found again at the next start.

    Everything else is set by HONE_* variables: HONE_HOME, HONE_STORE, HONE_DATABASE, …
    """
    import asyncio

    from hone.rpc.server import serve as serve_api

    settings = read_settings()
    if address:
        settings = settings.model_copy(update={"address": address})
    asyncio.run(serve_api(settings))
    return ExitCode.DONE
