"""Settings of the service and of local runs: environment variables HONE_*, with defaults that work on a laptop."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _data_home() -> Path:
    import os

    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "hone"


class Settings(BaseSettings):
    """Everything that can be set from outside."""

    model_config = SettingsConfigDict(env_prefix="HONE_", frozen=True, extra="ignore", use_attribute_docstrings=True)

    home: Path = Field(default_factory=_data_home)
    """Where the database, runs, artefacts and caches of this machine are."""
    store: str = ""
    """Root of the artefact store, `s3://bucket/prefix` or `file:///directory`; default: `artifacts` in home."""
    store_endpoint: str = ""
    """Endpoint of an S3-compatible store; credentials come from the usual AWS_* variables."""
    database: str = ""
    """SQLAlchemy URL; default: SQLite in home."""
    address: str = "127.0.0.1:7465"
    """Where `hone serve` listens; an address that other machines can reach needs a certificate and authentication."""
    tls_cert: Path | None = None
    """Certificate of the service with its chain, PEM; read again when it changes. Absent: plain text, on loopback."""
    tls_key: Path | None = None
    """Its key, PEM."""
    auth: Literal["", "kubernetes", "none"] = ""
    """kubernetes: callers need a bearer token of the audience `hone`, and rights on Jobs; none: everybody on this
    machine may do everything. Default: kubernetes where other machines can reach the address, else none."""
    http_address: str = ""
    """Address of /healthz, /readyz and /metrics, as 127.0.0.1:8080; they tell no secrets. Default: none is served."""
    cluster: Path | None = None
    """The platform's file (the chart's `cluster:`): with it jobs run on Kubernetes; without, on this machine."""
    server: str = ""
    """Address of the service that the CLI and Client talk to; default: the one that owns home, else this process."""
    namespace: str = "default"
    """Namespace of jobs when the caller names none."""
    gpu_profiles: Path | None = None
    """A file of GPU profiles that replaces the shipped one."""
    calibration: Path | None = None
    """What `hone calibrate` measured; default: `calibration.json` in home."""
    trainer_python: str = ""
    """Python that runs the trainer of local runs; default: the one that runs this."""
    python_rewards: bool = False
    """Whether a request's own Python functions (rewards.python) may run in the trainers of this machine, as the user
    that runs the service."""
    grace_s: float = 30.0
    """Seconds between SIGTERM and SIGKILL for a local run."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: Literal["text", "json"] = "text"
    """How the service's own log is written; each line names namespace and job."""

    @property
    def store_uri(self) -> str:
        """Root of the artefact store."""
        return self.store or (self.home / "artifacts").absolute().as_uri()

    @property
    def calibration_path(self) -> Path:
        """Where coefficients are kept."""
        return self.calibration or self.home / "calibration.json"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database or f"sqlite:///{self.database_file.absolute()}"

    @property
    def database_file(self) -> Path:
        """Where SQLite is, unless `database` names another one."""
        return self.home / "hone.db"
