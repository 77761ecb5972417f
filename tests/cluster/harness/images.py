"""The images that the cluster runs, built by buildah and left in an image layout for seed.py.

What is particular to a machine without a registry, or with a certificate authority of its own, stands here; the
Dockerfile is the one that users build.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import packages, seed
from .places import ROOT

SANDBOX = "localhost/pause:1"
BASE = "localhost/base:1"
SERVICE = "localhost/hone-service:dev"
TRAINER = "localhost/hone-trainer:dev"

_PAUSE = Path(__file__).with_name("pause.c")
_ROOM_BYTES = 20 * 2**30
"""What a build of everything takes, once more."""
_BASE_PACKAGES = ("python3", "python3-venv", "python3-dev", "ca-certificates")
"""What Debian calls what the official slim Python image has."""


def build() -> None:
    """Build both of Hone's images and hand them to the nodes that run; what has not changed is not done again."""
    packages.install()
    _build_sandbox()
    base = os.environ.get("BASE_IMAGE") or _build_base()
    for target, name in (("service", SERVICE), ("trainer", TRAINER)):
        started = time.monotonic()
        _build_target(target, name, base=base)
        _export(name)
        _say(f"{name}: {seed.size_bytes(name) / 1e9:.2f} GB, built in {time.monotonic() - started:.0f} s")
    if shutil.disk_usage("/var/lib/containers").free < _ROOM_BYTES:
        _buildah("rmi", "--prune", "--force")  # layers of earlier builds
    started = time.monotonic()
    new = seed.load()
    _say(f"unpacked for the nodes: {', '.join(new) or 'nothing new'} ({time.monotonic() - started:.0f} s)")


def _build_sandbox() -> None:
    """The image of a pod's sandbox: there is no registry to pull it from, and it is twenty lines of C."""
    if SANDBOX not in seed.digests():
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(["gcc", "-static", "-Os", "-o", f"{directory}/pause", _PAUSE], check=True)
            Path(directory, "Dockerfile").write_text('FROM scratch\nCOPY pause /pause\nENTRYPOINT ["/pause"]\n')
            _buildah("bud", "--quiet", "--tag", SANDBOX, directory)
        _export(SANDBOX)


def _build_base() -> str:
    """A stand-in for the official slim Python image: the same Debian, its own Python 3.11."""
    if not _image_id(BASE):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            archive = f"{directory}/base.tar"
            options = ["--quiet", "--variant=minbase", f"--include={','.join(_BASE_PACKAGES)}"]
            subprocess.run(["mmdebstrap", *options, "bookworm", archive], check=True)
            container = _buildah("from", "scratch").strip()
            _buildah("add", "--quiet", container, archive, "/")
        _buildah("commit", "--quiet", "--rm", container, BASE)
        _say(f"{BASE}: built in {time.monotonic() - started:.0f} s")
    return BASE


def _build_target(target: str, name: str, *, base: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        arguments = {"BASE_IMAGE": base, "REVISION": revision.stdout.strip() or "unknown"}
        words = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
        volumes = [word for volume in _host_volumes(Path(directory)) for word in ("--volume", volume)]
        _buildah("bud", "--layers", "--target", target, *words, *volumes, "--tag", name, str(ROOT))


def _host_volumes(directory: Path) -> list[str]:
    """What makes pip and uv trust, inside a build, whom this machine trusts."""
    (directory / "uv.toml").write_text("system-certs = true\n")
    volumes = {"/etc/ssl/certs": "/etc/ssl/certs", "/etc/pip.conf": "/etc/pip.conf"}
    there = [f"{source}:{target}:ro" for source, target in volumes.items() if Path(source).exists()]
    return [*there, f"{directory / 'uv.toml'}:/etc/uv/uv.toml:ro"]


def _export(name: str) -> None:
    """Bring an image into the layout. Not compressed: the nodes are on this disk."""
    if _image_id(name) == seed.config_digest(name):
        return
    seed.LAYOUT.mkdir(parents=True, exist_ok=True)
    copy = ("copy", "--quiet", "--dest-oci-accept-uncompressed-layers")
    _run("skopeo", *copy, f"containers-storage:{name}", f"oci:{seed.LAYOUT}:{name}")


def _image_id(name: str) -> str | None:
    command = ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"sha256:{done.stdout.strip()}" if done.returncode == 0 else None


def _buildah(*words: str) -> str:
    return _run("buildah", *words)


def _run(*command: str) -> str:
    environment = {
        **os.environ,
        "BUILDAH_ISOLATION": "chroot",
    }  # no user namespaces, no systemd: this is enough for a build
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} {command[1]}: {(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def _say(text: str) -> None:
    sys.stdout.write(f"  images  {text}\n")
    sys.stdout.flush()
