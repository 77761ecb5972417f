"""Hone from another Python service: submit a request, follow it, fetch what it left.

    python examples/client.py examples/quickstart.yaml out

Talks to HONE_SERVER, else to the `hone serve` of this machine.
"""

import sys
from pathlib import Path

from hone import Client
from hone.errors import HoneError, InvalidRequest


def main(request: str, directory: str) -> int:
    """Run a request to its end."""
    with Client() as client:
        job = client.submit(request)
        print(f"{job.id}: {job.plan.sentence}")
        for event in client.watch(job.id):
            if "loss" in event.metrics:
                print(f"step {event.step}: loss {event.metrics['loss']:.3f}")
        job = client.get(job.id)
        if job.failure:
            print(f"{job.state}: {job.failure.message} {job.failure.next_step}")
            return 1
        for path in client.download(job.id, Path(directory)):
            print(f"in {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:3]))
    except InvalidRequest as error:
        sys.exit("\n".join(str(violation) for violation in error.violations))
    except HoneError as error:
        sys.exit(str(error))
