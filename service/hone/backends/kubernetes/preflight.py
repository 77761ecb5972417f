"""What a service on a cluster can look at of a request without a pod: whether the API server takes the Job, and what
lies in object stores that the service may read. Called by backend.py; the rest is the pod's to look at, first thing.
"""

from collections.abc import Iterator
from contextlib import closing

from hone.backends.kubernetes.client import Api, jobs_path
from hone.cluster import Cluster
from hone.errors import HoneError, NotFound
from hone.findings import Finding, FindingState, not_checked, of_error, ok
from hone.job import Plan
from hone.manifests import render_job
from hone.run import Run
from hone.spec.sources import bucket_and_prefix, sources
from hone.storage import ArtifactStore, open_store

_FIRST_THING = "is looked at in the pod, first thing, before a model is loaded"


def look(api: Api, cluster: Cluster, run: Run, plan: Plan) -> Iterator[Finding]:
    """Every finding."""
    try:
        api.create(jobs_path(run.namespace), render_job(run, plan, cluster, managed=True), dryRun="All")
        text = f"The API server takes its Job in namespace {run.namespace}."
        yield ok("cluster", text, how="dry run: quotas and admission policies answered, nothing was made")
    except HoneError as error:
        yield from of_error("cluster", error)
    spec = run.spec
    for path, source in sources(spec):
        if source.startswith("s3://"):
            yield _object(cluster, path, source)
    yield not_checked("model", f"{spec.model.source}: its config {_FIRST_THING}.", path="model.source")
    yield not_checked("tokenizer", f"It {_FIRST_THING}.", path="model.tokenizer")
    if spec.dataset:
        yield not_checked("data", f"Whether rows of {spec.dataset.source} fit {_FIRST_THING}.", path="dataset.source")
    if spec.output.hub:
        text = f"The token for {spec.output.hub.repo} is a Secret, which this service may not read."
        yield not_checked("hub", text, path="output.hub")


def _object(cluster: Cluster, path: str, source: str) -> Finding:
    """Whether anything lies there; a store that the service may not read says nothing of the pods' rights."""
    bucket, prefix = bucket_and_prefix(source)
    try:
        with closing(
            open_store(f"s3://{bucket}", endpoint=cluster.store.endpoint, region=cluster.store.region)
        ) as store:
            _first_bytes(store, prefix)
    except NotFound:
        text = f"there is nothing at {source}."
        return Finding(check="objects", state=FindingState.FAILED, message=text, fix="Upload it first.", path=path)
    except HoneError as error:
        return not_checked("objects", f"{source} cannot be looked at by the service: {error.message}", path=path)
    return ok("objects", f"{source} is there.", path=path, how="looked at with the service's own credentials")


def _first_bytes(store: ArtifactStore, key: str) -> None:
    """Find something below that key, or the object itself. Raises NotFound."""
    if next(iter(store.list_objects(key)), None) is None:
        with closing(store.read_chunks(key)) as chunks:
            next(chunks, None)
