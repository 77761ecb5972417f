"""The service, put together: store, artefacts, local backend, use cases, reconciler; one for each HONE_HOME.

`hone serve` and `hone run` both open it. Who is first owns the home until the process ends, however it ends: the lock
is the kernel's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from hone.backends.local import LocalBackend
from hone.home import own, write_owner
from hone.jobs import Jobs
from hone.machine import look, plan_here
from hone.reconcile import Reconciler
from hone.settings import Settings
from hone.storage import open_store
from hone.store import Store


class Service:
    """What `open_service` gives: everything that rpc/ needs."""

    def __init__(self, *, jobs: Jobs, store: Store, reconciler: Reconciler, lock: IO[str]) -> None:
        self.jobs = jobs
        self.store = store
        self.reconciler = reconciler
        self._lock = lock

    def announce(self, address: str) -> None:
        """Tell who looks at the home where this service listens."""
        write_owner(self._lock, address)


@contextmanager
def open_service(settings: Settings) -> Iterator[Service]:
    """Own the home, and run the service in it until the end of the block. Runs that it started go on after that.

    Raises WrongState when another process owns the home, StorageError when it cannot be written, and what is wrong
    with the database or the address of the artefact store.
    """
    with ExitStack() as stack:
        lock = stack.enter_context(own(settings.home))
        artifacts = open_store(settings.store_uri, endpoint=settings.store_endpoint or None)
        stack.callback(artifacts.close)
        store = Store(settings.database_url)
        stack.callback(store.close)
        hardware = look(settings.gpu_profiles)
        backend = LocalBackend(
            settings.home / "runs",
            hardware=hardware,
            trainer_python=settings.trainer_python,
            environment={"AWS_ENDPOINT_URL_S3": settings.store_endpoint} if settings.store_endpoint else {},
        )
        stack.callback(backend.close)
        jobs = Jobs(store, backend, artifacts, planner=lambda spec: plan_here(spec, hardware))
        reconciler = Reconciler(store, backend, artifacts, grace_s=settings.grace_s)
        reconciler.start()
        stack.callback(reconciler.stop)
        yield Service(jobs=jobs, store=store, reconciler=reconciler, lock=lock)
