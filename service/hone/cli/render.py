"""`hone render`: a request as the manifest that `kubectl apply` runs, with no service anywhere.

The manifest goes to stdout and nothing else does; what has to be there before it can run is told on stderr.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.console import remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.options import Namespace, Overrides, RequestFile
from hone.cli.plan import not_served, print_alternatives, print_plan
from hone.cli.request import FileRefused, about, load
from hone.errors import InvalidRequest, UserError, Violation

if TYPE_CHECKING:
    from hone.cluster import Cluster
    from hone.plan import Planned
    from hone.spec import JobSpec

NAMESPACE_ACCOUNT = "default"
"""ServiceAccount that every namespace has: what is used where no platform names one."""

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="What the platform decides: the chart's values, or their `cluster:`."
    ),
]
Image = Annotated[str, typer.Option(metavar="IMAGE", help="The trainer image, in place of the one in --config.")]
StoreUri = Annotated[
    str, typer.Option("--store", metavar="URI", help="s3://bucket/prefix, in place of the one in --config.")
]
ModelConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The model's config.json, where its source cannot be read from here."),
]
WithTenant = Annotated[
    bool, typer.Option("--with-tenant", help="Print also what a namespace needs once: ServiceAccount and Service.")
]


def render(
    file: RequestFile,
    overrides: Overrides = None,
    config: ConfigFile = None,
    image: Image = "",
    store: StoreUri = "",
    model_config: ModelConfig = None,
    with_tenant: WithTenant = False,
    namespace: Namespace = "",
) -> int:
    """Print a request as a Kubernetes Job, for `kubectl apply -f -`. Starts nothing, needs no service and no cluster.

    The same request, platform and version give the same bytes. Ends with 1 when the plan does not fit.
    """
    from hone.manifests import applied_run, refuse, render_job, render_tenant, to_yaml

    spec = load(file, overrides)
    cluster = _cluster(config, image, store)
    with about(file):
        planned = _plan(spec, cluster, model_config)
    if not planned.plan.fits:
        print_plan(remarks(), planned.spec, planned.plan)
        print_alternatives(remarks(), planned.plan)
        return ExitCode.FAILED
    try:
        refuse(planned.spec, planned.plan, cluster)
    except InvalidRequest as error:
        raise FileRefused(file.name, error.violations) from error
    run = applied_run(planned, cluster, namespace=_namespace(namespace))
    objects = render_tenant(run.namespace, cluster) if with_tenant else []
    objects.append(render_job(run, planned.plan, cluster, managed=False))
    typer.echo(_head(file, overrides, planned) + to_yaml(objects), nl=False)
    for note in _notes(spec, planned, cluster, run.namespace, tenant_too=with_tenant):
        remarks().print(note)
    return ExitCode.DONE


def _cluster(config: Path | None, image: str, store: str) -> "Cluster":
    """The platform's file with the options in place of its fields, or the options alone."""
    from hone.cluster import load_cluster, parse_cluster

    if config is None:
        if not image or not store:
            raise UserError(
                "A manifest names the trainer image and the artefact store, which the platform decides.",
                fix="Give --config FILE (the chart's values, or a file with image and store), or --image and --store.",
            )
        return parse_cluster({"image": image, "store": {"uri": store}, "service_account": NAMESPACE_ACCOUNT})
    try:
        return load_cluster(config, image=image, store_uri=store)
    except InvalidRequest as error:
        raise FileRefused(config.name, error.violations, cannot="be used") from error


def _plan(spec: "JobSpec", cluster: "Cluster", model_config: Path | None) -> "Planned":
    """The plan for the cluster's hardware; this machine's own plays no part."""
    from hone.machine import plan_here
    from hone.modelinfo import load_shape
    from hone.plan import make_plan

    if model_config:
        directory = model_config if model_config.is_dir() else model_config.parent
        return make_plan(spec, load_shape(directory.absolute().as_uri()), cluster.hardware())
    try:
        return plan_here(spec, cluster.hardware())
    except InvalidRequest as error:
        raise InvalidRequest([_with_option(violation) for violation in error.violations]) from error


def _with_option(violation: Violation) -> Violation:
    if violation.path != "model.source":
        return violation
    return replace(violation, message=f"{violation.message} Or give its config.json with --model-config FILE.")


def _namespace(given: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    from hone.spec import words

    name = given or read_settings().namespace
    try:
        return str(TypeAdapter(words.Namespace).validate_python(name))
    except ValidationError as error:
        raise UserError(f"{name!r} is not a namespace.", fix="Write lower-case letters, digits and hyphens.") from error


def _head(file: Path, overrides: list[str] | None, planned: "Planned") -> str:
    """For who finds the manifest later; one line each, whatever line breaks or controls a value has."""
    changed = "".join(f" --set {override}" for override in overrides or ())
    made = f"# Made by hone render from {file.name}{changed}. {planned.plan.sentence}"
    shown = "".join(letter if letter.isprintable() else " " for letter in made)
    return f"{shown}\n# To change it, change that file and render again.\n"


def _notes(
    spec: "JobSpec", planned: "Planned", cluster: "Cluster", namespace: str, *, tenant_too: bool
) -> Iterator[str]:
    yield planned.plan.sentence
    yield from (f"warning: {warning}" for warning in planned.plan.warnings)
    if unserved := not_served(spec):
        yield f"warning: the trainer of this version ends at once: {unserved}"
    if spec.output.hub and not cluster.hub.token_secret:
        yield "warning: output.hub will not be pushed: no Secret is named for the Hub's token (hub.token_secret)."
    if "@sha256:" not in cluster.image:
        yield f"note: {cluster.image} is a tag, which may name another image tomorrow; name it by digest (@sha256:…)."
    if needs := [f"  {need}" for need in _needs(planned, cluster, tenant_too=tenant_too)]:
        yield "\n".join([f"Namespace {namespace} must have:", *needs])
    yield f"Next: kubectl apply -f - · kubectl -n {namespace} logs -f job/{spec.name}"


def _needs(planned: "Planned", cluster: "Cluster", *, tenant_too: bool) -> Iterator[str]:
    secret, token = cluster.store.secret_name, cluster.hub.token_secret
    if secret:
        yield f"Secret {secret} with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif cluster.store.uri.startswith("s3://"):
        yield (
            f"a workload identity for ServiceAccount {cluster.service_account}, since no Secret is named for "
            f"{cluster.store.uri} (store.secret_name in --config)"
        )
    if token:
        yield f"Secret {token.name} with {token.key}"
    for name in cluster.image_pull_secrets:
        yield f"Secret {name} to pull the image with"
    if cluster.ca_config_map:
        yield f"ConfigMap {cluster.ca_config_map.name} with {cluster.ca_config_map.key}"
    if tenant_too:
        return
    if cluster.service_account != NAMESPACE_ACCOUNT:
        yield f"ServiceAccount {cluster.service_account} (--with-tenant prints it)"
    if planned.plan.launch.nodes > 1:
        yield "the headless Service hone-workers (--with-tenant prints it)"
