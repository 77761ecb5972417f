"""One of several processes on the same database: `store_writer.py URL JOB WHAT …`. What it says goes to stdout.

open                tells nothing; the schema is brought up to date
tell COUNT          that many events, a transaction each
lead HOLDER TTL     takes the lease and tells events under it until it is lost
hold HOLDER TTL     the same, but stays inside its first transaction
"""

import sys
import time
from datetime import UTC, datetime

from hone.errors import Unavailable
from hone.job import EventType
from hone.store import LeaseLost, Store


def main() -> int:
    """Do it. 3: the lease was lost; 4: the transaction was."""
    url, job, what, *arguments = sys.argv[1:]
    store = Store(url)
    say("open")
    if what == "tell":
        for number in range(int(arguments[0])):
            tell(store, job, f"{arguments[1]} {number}")
        return 0
    return 0 if what == "open" else lead(store, job, arguments[0], float(arguments[1]), holds=what == "hold")


def lead(store: Store, job: str, holder: str, ttl_s: float, *, holds: bool) -> int:
    """Take the lease, write under it, never renew it."""
    lease = store.lease(holder, ttl_s=ttl_s)
    while (epoch := lease.take()) is None:
        time.sleep(0.05)
    own = store.fenced(lease.check(epoch))
    say(f"epoch {epoch}")
    try:
        for number in range(100_000):
            tell(own, job, f"{holder} {number}", pause_s=60 if holds else 0)
            say(f"told {number}")
            time.sleep(0.01)
    except LeaseLost:
        say("lost")
        return 3
    except Unavailable as error:
        say(f"undone: {error}")
        return 4
    return 0


def tell(store: Store, job: str, message: str, *, pause_s: float = 0.0) -> None:
    """One event in a transaction of its own."""
    with store.change("default", job, now=datetime.now(UTC)) as change:
        change.tell(EventType.NOTE, message)
        if pause_s:
            say("inside")
            time.sleep(pause_s)


def say(line: str) -> None:
    """Tell the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
