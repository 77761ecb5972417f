"""The file that `hone calibrate` writes and plans of this machine read: coefficients by GPU profile, "" for a CPU.

A JSON object of objects; a platform copies it to its other machines, or names another by HONE_CALIBRATION.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hone.errors import UserError
from hone.plan.coefficients import Coefficients

_FILE = TypeAdapter(dict[str, Coefficients])
MOST_SHARE = 1.0
"""A share above it would double the plan: the file is not ours."""


class BadCalibration(UserError):
    """The file cannot be used."""

    reason = "BAD_CALIBRATION"


def read_calibration(path: Path) -> dict[str, Coefficients]:
    """What was measured, by profile; nothing where there is no file. Raises BadCalibration."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise BadCalibration(f"{path} cannot be read: {error}.", fix="Mend it, or remove it.") from error
    try:
        found = _FILE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadCalibration(f"{path}: {where}: {first['msg']}.", fix="Remove it, and run hone calibrate.") from error
    for name, one in found.items():
        if not (0 <= one.fragmentation <= MOST_SHARE and 0 <= one.margin <= MOST_SHARE):
            message = f"{path}: fragmentation and margin of {name or 'the CPU'} are shares, from 0 to {MOST_SHARE:g}."
            raise BadCalibration(message, fix="Remove it, and run hone calibrate.")
    return found


def write_calibration(path: Path, found: Mapping[str, Coefficients]) -> None:
    """Add these profiles to the file, or replace them there; whole or not at all."""
    known = read_calibration(path) | dict(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({name: asdict(one) for name, one in known.items()}, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
