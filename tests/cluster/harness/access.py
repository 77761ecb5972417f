"""What a test holds in its hands: the cluster, the servers beside it, and the means to break and mend them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from . import cgroups, control_plane, images, node, process, seed, servers
from .api import Kubectl, wait_until
from .places import HOST_ADDRESS, NODES, S3_PORT, NodePlace


@dataclass(frozen=True, kw_only=True)
class S3:
    """The S3 server beside the cluster; plain HTTP."""

    endpoint: str
    """From this machine."""
    pod_endpoint: str
    """From a pod."""
    access_key: str
    secret_key: str

    def make_bucket(self, name: str) -> Path:
        """A new, empty bucket; its directory, in which objects are files."""
        path = servers.s3_directory() / name
        path.mkdir()
        return path


@dataclass(frozen=True, kw_only=True)
class Database:
    """One PostgreSQL database."""

    url: str
    """From this machine."""
    pod_url: str
    """From a pod."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Kubernetes that tests may use, and break where `make cluster` made it."""

    kubectl: Kubectl
    is_ours: bool
    """Made by `make cluster`, so that processes can be stopped and servers beside it are known."""

    @property
    def kubeconfig(self) -> Path:
        """cluster-admin's."""
        return self.kubectl.kubeconfig

    @property
    def node_names(self) -> tuple[str, ...]:
        """node-a and node-b where it is ours."""
        return tuple(item["metadata"]["name"] for item in self.kubectl.items("nodes"))

    @property
    def s3(self) -> S3:
        """The S3 server, or the test is skipped."""
        self._need_ours()
        return S3(
            endpoint=f"http://127.0.0.1:{S3_PORT}",
            pod_endpoint=f"http://{HOST_ADDRESS}:{S3_PORT}",
            access_key=servers.ACCESS_KEY,
            secret_key=servers.SECRET_KEY,
        )

    @property
    def service_image(self) -> str:
        """The image of the service, or the test is skipped."""
        return self._image("HONE_SERVICE_IMAGE", images.SERVICE)

    @property
    def trainer_image(self) -> str:
        """The image of the trainer, or the test is skipped."""
        return self._image("HONE_TRAINER_IMAGE", images.TRAINER)

    @contextlib.contextmanager
    def new_database(self, name: str) -> Iterator[Database]:
        """An empty database that is dropped at the end."""
        self._need_ours()
        servers.create_database(name)
        try:
            yield Database(
                url=servers.postgres_url("127.0.0.1", name), pod_url=servers.postgres_url(HOST_ADDRESS, name)
            )
        finally:
            servers.drop_database(name)

    @contextlib.contextmanager
    def new_namespace(self, name: str, *, enforce: str = "restricted") -> Iterator[str]:
        """A namespace with Pod Security enforced, deleted at the end without waiting for its pods."""
        labels = {"pod-security.kubernetes.io/enforce": enforce}
        self.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        try:
            # No pod is admitted before. It takes a minute where the API server has just been killed: controllers try
            # their watches again ever more slowly.
            look = ("get", "serviceaccount", "default", "--output=name")
            wait_until(f"{name} has its ServiceAccount", lambda: self.kubectl(*look, namespace=name), timeout_s=240)
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")

    @contextlib.contextmanager
    def stopped(self, component: str, *, kill: bool = True) -> Iterator[None]:
        """One of control_plane.COMPONENTS does not run inside the block; after it, the API server is ready again."""
        self._need_ours()
        process.stop(component, kill=kill)
        try:
            yield
        finally:
            control_plane.start_component(component)
            control_plane.wait_until_ready()

    def restart(self, component: str, *, kill: bool = True) -> None:
        """End it and start it again at once; returns when the API server is ready."""
        with self.stopped(component, kill=kill):
            pass

    @contextlib.contextmanager
    def node_dead(self, name: str) -> Iterator[None]:
        """Kubelet, containerd and pods of one node are gone inside the block, without a word; Ready again after it."""
        with self._node_stopped(name, pods=True):
            yield

    @contextlib.contextmanager
    def node_silent(self, name: str) -> Iterator[None]:
        """Kubelet and containerd of one node do not run inside the block, its pods do: a node that is cut off."""
        with self._node_stopped(name, pods=False):
            yield

    @contextlib.contextmanager
    def _node_stopped(self, name: str, *, pods: bool) -> Iterator[None]:
        place = self._node(name)
        node.stop(place, pods=pods)
        try:
            yield
        finally:
            node.start(place)
            node.wait_until_ready(place)

    @contextlib.contextmanager
    def s3_stopped(self) -> Iterator[None]:
        """The S3 server does not run inside the block; after it, it has what it had."""
        self._need_ours()
        process.stop("s3", kill=True)
        try:
            yield
        finally:
            servers.start_s3()

    def processes_of(self, pod: dict[str, Any]) -> list[int]:
        """What runs in a pod, as this machine numbers it; harness/process.py tells more of each."""
        place = self._node(pod["spec"]["nodeName"])
        return cgroups.pids_of_pod(place.cgroup, pod["metadata"]["uid"])

    def directory_of(self, pod: dict[str, Any], volume: str) -> Path:
        """What a pod has in an emptyDir."""
        place = self._node(pod["spec"]["nodeName"])
        pods = place.directory / "kubelet" / "pods"
        return pods / pod["metadata"]["uid"] / "volumes" / "kubernetes.io~empty-dir" / volume

    @contextlib.contextmanager
    def gpus(self, name: str, count: int) -> Iterator[None]:
        """One node offers this many GPUs inside the block (8 otherwise). No device comes with them."""
        place = self._node(name)
        node.give_gpus(place, count)
        try:
            yield
        finally:
            node.give_gpus(place, 8)

    def _node(self, name: str) -> NodePlace:
        self._need_ours()
        return next(place for place in NODES if place.name == name)

    def _image(self, variable: str, ours: str) -> str:
        if name := os.environ.get(variable):
            return name
        if not self.is_ours:
            pytest.skip(f"which image? Set {variable} to one that the cluster of KUBECONFIG can pull")
        if ours not in seed.digests():
            pytest.skip(f"{ours} is not there: `make images` builds it")
        return ours

    def _need_ours(self) -> None:
        if not self.is_ours:
            pytest.skip("only with the cluster that `make cluster` makes: unset KUBECONFIG")


def find() -> Cluster | None:
    """The cluster of KUBECONFIG, else the one that `make cluster` made, else None."""
    given = os.environ.get("KUBECONFIG")
    ours = _find_ours()
    if given and (ours is None or Path(given) != ours.kubeconfig):
        return Cluster(kubectl=Kubectl(program=_find_kubectl(), kubeconfig=Path(given)), is_ours=False)
    return ours


def _find_ours() -> Cluster | None:
    from . import cluster

    return Cluster(kubectl=control_plane.admin(), is_ours=True) if cluster.is_running() else None


def _find_kubectl() -> str:
    ours: Any = control_plane.admin().program
    return ours if Path(ours).exists() else "kubectl"
