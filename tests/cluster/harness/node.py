"""One node of two on this machine: a bridge, a containerd and a kubelet that share nothing with the other's."""

import itertools
import json
import subprocess
from pathlib import Path

from . import cgroups, process, seed
from .api import wait_until
from .control_plane import admin
from .pki import kubeconfig
from .places import HOST_ADDRESS, PKI, NodePlace, program

_KUBELET_RESTARTS = 20


def prepare(node: NodePlace) -> None:
    """What a node needs before its processes start: bridge, cgroup, configuration, images."""
    for name in ("cni", "kubelet", "pods", "containerd"):
        (node.directory / name).mkdir(parents=True)
    _add_bridge(node)
    cgroups.make(node.cgroup)
    write_containerd_config(node.directory / "containerd.toml", directory=node.directory, socket=node.socket)
    (node.directory / "cni" / "10-bridge.conflist").write_text(json.dumps(_network(node)))
    (node.directory / "resolv.conf").write_text("")
    (node.directory / "kubelet.json").write_text(json.dumps(_kubelet_config(node), indent=1))
    seed.lend(node.directory / "containerd" / "root")


def start(node: NodePlace) -> None:
    """Start its containerd and its kubelet where they do not run."""
    start_containerd(node)
    start_kubelet(node)


def start_containerd(node: NodePlace) -> None:
    """Start containerd; returns when it answers."""
    if process.find(f"containerd-{node.name}") is None:
        process.start(f"containerd-{node.name}", ["containerd", "-c", node.directory / "containerd.toml"])
    wait_until_answers(node.socket, f"containerd-{node.name}")


def start_kubelet(node: NodePlace) -> None:
    """Start the kubelet; its node becomes Ready some seconds later."""
    if process.find(f"kubelet-{node.name}") is not None:
        return
    command = [
        program("kubelet"),
        f"--kubeconfig={kubeconfig(node.name)}",
        f"--config={node.directory / 'kubelet.json'}",
        f"--root-dir={node.directory / 'kubelet'}",
        f"--cert-dir={node.directory / 'kubelet' / 'pki'}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
    ]
    process.start(f"kubelet-{node.name}", command)


def stop(node: NodePlace, *, pods: bool) -> None:
    """Kill its kubelet and containerd, and its pods when asked: what the end of a machine looks like from outside."""
    process.stop(f"kubelet-{node.name}", kill=True)
    process.stop(f"containerd-{node.name}", kill=True)
    if pods:
        cgroups.kill(node.cgroup)


def wait_until_ready(node: NodePlace, *, timeout_s: float = 60) -> None:
    """Until the API server says that it is Ready and its taints are gone."""
    restarts = itertools.count()

    def look() -> bool:
        if process.find(f"containerd-{node.name}") is None:
            raise process.Ended(f"containerd-{node.name}")
        if process.find(f"kubelet-{node.name}") is None:
            # It ends while containerd still recovers what ran before; elsewhere systemd starts it again.
            if next(restarts) == _KUBELET_RESTARTS:
                raise process.Ended(f"kubelet-{node.name}")
            start_kubelet(node)
        seen = admin().get("node", node.name)
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in seen["status"]["conditions"])
        return ready and not seen["spec"].get("taints")

    wait_until(f"node {node.name} is Ready", look, timeout_s=timeout_s)


def give_gpus(node: NodePlace, count: int) -> None:
    """GPUs that exist for the scheduler: a pod that asks for nvidia.com/gpu is placed, and gets no device."""
    patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
    admin()("patch", "node", node.name, "--subresource=status", "--type=json", "-p", json.dumps(patch))
    labels = ("nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory=81559")
    admin()("label", "node", node.name, "--overwrite", *labels)


def write_containerd_config(path: Path, *, directory: Path, socket: Path) -> None:
    """A containerd that keeps everything below its directory."""
    path.write_text(
        f"""version = 2
root = "{directory}/containerd/root"
state = "{directory}/containerd/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  # Root without CAP_SYS_RESOURCE cannot lower an OOM score; no pod starts ("can't get final child's PID from pipe").
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{directory}/runc"
"""
    )


def wait_until_answers(socket: Path, name: str) -> None:
    """Until containerd answers on its socket."""

    def look() -> bool:
        if process.find(name) is None:
            raise process.Ended(name)
        return subprocess.run(["ctr", "-a", socket, "version"], capture_output=True, check=False).returncode == 0

    wait_until(f"{name} answers", look, timeout_s=30, every_s=0.1)


def _add_bridge(node: NodePlace) -> None:
    # A bridge takes the lowest hardware address of its members unless it has been given one of its own: pods that know
    # it by another would lose the world beyond it for most of a minute whenever one of them came or went.
    hardware = ":".join(f"{byte:02x}" for byte in (2, 0, *map(int, node.address.split("."))))
    subprocess.run(["ip", "link", "add", node.bridge, "address", hardware, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", f"{node.address}/24", "dev", node.bridge], check=True)
    subprocess.run(["ip", "link", "set", node.bridge, "up"], check=True)


def _network(node: NodePlace) -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "dataDir": str(node.directory / "ipam"),
        "ranges": [[{"subnet": f"{node.subnet}.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    # No masquerading: pods reach each other, this machine and nothing beyond it.
    bridge = {"type": "bridge", "bridge": node.bridge, "isGateway": True, "hairpinMode": True, "ipam": addresses}
    return {"cniVersion": "1.0.0", "name": node.cgroup, "plugins": [bridge]}


def _kubelet_config(node: NodePlace) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "x509": {"clientCAFile": str(PKI / "ca.crt")},
            "webhook": {"enabled": True},
            "anonymous": {"enabled": False},
        },
        "authorization": {"mode": "Webhook"},
        "address": node.address,
        "port": node.kubelet_port,
        "healthzPort": node.health_port,
        "tlsCertFile": str(PKI / f"{node.name}.crt"),
        "tlsPrivateKeyFile": str(PKI / f"{node.name}.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "clusterDNS": [HOST_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(node.directory / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "podLogsDir": str(node.directory / "pods"),  # two kubelets on one machine delete each other's logs without it
        "volumePluginDir": str(node.directory / "kubelet" / "volume-plugins"),
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {signal: "0%" for signal in ("nodefs.available", "imagefs.available", "memory.available")},
        "nodeLeaseDurationSeconds": 8,
        "nodeStatusUpdateFrequency": "4s",
    }
