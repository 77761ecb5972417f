"""Images of this machine, unpacked once, lent to every node.

A containerd of its own imports them into `images/containerd/root` and ends. A node's containerd then starts on copies
of that one's two databases, with hard links to its blobs and symbolic links to its unpacked layers, which nobody writes
to: two nodes with gigabytes of images cost no time and no disk.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from . import node, process
from .places import IMAGES, NODES

LAYOUT = IMAGES / "oci"
"""An OCI image layout: where builds leave images."""
_ROOT = IMAGES / "containerd" / "root"
_SOCKET = IMAGES / "containerd.sock"
_CONTENT = "io.containerd.content.v1.content"
_SNAPSHOTS = "io.containerd.snapshotter.v1.overlayfs"
_DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", f"{_SNAPSHOTS}/metadata.db")


def digests() -> dict[str, str]:
    """What the layout holds: image name → digest of its manifest."""
    return {name: str(entry["digest"]) for name, entry in _entries().items()}


def config_digest(name: str) -> str | None:
    """Digest of the configuration of an image of the layout, which is also its id for buildah."""
    return str(_manifest(name)["config"]["digest"]) if name in digests() else None


def size_bytes(name: str) -> int:
    """Size of an image of the layout, not compressed."""
    return sum(layer["size"] for layer in _manifest(name)["layers"])


def load() -> list[str]:
    """Take what is new in the layout into the seed and into every node that runs; names of what was new to the seed."""
    nodes = [place for place in NODES if process.find(f"containerd-{place.name}") is not None]
    new = _names_of_what_differs(_loaded())
    if new:
        try:
            _take_in(new, forget=not nodes)  # one that runs may still use layers of yesterday
        except RuntimeError as error:
            if nodes:
                raise
            sys.stdout.write(f"  images  unpacking all of them again: {str(error)[:200]}\n")
            shutil.rmtree(IMAGES / "containerd")
            _take_in(list(digests()), forget=False)
        (IMAGES / "loaded.json").write_text(json.dumps(digests()))
        _share_blobs()
    for place in nodes:
        _import(place.socket, _names_of_what_differs(_held(place.socket)))
    return new


def _take_in(names: Sequence[str], *, forget: bool) -> None:
    with _containerd():
        _import(_SOCKET, names)
        if forget:
            _forget_what_has_no_name()


def lend(root: Path) -> None:
    """Make a containerd root that has everything of the seed."""
    for name in _DATABASES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / name, root / name)
    blobs = Path(_CONTENT) / "blobs" / "sha256"
    (root / blobs).mkdir(parents=True)
    for blob in (_ROOT / blobs).iterdir():
        os.link(blob, root / blobs / blob.name)
    snapshots = root / _SNAPSHOTS / "snapshots"
    snapshots.mkdir()
    for layer in (_ROOT / _SNAPSHOTS / "snapshots").iterdir():
        (snapshots / layer.name).symlink_to(layer)


def _names_of_what_differs(held: Mapping[str, str]) -> list[str]:
    return [name for name, digest in digests().items() if held.get(name) != digest]


def _forget_what_has_no_name() -> None:
    # Kubernetes' side of containerd also names each image by the digest of its configuration.
    kept = {*digests(), *(config_digest(name) for name in digests())}
    for name in _ctr(_SOCKET, "images", "ls", "-q").split():
        if name not in kept:
            _ctr(_SOCKET, "images", "rm", name)
    _ctr(_SOCKET, "leases", "create", "--id", "sweep")
    _ctr(_SOCKET, "leases", "delete", "--sync", "sweep")


def _share_blobs() -> None:
    """Keep each blob once on disk, in the layout and in the seed, and none that no image has."""
    (LAYOUT / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(_entries().values())}))
    wanted = {digest.removeprefix("sha256:") for name in digests() for digest in _blobs(name)}
    for blob in (LAYOUT / "blobs" / "sha256").iterdir():
        same = _ROOT / _CONTENT / "blobs" / "sha256" / blob.name
        if blob.name not in wanted:
            blob.unlink()
        elif same.exists() and not blob.samefile(same):
            blob.unlink()
            blob.hardlink_to(same)


def _entries() -> dict[str, dict[str, Any]]:
    """Entries of the layout's index by name; what lost its name to a newer image is not among them."""
    try:
        entries = json.loads((LAYOUT / "index.json").read_text())["manifests"]
    except FileNotFoundError:
        return {}
    names = [entry.get("annotations", {}).get("org.opencontainers.image.ref.name") for entry in entries]
    return {name: entry for name, entry in zip(names, entries, strict=True) if name}


def _loaded() -> dict[str, str]:
    try:
        return cast(dict[str, str], json.loads((IMAGES / "loaded.json").read_text()))
    except FileNotFoundError:
        return {}


@contextlib.contextmanager
def _containerd() -> Iterator[None]:
    IMAGES.mkdir(parents=True, exist_ok=True)
    node.write_containerd_config(IMAGES / "containerd.toml", directory=IMAGES, socket=_SOCKET)
    with (IMAGES / "containerd.toml").open("a") as config:  # it forgets when load() says so
        config.write('[plugins."io.containerd.gc.v1.scheduler"]\n  mutation_threshold = 0\n')
    process.start("containerd-seed", ["containerd", "-c", IMAGES / "containerd.toml"])
    try:
        node.wait_until_answers(_SOCKET, "containerd-seed")
        yield
    finally:
        process.stop("containerd-seed", wait_s=60)


def _import(socket: Path, names: Sequence[str]) -> None:
    """Send what that containerd lacks of these images, and have it unpack them."""
    if not names:
        return
    there = set(_ctr(socket, "content", "ls", "-q").split())
    command = ["ctr", "-a", str(socket), "-n", "k8s.io", "images", "import", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as importer:
        assert importer.stdin and importer.stdout
        with contextlib.suppress(BrokenPipeError):  # its own words follow
            _write_archive(importer.stdin, names, without=there)
        with contextlib.suppress(BrokenPipeError):
            importer.stdin.close()
        said = importer.stdout.read().decode(errors="replace")
    if importer.returncode:
        raise RuntimeError(f"ctr images import: {said}")


def _write_archive(stream: IO[bytes], names: Sequence[str], *, without: set[str]) -> None:
    """An OCI archive of these images, less the blobs that the reader has."""
    entries = [{**_entries()[name], "annotations": {"io.containerd.image.name": name}} for name in names]
    index = {"schemaVersion": 2, "manifests": entries}
    index_file = IMAGES / "import.json"
    index_file.write_text(json.dumps(index))
    wanted = {digest for name in names for digest in _blobs(name)}
    with tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 20, dereference=True) as archive:
        archive.add(LAYOUT / "oci-layout", "oci-layout")
        archive.add(index_file, "index.json")
        for digest in sorted(wanted - without):
            archive.add(_blob(digest), f"blobs/sha256/{_blob(digest).name}")
    stream.flush()


def _blobs(name: str) -> list[str]:
    manifest = _manifest(name)
    return [digests()[name], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]


def _manifest(name: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(_blob(digests()[name]).read_text()))


def _blob(digest: str) -> Path:
    return LAYOUT / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _held(socket: Path) -> dict[str, str]:
    """Image name → digest, of one containerd."""
    lines = _ctr(socket, "images", "ls").splitlines()[1:]
    return {words[0]: words[2] for line in lines if len(words := line.split()) > 2}


def _ctr(socket: Path, *words: str) -> str:
    command = ["ctr", "-a", str(socket), "-n", "k8s.io", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
