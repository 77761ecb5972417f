"""Where everything is: files, addresses and ports of the one cluster that a machine can have at a time."""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BIN = ROOT / ".servers" / "bin"
HOME = Path(os.environ.get("HONE_CLUSTER_DIR", "/var/lib/hone-cluster"))
"""Outside the repository: a machine has one cluster, whichever clone started it, and sockets need short paths."""
RUN = HOME / "run"
"""What one run of the cluster leaves; `down` deletes it."""
PKI = RUN / "pki"
LOGS = RUN / "log"
FAILED_LOGS = HOME / "log-of-failed-start"
IMAGES = HOME / "images"
"""Images ready for a node, kept between runs."""
STATE = RUN / "cluster.json"


def program(name: str) -> str:
    """Path of a program that tools/servers.sh builds."""
    return str(BIN / name)


API_URL = "https://127.0.0.1:6443"
HOST_ADDRESS = "10.244.0.1"
"""This machine as pods see it: the address of node-a's bridge."""
S3_PORT = 7480
POSTGRES_PORT = 7432
PORTS = (2379, 2380, 6443, 10249, 10250, 10256, 10257, 10259, 10260, S3_PORT, POSTGRES_PORT)
"""What must be free before a start."""


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """One node: a bridge with a /24 of pods, a containerd and a kubelet of its own."""

    name: str
    bridge: str
    subnet: str
    """The first three bytes of its pods' addresses."""
    kubelet_port: int
    health_port: int

    @property
    def directory(self) -> Path:
        """Everything of this node on disk."""
        return RUN / self.name

    @property
    def address(self) -> str:
        """The node's own address, on its bridge."""
        return f"{self.subnet}.1"

    @property
    def socket(self) -> Path:
        """Its containerd."""
        return self.directory / "containerd.sock"

    @property
    def cgroup(self) -> str:
        """Name of its cgroup in every hierarchy."""
        return f"hone-{self.name}"


NODES = (
    NodePlace(name="node-a", bridge="hone0", subnet="10.244.0", kubelet_port=10250, health_port=10248),
    NodePlace(name="node-b", bridge="hone1", subnet="10.244.1", kubelet_port=10260, health_port=10258),
)
