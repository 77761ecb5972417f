"""Whether a Job of the right name is the one that was meant: what was rendered against what is there.

Pure; called by backend.py when a name is taken. Labels, annotations and hashes can be written by everybody in the
namespace and prove nothing; the nonce was stored before anything was made, and the pod template cannot be changed
afterwards. Values that the API server or a platform's webhook adds are left out of account.
"""

from collections.abc import Iterator
from typing import Any

from hone.backends.kubernetes.objects import Json, job_view
from hone.manifests.names import ANNOTATION_SPEC
from hone.run import Run

_JOB_FIELDS = ("backoffLimit", "completions", "parallelism", "completionMode", "podReplacementPolicy")
_POD_FIELDS = ("restartPolicy", "serviceAccountName", "automountServiceAccountToken", "subdomain")


def is_of(run: Run, found: Json) -> bool:
    """Whether the Job carries this attempt's nonce."""
    return job_view(found).nonce == run.nonce


def first_difference(wanted: Json, found: Json) -> str:
    """Path of the first field that is not as it was rendered; empty when it is the same Job."""
    return next(_differences(wanted["spec"], found.get("spec", {})), "")


def _differences(wanted: Json, found: Json) -> Iterator[str]:
    yield from (f"spec.{name}" for name in _JOB_FIELDS if name in wanted and wanted[name] != found.get(name))
    template, other = wanted["template"], found.get("template", {})
    text = template["metadata"]["annotations"][ANNOTATION_SPEC]
    if text != ((other.get("metadata") or {}).get("annotations") or {}).get(ANNOTATION_SPEC):
        yield f"spec.template.metadata.annotations[{ANNOTATION_SPEC}]"
    pod, others = template["spec"], other.get("spec", {})
    yield from (f"spec.template.spec.{name}" for name in _POD_FIELDS if name in pod and pod[name] != others.get(name))
    containers = {container["name"]: container for container in others.get("containers") or ()}
    for container in pod["containers"]:
        path = f"spec.template.spec.containers[{container['name']}]"
        yield from _in_container(container, containers.get(container["name"]), path)


def _in_container(wanted: Json, found: Json | None, path: str) -> Iterator[str]:
    if found is None:
        yield path
        return
    yield from (f"{path}.{name}" for name in ("command", "args") if wanted.get(name) != found.get(name))
    if not _is_same_image(wanted["image"], str(found.get("image"))):
        yield f"{path}.image"
    variables = {variable["name"]: variable for variable in found.get("env") or ()}
    for variable in wanted.get("env") or ():
        if not _is_within(variable, variables.get(variable["name"])):
            yield f"{path}.env[{variable['name']}]"


def _is_same_image(wanted: str, found: str) -> bool:
    """A platform's webhook may pin a tag to its digest."""
    return wanted == found or found.startswith((f"{wanted}@", f"{wanted.rpartition(':')[0]}@"))


def _is_within(wanted: Any, found: Any) -> bool:
    """Whether everything that was rendered is there, whatever else is."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_is_within(value, found.get(key)) for key, value in wanted.items())
    return bool(wanted == found) or (wanted in ("", None) and found in ("", None))
