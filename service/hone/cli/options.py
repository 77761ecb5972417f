"""Arguments and options that several commands share, so that they are called and explained alike."""

from pathlib import Path
from typing import Annotated

import typer

_REQUEST = typer.Argument(metavar="FILE", help="The request: a YAML or JSON file; `hone spec` lists its fields.")
RequestFile = Annotated[Path, _REQUEST]
RequestFileOrNone = Annotated[Path | None, _REQUEST]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one field of the file, as training.epochs=2. Repeatable."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or its name while only one job has it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON with stable keys; sizes are integer bytes.")]
Server = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="The service to talk to, as 127.0.0.1:7465. Default: HONE_SERVER, else the `hone serve` that owns "
        "HONE_HOME, else this process.",
    ),
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace", "-n", metavar="NAME", help="The jobs' namespace. Default: HONE_NAMESPACE, else default."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
