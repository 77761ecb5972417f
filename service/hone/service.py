"""The service, put together: store, artefacts, backend, use cases, reconciler; one for each HONE_HOME.

`hone serve` and `hone run` both open it. Who is first owns the home until the process ends, however it ends: the lock
is the kernel's. Services with homes of their own may share a PostgreSQL; then one of them reconciles.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from hone.backends.base import Backend, Problem
from hone.backends.local import LocalBackend
from hone.cluster import Cluster, load_cluster
from hone.errors import HoneError
from hone.home import own, write_owner
from hone.jobs import Jobs
from hone.leader import Leader, Reconciling
from hone.machine import Planner, look
from hone.monitor import CLUSTER, Check
from hone.plan import Hardware
from hone.reconcile import LOOK_S, Reconciler
from hone.settings import Settings
from hone.speeds import Speeds
from hone.storage import open_store
from hone.store import Store

SHARED_LOOK_S = 1.0
"""Between two looks at a database that other services write too."""


class Service:
    """What `open_service` gives: everything that rpc/ needs."""

    def __init__(self, *, jobs: Jobs, store: Store, backend: Backend, reconciler: Reconciling, lock: IO[str]) -> None:
        self.jobs = jobs
        self.store = store
        self.backend = backend
        self.reconciler = reconciler
        self._lock = lock

    def checks(self) -> list[Check]:
        """What the service needs, as it is now; may wait for a database that does not answer."""
        found = [_database(self.store)]
        if not isinstance(self.backend, LocalBackend):
            found.append(_cluster(self.backend.problems))
        if isinstance(self.reconciler, Leader):
            found.append(_leader(self.reconciler))
        return found

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
        cluster = load_cluster(settings.cluster) if settings.cluster else None
        uri, endpoint, region = _store_address(settings, cluster)
        artifacts = open_store(uri, endpoint=endpoint, region=region)
        stack.callback(artifacts.close)
        store = Store(settings.database_url)
        stack.callback(store.close)
        backend, hardware = _on_cluster(cluster) if cluster else _here(settings)
        stack.callback(backend.close)
        planner = Planner(hardware, endpoint=endpoint, region=region, speeds=Speeds(store.finished))
        jobs = Jobs(store, backend, artifacts, planner=planner)

        def reconciler_of(own: Store) -> Reconciler:
            look_s = SHARED_LOOK_S if store.is_shared else LOOK_S
            return Reconciler(own, backend, artifacts, grace_s=settings.grace_s, planner=planner, look_s=look_s)

        reconciler = _led(store, reconciler_of, settings) if store.is_shared else reconciler_of(store)
        reconciler.start()
        stack.callback(reconciler.stop)
        yield Service(jobs=jobs, store=store, backend=backend, reconciler=reconciler, lock=lock)


def _store_address(settings: Settings, cluster: Cluster | None) -> tuple[str, str | None, str | None]:
    """URI, endpoint and region of the artefact store: the platform's, else those of the settings."""
    if cluster is None:
        return settings.store_uri, settings.store_endpoint or None, None
    return cluster.store.uri, cluster.store.endpoint, cluster.store.region


def _here(settings: Settings) -> tuple[Backend, Hardware]:
    """This machine."""
    hardware = look(settings.gpu_profiles, settings.calibration_path)
    backend = LocalBackend(
        settings.home / "runs",
        hardware=hardware,
        trainer_python=settings.trainer_python,
        python_rewards=settings.python_rewards,
        environment={"AWS_ENDPOINT_URL_S3": settings.store_endpoint} if settings.store_endpoint else {},
    )
    return backend, hardware


def _on_cluster(cluster: Cluster) -> tuple[Backend, Hardware]:
    """A cluster, as its platform describes it."""
    from hone.backends.kubernetes.backend import KubernetesBackend  # late: a laptop needs no Kubernetes client

    return KubernetesBackend(cluster), cluster.hardware()


def _database(store: Store) -> Check:
    try:
        store.ping()
    except HoneError as error:
        return Check(name="database", is_well=False, text=str(error))
    return Check(name="database", is_well=True, text=f"{store.name} answers")


def _cluster(problems: Sequence[Problem]) -> Check:
    if not problems:
        return Check(name=CLUSTER, is_well=True, text="the API server answers", is_needed=False)
    first = min(problems, key=lambda problem: problem.since)
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = f"{first.what}: {first.why} Since {first.since.isoformat(timespec='seconds')}{others}"
    return Check(name=CLUSTER, is_well=False, text=" ".join(text.split()), is_needed=False, since=first.since)


def _leader(leader: Leader) -> Check:
    """Whether somebody reconciles; not necessarily this one."""
    if leader.is_leading:
        return Check(name="leader", is_well=True, text="this service reconciles", is_needed=False)
    try:
        holder = leader.holder
    except HoneError as error:
        return Check(name="leader", is_well=False, text=f"not known: {error.message}", is_needed=False)
    text = f"{holder} reconciles" if holder else "nobody reconciles yet"
    return Check(name="leader", is_well=holder is not None, text=text, is_needed=False)


def _led(store: Store, make: Callable[[Store], Reconciling], settings: Settings) -> Leader:
    """What is done by one of the services that share the store. The home's lock makes its name one process's own, so
    that a service that was killed and starts again goes on at once."""
    lease = store.lease(f"{socket.gethostname()}:{settings.home.absolute()}")
    return Leader(store, lease, make)
