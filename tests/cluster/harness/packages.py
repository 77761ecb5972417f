"""Debian's packages that the cluster and the builds of images need; what is missing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

from .failure import CannotStart

_NEEDED = {  # a program or file → its package
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "openssl": "openssl",
    "gcc": "gcc",
    "/usr/include/stdlib.h": "libc6-dev",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "mmdebstrap": "mmdebstrap",
    "/usr/lib/postgresql": "postgresql",
}


def install() -> None:
    """Install what is missing. Raises CannotStart where that is not possible."""
    missing = [package for needed, package in _NEEDED.items() if not _is_there(needed)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise CannotStart(f"{', '.join(missing)} must be installed, and there is no apt-get here")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing]
    for command in (["apt-get", "update", "--quiet"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotStart(f"`{' '.join(command)}` failed: {done.stderr[-2000:]}")


def _is_there(needed: str) -> bool:
    return Path(needed).exists() if needed.startswith("/") else shutil.which(needed) is not None
