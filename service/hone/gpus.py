"""GPU profiles: what the planner may choose from.

Read once by the service and the CLI from the shipped gpus.yaml, or from a platform's own file in its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from hone.errors import UserError

Interconnect = Literal["pcie", "nvlink"]

MIN_MEMORY_BYTES = 2**30
"""A file that gives GiB or MiB in place of bytes is caught by this."""


class BadProfiles(UserError):
    """A file of GPU profiles with mistakes; the message holds every one, with its line."""

    reason = "BAD_GPU_PROFILES"


class UnknownGpu(UserError):
    """No profile has this name."""

    reason = "UNKNOWN_GPU"


@dataclass(frozen=True, kw_only=True)
class GpuProfile:
    """One kind of GPU, and the nodes that hold it."""

    name: str
    memory_bytes: int
    """What CUDA reports as total memory."""
    gpus_per_node: int
    interconnect: Interconnect
    """Between the GPUs of one node."""
    bf16: bool
    """Whether the hardware computes in bfloat16."""
    dense_tflops: float
    """TFLOP/s without sparsity, in bf16, or in float32 where there is no bf16."""
    product_label: str
    """Value of the node label nvidia.com/gpu.product."""


_FIELDS = {field.name for field in fields(GpuProfile)} - {"name"}


def load_profiles(path: Path | None = None) -> dict[str, GpuProfile]:
    """Name → profile, in the order of the file; without a path the shipped ones.

    Raises BadProfiles with every mistake of the file.
    """
    try:
        text = (files("hone").joinpath("gpus.yaml") if path is None else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadProfiles(f"GPU profiles cannot be read from {path}: {error}.", fix="Name a YAML file.") from error
    return _parse(text, source="gpus.yaml" if path is None else str(path))


def find_profile(profiles: Mapping[str, GpuProfile], name: str) -> GpuProfile:
    """By name or by product label, without regard to case. Raises UnknownGpu with the names that exist."""
    known = {key.lower(): profile for profile in profiles.values() for key in (profile.product_label, profile.name)}
    if profile := known.get(name.lower()):
        return profile
    begun = [profile.name for profile in profiles.values() if name and profile.name.lower().startswith(name.lower())]
    close = begun or [known[match].name for match in get_close_matches(name.lower(), known, n=1)]
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise UnknownGpu(f"there is no GPU profile {name!r}.", fix=f"{hint}Known: {', '.join(profiles)}.")


def _parse(text: str, *, source: str) -> dict[str, GpuProfile]:
    problems: list[str] = []
    try:
        profiles = _profiles(text, problems)
    except yaml.YAMLError as error:
        raise BadProfiles(f"{source} is not plain YAML: {error}.", fix="Mend that line.") from error
    if problems:
        raise BadProfiles(f"{source} has {len(problems)} mistake(s):\n  " + "\n  ".join(problems))
    return profiles


def _profiles(text: str, problems: list[str]) -> dict[str, GpuProfile]:
    """The profiles that are right; what is wrong with the others is added to `problems`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    profiles: dict[str, GpuProfile] = {}
    if not isinstance(root, yaml.MappingNode) or not root.value:
        problems.append("line 1: there is no GPU profile; write one mapping, name → fields")
        return profiles
    for key, value in root.value:
        name = str(key.value)
        if name in profiles:
            problems.append(f"line {_line(key)}: {name} stands here a second time")
        elif profile := _profile(name, key, value, problems):
            profiles[name] = profile
    return profiles


def _profile(name: str, key: yaml.Node, node: yaml.Node, problems: list[str]) -> GpuProfile | None:
    """The profile, or None with what is wrong added to `problems`."""
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"line {_line(key)}: {name} needs fields: {', '.join(sorted(_FIELDS))}")
        return None
    before = len(problems)
    values: dict[str, Any] = {}
    for field, value in node.value:
        if field.value not in _FIELDS:
            close = get_close_matches(str(field.value), _FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"fields are {', '.join(sorted(_FIELDS))}"
            problems.append(f"line {_line(field)}: {name}.{field.value} is no field; {hint}")
            continue
        given = yaml.SafeLoader("").construct_object(value, deep=True)
        values[field.value] = given
        if wrong := _wrong(field.value, given):
            problems.append(f"line {_line(value)}: {name}.{field.value} is {given!r}; {wrong}")
    missing = sorted(_FIELDS - values.keys())
    problems += [f"line {_line(key)}: {name}.{field} is missing" for field in missing]
    return GpuProfile(name=name, **values) if len(problems) == before else None


def _wrong(field: str, value: Any) -> str:
    """What the field takes, when the value is none of it."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = isinstance(value, float) or whole
    rules = {
        "memory_bytes": (whole and value >= MIN_MEMORY_BYTES, "it takes whole bytes, at least 1 GiB (1073741824)"),
        "gpus_per_node": (whole and 1 <= value <= 1024, "it takes a whole number from 1 to 1024"),
        "interconnect": (value in ("pcie", "nvlink"), "it takes pcie or nvlink"),
        "bf16": (isinstance(value, bool), "it takes true or false"),
        "dense_tflops": (number and 0 < value < 1e6, "it takes TFLOP/s above 0"),
        "product_label": (isinstance(value, str) and value, "it takes the text of the node label"),
    }
    right, wanted = rules[field]
    return "" if right else wanted


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
