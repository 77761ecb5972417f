"""The durable record: requests, jobs, attempts, events. SQLite by default, PostgreSQL by URL.

    store = Store("sqlite:////home/me/.local/share/hone/hone.db")
    with store.change("default", "demo-x7k2p", now=now) as change:
        change.to_state(State.RUNNING, "It trains.")

Called by jobs.py, reconcile.py and service.py. Nothing outside this package knows SQL.
"""

from hone.store.change import Change, output_of
from hone.store.filter import condition
from hone.store.lease import Lease, LeaseLost
from hone.store.store import Request, Store

__all__ = ["Change", "Lease", "LeaseLost", "Request", "Store", "condition", "output_of"]
