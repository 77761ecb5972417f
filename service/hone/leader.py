"""Reconciles while this service leads, and not otherwise; for services that share a PostgreSQL.

Started by service.py. A thread takes the lease, holds it, and starts and stops a reconciler with it. What that one
writes is fenced by the lease's epoch, so that it does not matter how late this process hears that it lost it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from hone.errors import HoneError
from hone.store import Lease, Store

TRIES_PER_TTL = 3

_log = logging.getLogger(__name__)


class Reconciling(Protocol):
    """What is done by the leader alone."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End after what is under way."""


class Leader:
    """One candidate."""

    def __init__(self, store: Store, lease: Lease, make: Callable[[Store], Reconciling]) -> None:
        """`make` gives what is to be done under the lease; it writes through the store that it is given."""
        self._store = store
        self._lease = lease
        self._make = make
        self._work: Reconciling | None = None
        self._epoch: int | None = None
        self._held_until = 0.0
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hone-leader", daemon=True)

    @property
    def holder(self) -> str | None:
        """Who leads; None when nobody does. Raises Unavailable."""
        return self._lease.current_holder()

    @property
    def is_leading(self) -> bool:
        """Whether the lease is held, as far as this process knows."""
        return self._work is not None

    def start(self) -> None:
        """Begin; the lease is taken where it is free, before this returns."""
        self._turn()
        self._thread.start()

    def stop(self) -> None:
        """End, and leave the lease to the next one at once."""
        self._is_stopping.set()
        self._thread.join()
        epoch = self._epoch
        self._resign()
        if epoch is not None:
            try:
                self._lease.give_back(epoch)
            except HoneError as error:
                _log.warning("the lease is left to run out: %s", error)

    def _loop(self) -> None:
        while not self._is_stopping.wait(self._lease.ttl_s / TRIES_PER_TTL):
            self._turn()

    def _turn(self) -> None:
        """Take the lease, or hold it; stop when it is lost, or when nobody can say whether it is."""
        asked_at = time.monotonic()
        try:
            held = self._lease.renew(self._epoch) if self._epoch is not None else self._take()
        except HoneError as error:
            _log.warning("the lease cannot be had or held now: %s", error)
            held = asked_at < self._held_until
        except Exception:  # whatever it is, the next turn tries again
            _log.exception("the lease cannot be had or held now")
            held = asked_at < self._held_until
        else:
            if held:
                self._held_until = asked_at + self._lease.ttl_s
        if not held and self._epoch is not None:
            _log.warning("this service does not lead any more")
            self._resign()

    def _take(self) -> bool:
        epoch = self._lease.take()
        if epoch is None:
            return False
        self._epoch = epoch
        self._work = self._make(self._store.fenced(self._lease.check(epoch)))
        self._work.start()
        _log.info("this service leads, in epoch %d", epoch)
        return True

    def _resign(self) -> None:
        work, self._work, self._epoch = self._work, None, None
        if work:
            work.stop()
