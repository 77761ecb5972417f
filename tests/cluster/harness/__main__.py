"""`python -m tests.cluster.harness up | down | images`: what `make cluster` and its like call."""

import argparse
import fcntl
import sys
import time

from . import cluster, images
from .failure import CannotStart
from .pki import kubeconfig
from .places import BIN, HOME, LOGS


def main() -> int:
    """Do one thing, alone on this machine."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.harness", description=__doc__)
    parser.add_argument("what", choices=("up", "down", "images"))
    what = parser.parse_args().what
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            {"up": _up, "down": cluster.down, "images": images.build}[what]()
        except CannotStart as error:
            sys.stderr.write(f"no cluster: {error}\n")
            return 1
    return 0


def _up() -> None:
    started = time.monotonic()
    cluster.up()
    sys.stdout.write(
        f"cluster: two nodes, S3 and PostgreSQL run ({time.monotonic() - started:.1f} s); logs in {LOGS}\n"
        f"export KUBECONFIG={kubeconfig('admin')} PATH={BIN}:$PATH\n"
        "next: .venv/bin/python -m pytest tests/cluster; `make cluster-down` ends it\n"
    )


if __name__ == "__main__":
    sys.exit(main())
