"""The file:// store, keys, manifests and directories; s3:// is in tests/integration/test_s3.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hone import storage
from hone.errors import IntegrityError, NotFound, StorageError, UserError
from hone.storage import (
    MANIFEST,
    ArtifactStore,
    Credentials,
    JobLayout,
    WriterLayout,
    download_directory,
    join_key,
    join_path,
    open_store,
    sha256_of,
    upload_directory,
    verify_directory,
)

ADAPTER = JobLayout("default", "sft-abcde").adapter
NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ArtifactStore:
    return open_store(root.as_uri())


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    directory = tmp_path / "outputs"
    (directory / "1 pooling").mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
    (directory / "adapter_config.json").write_text("{}")
    (directory / "1 pooling" / "config ü.json").write_text('{"a": 1}')
    (directory / "empty").touch()
    return directory


def test_public_names() -> None:
    assert sorted(storage.__all__) == [
        "ArtifactStore",
        "AttemptLayout",
        "Credentials",
        "FileStore",
        "JobLayout",
        "MANIFEST",
        "Manifest",
        "ManifestFile",
        "OnBytes",
        "Progress",
        "StoredObject",
        "Versioned",
        "WriterLayout",
        "download_directory",
        "files_of",
        "holds_file",
        "join_key",
        "join_path",
        "open_store",
        "read_manifest",
        "send_files",
        "sha256_of",
        "upload_directory",
        "verify_directory",
    ]


def test_import_loads_no_boto3() -> None:
    code = "import sys, hone.storage; print([name for name in sys.modules if name.startswith('boto')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Keys


@pytest.mark.parametrize("segment", ["", ".", "..", "/etc/passwd", "a\0b", "a\nb", "a\x7fb", ".hone-lock", "\ud800"])
def test_segment_that_names_no_place_of_its_own_is_refused(segment: str) -> None:
    with pytest.raises(UserError, match="cannot be part of a storage key"):
        join_key("ns", segment)


@pytest.mark.parametrize("path", ["../x", "a/../b", "a//b", "/a", "a/", "a/./b", "..", ""])
def test_path_that_leaves_its_directory_is_refused(path: str) -> None:
    with pytest.raises(UserError):
        join_path("ns", path)


@pytest.mark.parametrize(
    ("segment", "escaped"),
    [
        ("step-000010", "step-000010"),
        ("a/../../b", "a%2F..%2F..%2Fb"),
        ("..\\b", "..%5Cb"),
        ("%2e%2e", "%252e%252e"),
        ("mit Leerzeichen ü", "mit%20Leerzeichen%20%C3%BC"),
        ("~", "%7E"),
        ("...", "..."),
    ],
)
def test_segment_is_escaped_to_one_name(segment: str, escaped: str) -> None:
    assert join_key("ns", segment) == f"ns/{escaped}"


def test_different_segments_never_share_a_key() -> None:
    texts = ["a/b", "a%2Fb", "a%252Fb", "a b", "a+b", "a%20b"]
    assert len({join_key("", text) for text in texts}) == len(texts)


@pytest.mark.parametrize("segments", [["x" * 256], ["ü" * 43], ["x" * 250] * 5])
def test_key_that_no_store_can_hold_is_refused(segments: list[str]) -> None:
    with pytest.raises(UserError, match="longer than"):
        join_key("", *segments)


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b", "a b", "a\0", "a//b", "a%2fb", ".."])
def test_store_refuses_keys_that_were_not_built_by_join_key(store: ArtifactStore, key: str) -> None:
    actions: list[Any] = [
        lambda: store.put_bytes(key, b""),
        lambda: store.create(key, b""),
        lambda: store.replace(key, b"", version=""),
        lambda: store.get_bytes(key),
        lambda: store.delete(key),
        lambda: list(store.list_objects(key)),
        lambda: store.url(key),
    ]
    for action in actions:
        with pytest.raises(UserError, match="cannot be part of a storage key"):
            action()


def test_layout_of_a_job() -> None:
    job = JobLayout("team/a", "sft-abcde")
    attempt = job.attempt(2)
    assert [job.root, job.spec, job.result, job.current, job.adapter, job.merged, job.model] == [
        "team%2Fa/sft-abcde",
        "team%2Fa/sft-abcde/spec.yaml",
        "team%2Fa/sft-abcde/result.json",
        "team%2Fa/sft-abcde/current.json",
        "team%2Fa/sft-abcde/adapter",
        "team%2Fa/sft-abcde/merged",
        "team%2Fa/sft-abcde/model",
    ]
    assert attempt.metrics == "team%2Fa/sft-abcde/attempt-2/metrics.jsonl"


@pytest.mark.parametrize(
    ("writer", "output", "metrics"),
    [
        ((1, 1, True), "adapter", "attempt-1/metrics.jsonl"),
        ((1, 2, False), "attempt-1/claim-2/adapter", "attempt-1/claim-2/metrics.jsonl"),
        ((2, 2, True), "attempt-2/adapter", "attempt-2/metrics.jsonl"),
        ((2, 3, False), "attempt-2/claim-3/adapter", "attempt-2/claim-3/metrics.jsonl"),
    ],
)
def test_no_two_writers_of_a_job_have_a_key_in_common(writer: tuple[int, int, bool], output: str, metrics: str) -> None:
    job = JobLayout("team-a", "sft-abcde")
    layout = WriterLayout(job, *writer)
    assert layout.place(layout.output("adapter")) == output
    assert layout.place(layout.checkpoint(70)) == f"{metrics.removesuffix('metrics.jsonl')}checkpoints/step-000070"
    assert layout.output("adapter") == job.output(output) == f"team-a/sft-abcde/{output}"
    assert layout.metrics == f"team-a/sft-abcde/{metrics}"


def test_a_place_leaves_no_job() -> None:
    with pytest.raises(UserError):
        JobLayout("team-a", "sft-abcde").output("../other/adapter")


# Addresses


@pytest.mark.parametrize(
    "uri",
    [
        *("", "/tmp/x", "relative", "http://host/x", "file://host/x", "file:relative", "s3://", "s3:///x"),
        *(
            "s3://bucket/../x",
            "s3://bucket/a//b",
            "s3://bucket/x?y=1",
            "file:///a/../b",
            "file:///a%00b",
            "s3://k:s@b/x",
        ),
    ],
)
def test_what_is_no_address_of_a_store_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="store"):
        open_store(uri)


def test_options_of_s3_are_refused_for_a_directory(root: Path) -> None:
    with pytest.raises(UserError, match="no endpoint"):
        open_store(root.as_uri(), endpoint="http://127.0.0.1:1")


def test_address_of_a_store_opens_the_same_store(tmp_path: Path) -> None:
    store = open_store((tmp_path / "with space % ü").as_uri())
    store.put_bytes("ns/a%20b", b"content")
    assert open_store(store.uri).get_bytes("ns/a%20b") == b"content"
    assert open_store(store.url("ns")).get_bytes("a%20b") == b"content"


def test_secret_is_not_shown() -> None:
    assert "hidden" not in repr(Credentials(access_key="id", secret_key="hidden", session_token="hidden-too"))


# Directories


def test_directory_comes_back_as_it_was(store: ArtifactStore, outputs: Path, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    fetched: list[tuple[int, int]] = []
    manifest = upload_directory(store, outputs, ADAPTER, progress=lambda *now: sent.append(now))
    assert sent[-1] == (manifest.size_bytes, manifest.size_bytes)
    assert download_directory(store, ADAPTER, tmp_path / "copy", progress=lambda *now: fetched.append(now)) == manifest
    assert fetched[-1] == sent[-1]
    for path in outputs.rglob("*"):
        if path.is_file():
            assert (tmp_path / "copy" / path.relative_to(outputs)).read_bytes() == path.read_bytes()


def test_manifest_lists_every_file_with_size_and_digest(store: ArtifactStore, outputs: Path, root: Path) -> None:
    manifest = upload_directory(store, outputs, ADAPTER)
    content = json.loads((root / ADAPTER / MANIFEST).read_text())
    assert content["schema"] == 1
    assert content["created"] == manifest.created
    assert content["files"] == [
        {"path": path, "size": (outputs / path).stat().st_size, "sha256": sha256_of(outputs / path)}
        for path in ["1 pooling/config ü.json", "adapter_config.json", "adapter_model.safetensors", "empty"]
    ]


def kill_during_upload(outputs: Path, root: Path, *, after_bytes: int) -> None:
    """Upload in another process that dies by SIGKILL, as a pod does, once this many bytes are written."""
    code = f"""
import os, signal
from pathlib import Path
from hone.storage import open_store, upload_directory

def progress(done, total):
    if done >= {after_bytes}:
        os.kill(os.getpid(), signal.SIGKILL)

upload_directory(open_store({root.as_uri()!r}), Path({str(outputs)!r}), {ADAPTER!r}, progress=progress, workers=1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("after_bytes", [1, 1_500_000, 3_000_010])
def test_killed_upload_is_not_complete_and_can_be_repeated(
    store: ArtifactStore, root: Path, outputs: Path, after_bytes: int
) -> None:
    kill_during_upload(outputs, root, after_bytes=after_bytes)
    with pytest.raises((IntegrityError, NotFound)):
        verify_directory(store, ADAPTER)
    for entry in store.list_objects(ADAPTER):  # what has its name is whole
        name = Path(entry.key).name
        if (outputs / name).exists():
            assert store.get_bytes(entry.key) == (outputs / name).read_bytes()
    assert len(upload_directory(store, outputs, ADAPTER).files) == 4


def test_upload_killed_before_its_manifest_is_refused_by_name(store: ArtifactStore, root: Path, outputs: Path) -> None:
    total = sum(path.stat().st_size for path in outputs.rglob("*") if path.is_file())
    kill_during_upload(outputs, root, after_bytes=total)
    with pytest.raises(IntegrityError, match=r"adapter is not complete: it has no MANIFEST\.json"):
        verify_directory(store, ADAPTER)


def test_repeated_upload_sends_only_what_is_missing(store: ArtifactStore, root: Path, outputs: Path) -> None:
    big = outputs / "adapter_model.safetensors"
    store.put_file(big, f"{ADAPTER}/{big.name}", sha256=sha256_of(big))
    before = (root / ADAPTER / big.name).stat().st_mtime_ns
    (outputs / "adapter_config.json").write_text("[]")
    store.put_bytes(f"{ADAPTER}/adapter_config.json", b"{}")  # as long, and older
    upload_directory(store, outputs, ADAPTER)
    assert (root / ADAPTER / big.name).stat().st_mtime_ns == before
    assert store.get_bytes(f"{ADAPTER}/adapter_config.json") == b"[]"


def test_repeated_download_fetches_only_what_is_missing(store: ArtifactStore, outputs: Path, tmp_path: Path) -> None:
    upload_directory(store, outputs, ADAPTER)
    copy = tmp_path / "copy"
    download_directory(store, ADAPTER, copy)
    before = (copy / "adapter_model.safetensors").stat().st_mtime_ns
    (copy / "adapter_config.json").write_text("[]")
    (copy / "empty").unlink()
    download_directory(store, ADAPTER, copy)
    assert (copy / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert (copy / "adapter_config.json").read_text() == "{}"
    assert (copy / "empty").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_altered_byte_is_refused_by_name(
    store: ArtifactStore, root: Path, outputs: Path, tmp_path: Path, name: str, position: int
) -> None:
    upload_directory(store, outputs, ADAPTER)
    data = bytearray((root / ADAPTER / name).read_bytes())
    data[position] ^= 1
    (root / ADAPTER / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        verify_directory(store, ADAPTER)
    with pytest.raises(IntegrityError, match=name):
        download_directory(store, ADAPTER, tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()
    assert not (tmp_path / "copy" / MANIFEST).exists()
    assert not list((tmp_path / "copy").glob(".hone-*"))


def test_missing_file_is_refused_by_name(store: ArtifactStore, root: Path, outputs: Path, tmp_path: Path) -> None:
    upload_directory(store, outputs, ADAPTER)
    (root / ADAPTER / "empty").unlink()
    with pytest.raises(IntegrityError, match="empty is missing"):
        verify_directory(store, ADAPTER)
    with pytest.raises(IntegrityError, match="empty is missing"):
        download_directory(store, ADAPTER, tmp_path / "copy")


def test_complete_directory_is_never_replaced(store: ArtifactStore, outputs: Path) -> None:
    manifest = upload_directory(store, outputs, ADAPTER)
    assert upload_directory(store, outputs, ADAPTER) == manifest
    (outputs / "adapter_config.json").write_text("[]")
    with pytest.raises(StorageError, match="complete already"):
        upload_directory(store, outputs, ADAPTER)
    assert verify_directory(store, ADAPTER) == manifest


def test_directory_with_another_digest_than_was_recorded_is_refused(store: ArtifactStore, outputs: Path) -> None:
    manifest = upload_directory(store, outputs, ADAPTER)
    assert verify_directory(store, ADAPTER, digest=manifest.digest) == manifest
    with pytest.raises(IntegrityError, match=MANIFEST):
        verify_directory(store, ADAPTER, digest="0" * 64)


def test_transfer_ends_when_its_progress_raises(store: ArtifactStore, outputs: Path) -> None:
    (outputs / "another.safetensors").write_bytes(bytes(3_000_000))
    calls: list[int] = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_directory(store, outputs, ADAPTER, progress=interrupt)
    assert len(calls) == 1
    assert not any(entry.key.endswith((".safetensors", MANIFEST)) for entry in store.list_objects())


GOOD = {"path": "a", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        {"schema": 2, "created": "", "files": []},
        {"schema": 1, "created": "", "files": [{**GOOD, "path": "../outside"}]},
        {"schema": 1, "created": "", "files": [{**GOOD, "path": "/etc/passwd"}]},
        {"schema": 1, "created": "", "files": [{**GOOD, "path": 1}]},
        {"schema": 1, "created": "", "files": [{**GOOD, "size": -1}]},
        {"schema": 1, "created": "", "files": [{**GOOD, "size": True}]},
        {"schema": 1, "created": "", "files": [{**GOOD, "sha256": "abc"}]},
        {"schema": 1, "created": "", "files": [GOOD, GOOD]},
        {"schema": 1, "created": "", "files": [{**GOOD, "path": MANIFEST}]},
    ],
)
def test_manifest_that_cannot_be_trusted_is_refused(store: ArtifactStore, tmp_path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    store.put_bytes(f"{ADAPTER}/{MANIFEST}", text.encode())
    with pytest.raises(IntegrityError, match=rf"adapter/{MANIFEST}"):
        download_directory(store, ADAPTER, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_links_and_empty_directories_are_not_outputs(store: ArtifactStore, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with pytest.raises(StorageError, match="holds no file"):
        upload_directory(store, outputs, ADAPTER)
    (outputs / "link").symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match="link is not a plain file"):
        upload_directory(store, outputs, ADAPTER)
    with pytest.raises(NotFound, match="absent does not exist"):
        upload_directory(store, tmp_path / "absent", ADAPTER)


def test_file_that_changes_while_it_is_stored_is_refused(store: ArtifactStore, outputs: Path) -> None:
    with pytest.raises(IntegrityError, match="adapter_config"):
        store.put_file(outputs / "adapter_config.json", "ns/file", sha256="0" * 64)
    assert list(store.list_objects()) == []


# Pointers


def race(writers: int, write: Any) -> list[int]:
    """Let several writers start at one moment; the numbers of those that won."""
    barrier = threading.Barrier(writers)

    def run(number: int) -> bool:
        barrier.wait()
        return bool(write(number))

    with ThreadPoolExecutor(writers) as pool:
        return [number for number, won in enumerate(pool.map(run, range(writers))) if won]


@pytest.mark.parametrize("round_", range(10))
def test_of_concurrent_creations_exactly_one_wins(store: ArtifactStore, round_: int) -> None:
    winners = race(8, lambda number: store.create("ns/pointer", f"writer {number}".encode()))
    assert len(winners) == 1
    assert store.get_bytes("ns/pointer") == f"writer {winners[0]}".encode()


@pytest.mark.parametrize("round_", range(10))
def test_of_concurrent_replacements_of_one_version_exactly_one_wins(store: ArtifactStore, round_: int) -> None:
    assert store.create("pointer", b"attempt 1")
    current = store.get_versioned("pointer")
    assert current is not None
    winners = race(8, lambda number: store.replace("pointer", f"writer {number}".encode(), version=current.version))
    assert len(winners) == 1
    assert store.get_bytes("pointer") == f"writer {winners[0]}".encode()


def test_late_writer_of_an_old_version_is_refused(store: ArtifactStore) -> None:
    store.create("pointer", b"attempt 1")
    old = store.get_versioned("pointer")
    assert old is not None
    assert store.replace("pointer", b"attempt 2", version=old.version)
    assert not store.replace("pointer", b"attempt 1 again", version=old.version)
    assert store.get_bytes("pointer") == b"attempt 2"
    assert not store.replace("absent", b"", version=old.version)


# Listing and deleting


def test_prefix_names_a_directory_and_not_a_beginning(store: ArtifactStore, root: Path) -> None:
    for key in ("ns/job-1/a", "ns/job-1/b/c", "ns/job-10/a"):
        store.put_bytes(key, b"12")
    assert [entry.key for entry in store.list_objects("ns/job-1")] == ["ns/job-1/a", "ns/job-1/b/c"]
    assert [entry.size_bytes for entry in store.list_objects()] == [2, 2, 2]
    assert store.delete("ns/job-1") == 2
    assert not (root / "ns" / "job-1").exists()
    assert [entry.key for entry in store.list_objects()] == ["ns/job-10/a"]
    assert store.delete("ns/job-1") == 0
    assert store.delete("ns/job-10/a") == 1
    with pytest.raises(UserError, match="root"):
        store.delete("")


def test_deleting_takes_the_leftovers_of_a_crash_along(store: ArtifactStore, root: Path, outputs: Path) -> None:
    kill_during_upload(outputs, root, after_bytes=1)
    assert list((root / ADAPTER).rglob(".hone-tmp-*"))
    store.delete("default")
    assert list(root.iterdir()) == []


# The probe


def test_probe_of_a_good_directory_makes_it_and_leaves_nothing(store: ArtifactStore) -> None:
    store.probe()
    assert list(store.list_objects()) == []


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_probe_names_a_directory_without_the_right_to_write(store: ArtifactStore, root: Path) -> None:
    root.mkdir(mode=0o555)
    with as_nobody(), pytest.raises(StorageError, match=rf"may not write or read {root}.*HONE_STORE"):
        store.probe()


def test_probe_names_a_file_in_the_way(store: ArtifactStore, root: Path) -> None:
    root.write_text("")
    with pytest.raises(StorageError, match=rf"{root}.* is in the way"):
        store.probe()


def in_small_file_system(tmp_path: Path, options: str, code: str) -> str:
    """Run Python in a mount namespace of its own where tmp_path/small is a tmpfs; what it printed."""
    unshare = shutil.which("unshare")
    mount = tmp_path / "small"
    mount.mkdir()
    script = f'mount -t tmpfs -o {options} none "{mount}" && exec "{sys.executable}" -c "$CODE"'
    command = [unshare or "", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    probe = [unshare or "", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(mount)]
    if unshare is None or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets tests mount nothing (unshare --user --mount)")
    environment = {**os.environ, "CODE": f"from hone.storage import open_store\nfrom pathlib import Path\n{code}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_probe_names_a_full_disk(tmp_path: Path) -> None:
    code = f"""
small = Path({str(tmp_path / "small")!r})
try:
    (small / "filler").write_bytes(bytes(1 << 20))
except OSError:
    pass
try:
    open_store(small.as_uri()).probe()
except Exception as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in small.iterdir()))
"""
    error, left = in_small_file_system(tmp_path, "size=64k", code).splitlines()
    assert error.startswith(f"StorageError The disk of {tmp_path}/small/")
    assert "is full (0.0 MiB free)" in error and "hone prune" in error
    assert left == "['filler']"


def test_disk_that_fills_up_in_mid_upload_leaves_nothing_half_made(tmp_path: Path, outputs: Path) -> None:
    code = f"""
from hone.storage import upload_directory
small = Path({str(tmp_path / "small")!r})
store = open_store(small.as_uri())
try:
    upload_directory(store, Path({str(outputs)!r}), "ns/adapter")
except Exception as error:
    print(type(error).__name__, error)
print([path.name for path in small.rglob("*") if path.name.startswith((".hone", "MANIFEST", "adapter_model"))])
"""
    error, left = in_small_file_system(tmp_path, "size=1m", code).splitlines()
    # Files go up side by side: whichever meets the end of the disk first is named.
    assert error.startswith(f"StorageError The disk of {tmp_path}/small/ns/adapter/")
    assert " is full (0.0 MiB free)" in error
    assert left == "[]"


def test_probe_names_a_read_only_file_system(tmp_path: Path) -> None:
    code = f"""
try:
    open_store(Path({str(tmp_path / "small")!r}).as_uri()).probe()
except Exception as error:
    print(type(error).__name__, error)
"""
    said = in_small_file_system(tmp_path, "size=64k,ro", code)
    assert said.startswith("StorageError") and "read-only file system" in said and "HONE_STORE" in said
