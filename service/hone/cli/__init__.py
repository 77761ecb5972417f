"""The command line: `hone run FILE`, `hone serve`, and the rest.

One module for each group of commands; app.py puts them together. Importing this package loads nothing heavy: grpc,
SQLAlchemy, boto3 and the spec are imported by the commands that need them.
"""


def main() -> None:
    """What the `hone` script calls; ends the process with one of the exit codes of failure.py."""
    import sys

    from hone.cli.app import run

    sys.exit(run())
