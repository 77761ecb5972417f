"""Real servers that tests start on loopback and always stop."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BIN = Path(__file__).resolve().parents[2] / ".servers" / "bin"
_READY_S = 20.0
_STOP_S = 5.0


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running versitygw."""

    endpoint: str
    access_key: str
    secret_key: str
    directory: Path
    """Buckets are directories here, and objects are files in them."""

    def make_bucket(self, name: str) -> Path:
        """A new, empty bucket; its directory."""
        path = self.directory / name
        path.mkdir()
        return path


def find_tool(name: str) -> str | None:
    """Path of a tool that `make servers` builds, or of the same on PATH; None when there is none."""
    return shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")


def free_port() -> int:
    """A loopback port that was free a moment ago, and the next one too: the supervisors of a gang meet there. Below the
    ports that the kernel gives to connections, any of which could take it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


@contextlib.contextmanager
def run_s3(program: str, directory: Path, *options: str) -> Iterator[S3Server]:
    """Run versitygw over a directory, with further options of its own, until the block ends."""
    port = free_port()
    data, metadata = directory / "data", directory / "metadata"
    data.mkdir()
    metadata.mkdir()
    server = S3Server(
        endpoint=f"http://127.0.0.1:{port}", access_key="test-access", secret_key="test-secret-key", directory=data
    )
    # Sidecar metadata, because not every file system for temporary files has extended attributes.
    command = [program, "--port", f"127.0.0.1:{port}", "--quiet", "--keep-alive", *options]
    command += ["posix", "--sidecar", str(metadata)]
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "ROOT_ACCESS_KEY": server.access_key,
        "ROOT_SECRET_KEY": server.secret_key,
    }
    log = directory / "versitygw.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, str(data)], env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(server.endpoint, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
            return
        except urllib.error.HTTPError as error:
            error.close()  # it answers, and refuses who has no key
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"versitygw at {endpoint} is not ready: {log.read_text(errors='replace')[-2000:]}")
