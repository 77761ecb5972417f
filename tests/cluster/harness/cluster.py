"""Up and down: one cluster a machine, started whole or not at all, and always taken down to the last mount."""

import json
import os
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cgroups, control_plane, images, kernel, node, packages, pki, process, servers
from .failure import CannotStart
from .places import FAILED_LOGS, LOGS, NODES, PORTS, ROOT, RUN, STATE


def up() -> None:
    """Start it with the images of this tree, unless it runs. What is left of one that did not end well goes first."""
    if is_running():
        return
    if RUN.exists():
        down()
    _refuse_what_cannot_work()
    packages.install()
    _build()
    RUN.mkdir(exist_ok=True)
    kernel.remember()
    try:
        _start()
    except BaseException:
        shutil.rmtree(FAILED_LOGS, ignore_errors=True)
        shutil.copytree(LOGS, FAILED_LOGS, dirs_exist_ok=True)
        down()
        raise


def is_running() -> bool:
    """Whether the cluster is there, all of it, and was started from this clone."""
    names = [
        *control_plane.COMPONENTS,
        *servers.NAMES,
        *(f"{what}-{n.name}" for n in NODES for what in ("containerd", "kubelet")),
    ]
    if not STATE.exists() or any(process.find(name) is None for name in names):
        return False
    owner = json.loads(STATE.read_text())["root"]
    if owner != str(ROOT) and Path(owner).exists():
        raise CannotStart(f"the cluster of {owner} runs on this machine: `make cluster-down` ends it")
    return owner == str(ROOT) and control_plane.is_ready()


def down() -> None:
    """End every process, then remove mounts, bridges, cgroups, rules of iptables and the directory of the run."""
    for place in NODES:
        process.stop(f"kubelet-{place.name}", kill=True)
    process.stop("postgres", first=servers.POSTGRES_STOP)
    for pid in process.marked():
        process.send(pid, signal.SIGKILL)
    for place in NODES:
        cgroups.kill(place.cgroup)
    kernel.unmount()
    for place in NODES:
        cgroups.remove(place.cgroup)
        kernel.remove_bridge(place.bridge)
    kernel.remove_rules()
    kernel.remove_traces()
    kernel.restore()
    subprocess.run(["rm", "-rf", "--one-file-system", RUN], check=True)


def _build() -> None:
    """Programs keep the processors busy when nothing is cached, images the network and the disk."""
    with ThreadPoolExecutor() as pool:
        programs = pool.submit(_build_programs)
        pool.submit(images.build).result()
        programs.result()


def _build_programs() -> None:
    if subprocess.run([ROOT / "tools" / "servers.sh", "--cluster"], check=False).returncode:
        raise CannotStart("the programs of the cluster could not be built, see above")


def _start() -> None:
    pki.make()
    for place in NODES:
        node.prepare(place)
    with ThreadPoolExecutor() as pool:
        work = [pool.submit(control_plane.start), pool.submit(servers.start_s3), pool.submit(servers.start_postgres)]
        work += [pool.submit(node.start_containerd, place) for place in NODES]
        for piece in work:
            piece.result()
    for place in NODES:
        node.start_kubelet(place)
    for place in NODES:
        node.wait_until_ready(place)
        node.give_gpus(place, 8)
    STATE.write_text(json.dumps({"root": str(ROOT), "kubeconfig": str(pki.kubeconfig("admin"))}))


def _refuse_what_cannot_work() -> None:
    if os.geteuid() != 0:
        raise CannotStart(
            "it takes root to make bridges, cgroups and mounts; with KUBECONFIG set, tests use a cluster of yours"
        )
    if not cgroups.are_supported():
        raise CannotStart("only cgroup v1 is known here; with KUBECONFIG set, tests use a cluster of yours")
    taken = [port for port in PORTS if _answers(port)]
    if taken:
        raise CannotStart(
            f"something listens on port {', '.join(map(str, taken))} of 127.0.0.1 already (a Kubernetes of yours?)"
        )


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
