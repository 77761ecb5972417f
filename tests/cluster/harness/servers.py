"""The S3 server and the PostgreSQL beside the cluster: on loopback for this machine, on a bridge for pods."""

import grp
import pwd
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from . import process
from .api import wait_until
from .places import HOST_ADDRESS, POSTGRES_PORT, RUN, S3_PORT, program

NAMES = ("s3", "postgres")
POSTGRES_STOP = signal.SIGINT
"""Its word for: end now, and leave a clean directory."""

ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret-key"
PASSWORD = "test-password"
_POSTGRES_USER = "postgres"


def start_s3() -> None:
    """versitygw over a directory; a bucket is a directory in it. What an earlier one stored is there again."""
    data, metadata = s3_directory(), RUN / "s3" / "metadata"
    data.mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    listen = [word for address in ("127.0.0.1", HOST_ADDRESS) for word in ("--port", f"{address}:{S3_PORT}")]
    command = [program("versitygw"), *listen, "--quiet", "--keep-alive", "posix", "--sidecar", str(metadata), str(data)]
    process.start("s3", command, environment={"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY})
    wait_until("the S3 server answers", lambda: _runs("s3") and _answers(f"http://127.0.0.1:{S3_PORT}"), timeout_s=30)


def s3_directory() -> Path:
    """Where buckets are."""
    return RUN / "s3" / "data"


def start_postgres() -> None:
    """PostgreSQL, as the user of Debian's package: it refuses to run as root."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    data = RUN / "postgres"
    data.mkdir()
    shutil.chown(data, _POSTGRES_USER, _POSTGRES_USER)
    password = RUN / "postgres-password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    _as_postgres(
        [
            programs / "initdb",
            "--no-sync",
            "--username=hone",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "-D",
            data,
        ]
    )
    with (data / "pg_hba.conf").open("a") as access:
        access.write("host all all 10.244.0.0/16 scram-sha-256\n")
    settings = {
        "listen_addresses": f"127.0.0.1,{HOST_ADDRESS}",
        "port": str(POSTGRES_PORT),
        "unix_socket_directories": "",
        "max_connections": "200",
        "fsync": "off",  # right for tests, wrong for a benchmark of durability
    }
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    process.start("postgres", [*_become_postgres(), str(programs / "postgres"), "-D", str(data), *words])
    wait_until("PostgreSQL answers", lambda: _runs("postgres") and _run_statement("SELECT 1") == "1", timeout_s=30)


def create_database(name: str) -> None:
    """A new, empty database."""
    _run_statement(f'CREATE DATABASE "{name}"')


def drop_database(name: str) -> None:
    """Remove it, whoever is still connected."""
    _run_statement(f'DROP DATABASE "{name}" WITH (FORCE)')


def postgres_url(host: str, database: str) -> str:
    """Address of one database, as HONE_DATABASE takes it."""
    return f"postgresql://hone:{PASSWORD}@{host}:{POSTGRES_PORT}/{database}"


def _run_statement(statement: str) -> str:
    command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "-d", postgres_url("127.0.0.1", "postgres")]
    done = subprocess.run([*command, "-c", statement], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout.strip()


def _as_postgres(command: list[str | Path]) -> None:
    done = subprocess.run([*_become_postgres(), *command], cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr}")


def _become_postgres() -> list[str]:
    user, group = pwd.getpwnam(_POSTGRES_USER), grp.getgrnam(_POSTGRES_USER)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={group.gr_gid}", "--clear-groups"]


def _runs(name: str) -> bool:
    if process.find(name) is None:
        raise process.Ended(name)
    return True


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError as error:
        error.close()  # it answers, and refuses who has no key
    return True
