"""What a cluster changes in the kernel and in directories that are not its own, and how that is undone."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

from .places import NODES, RUN

_SETTINGS = (
    "net/ipv4/ip_forward",  # ours; the rest is changed by kubelet and kube-proxy
    "net/ipv4/conf/all/route_localnet",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
)
_MEMORY = RUN / "sysctl.json"


def remember() -> None:
    """Write down the settings as they are, then let packets pass between the bridges."""
    there = [name for name in _SETTINGS if _setting(name).exists()]
    _MEMORY.write_text(json.dumps({name: _setting(name).read_text().strip() for name in there}))
    _setting("net/ipv4/ip_forward").write_text("1")


def restore() -> None:
    """Set them back."""
    with contextlib.suppress(FileNotFoundError):
        for name, value in json.loads(_MEMORY.read_text()).items():
            _setting(name).write_text(value)


def unmount() -> None:
    """Every mount below the run's directory, the deepest first."""
    points = [
        line.split()[1].encode().decode("unicode_escape") for line in Path("/proc/mounts").read_text().splitlines()
    ]
    for point in sorted((p for p in points if p.startswith(f"{RUN}/")), reverse=True):
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)


def remove_bridge(name: str) -> None:
    """A bridge, and the ends of pods' cables on it."""
    bridge = Path(f"/sys/class/net/{name}")
    for link in [*(port.name for port in bridge.glob("brif/*")), *([name] if bridge.exists() else [])]:
        subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)


def remove_rules() -> None:
    """The chains of kube-proxy and kubelet, with the rules that lead to them."""
    for family in ("iptables", "ip6tables"):
        if shutil.which(f"{family}-save") is None:
            continue  # so nothing ever made a rule here
        saved = subprocess.run([f"{family}-save"], check=False, capture_output=True, text=True).stdout
        kept = [line for line in saved.splitlines() if "KUBE-" not in line]
        if len(kept) < len(saved.splitlines()):
            subprocess.run([f"{family}-restore"], input="\n".join(kept) + "\n", text=True, check=True)


def remove_traces() -> None:
    """What programs leave outside the run's directory, because their makers fixed the place."""
    for link in Path("/var/log/containers").glob("*.log"):
        if str(link.readlink()).startswith(f"{RUN}/"):
            link.unlink()
    for node in NODES:
        for cached in Path("/var/lib/cni/results").glob(f"{node.cgroup}-*"):
            cached.unlink()
    listening = Path("/proc/net/unix").read_text()
    for shim in Path("/run/containerd/s").glob("*"):
        if str(shim) not in listening:
            shim.unlink()


def _setting(name: str) -> Path:
    return Path("/proc/sys") / name
