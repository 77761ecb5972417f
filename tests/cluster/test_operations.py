"""docs/operations.md, executed: its blocks in their order, in one shell, against the cluster."""

import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from .conftest import describe
from .harness.access import Cluster
from .harness.places import BIN, ROOT
from .inputs import upload_inputs
from .installation import volume

PAGE = ROOT / "docs/operations.md"
_BLOCK = re.compile(r"^```sh(?P<skip> skip)?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the page calls SYSTEM and TENANT."""

    system: str
    tenant: str


def blocks() -> list[tuple[str, str]]:
    """(heading, commands) of each block that is executed."""
    text = PAGE.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        if not block["skip"]:
            heading = re.findall(r"^#+ (.*)$", text[: block.start()], re.MULTILINE)[-1]
            found.append((heading, block["text"]))
    return found


def test_every_block_of_commands_says_whether_it_is_executed() -> None:
    fences = re.findall(r"^```(.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences) <= {"sh", "sh skip", "json"}
    assert len(blocks()) >= 10


@pytest.fixture
def names(cluster: Cluster) -> Iterator[Names]:
    """Names that nobody else uses, with a volume for the database; nothing of them is left."""
    code = secrets.token_hex(3)
    found = Names(system=f"ops-{code}", tenant=f"team-{code}")
    if cluster.is_ours:
        with volume(cluster, found.system, "hone-data"):
            yield found
    else:
        yield found
    for namespace in (found.system, found.tenant):
        cluster.kubectl("delete", "namespace", namespace, "--wait=false", "--ignore-not-found")
    for what in ("clusterrole/hone-tenant", "clusterrolebinding/hone-reviews"):
        cluster.kubectl("delete", what, "--ignore-not-found")


@pytest.mark.timeout(_TIMEOUT_S + 60)
def test_the_page_does_what_it_says(cluster: Cluster, names: Names, tmp_path: Path) -> None:
    service, _, tag = cluster.service_image.rpartition(":")
    bucket = f"ops-{names.system}"
    cluster.s3.make_bucket(bucket)
    for name in ("helm", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "KUBECONFIG": str(cluster.kubeconfig),
        "HOME": str(tmp_path),
        "SERVICE_IMAGE": service,
        "TRAINER_IMAGE": cluster.trainer_image.rpartition(":")[0],
        "TAG": tag,
        "STORE": f"s3://{bucket}/hone",
        "STORE_ENDPOINT": cluster.s3.pod_endpoint,
        "STORE_KEY_ID": cluster.s3.access_key,
        "STORE_KEY": cluster.s3.secret_key,
        "TENANT_KEY_ID": cluster.s3.access_key,
        "TENANT_KEY": cluster.s3.secret_key,
        "SYSTEM": names.system,
        "TENANT": names.tenant,
        "REQUEST": str(_request(cluster, bucket, tmp_path)),
    }
    script = tmp_path / "page.sh"
    script.write_text(_script())
    said = tmp_path / "page.log"
    with said.open("wb") as output:
        done = subprocess.run(
            ["bash", script], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    if done.returncode:
        for namespace in (names.system, names.tenant):
            describe(cluster, namespace)
    assert done.returncode == 0, said.read_text(errors="replace")[-6000:]


def _request(cluster: Cluster, bucket: str, directory: Path) -> Path:
    (directory / "inputs").mkdir()
    path = directory / "request.yaml"
    path.write_text(yaml.safe_dump(upload_inputs(cluster.s3, bucket, directory / "inputs")))
    return path


def _script() -> str:
    """All blocks in one shell that stops at the first failure and leaves no process behind."""
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for heading, text in blocks():
        lines += [f"echo '### {heading}'", "set -x", text.rstrip(), "{ set +x; } 2>/dev/null"]
    return "\n".join(lines) + "\n"
