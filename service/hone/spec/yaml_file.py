"""YAML files that people write, read strictly: plain data only, and no key twice."""

import json
from pathlib import Path
from typing import Any

import yaml

from hone.errors import InvalidRequest, Violation


def read_documents(path: Path) -> list[Any]:
    """What a YAML or JSON file holds. Raises InvalidRequest: missing, not readable, not YAML, a key given twice."""
    try:
        return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_StrictLoader))
    except FileNotFoundError as error:
        raise single_fault("", str(path), f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise single_fault("", str(path), f"{path} is a directory; name the file in it.") from error
    except (UnicodeDecodeError, PermissionError) as error:
        raise single_fault("", str(path), f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise single_fault("", str(path), f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def single_fault(path: str, value: Any, message: str) -> InvalidRequest:
    """An error of one violation."""
    return InvalidRequest([Violation(path=path, value=value, message=message)])


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the first would be lost without a word."""


def _strict_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [json.dumps(loader.construct_object(key, deep=True), default=str) for key, _ in node.value]
    if doubled := [key for key in keys if keys.count(key) > 1]:
        raise yaml.constructor.ConstructorError(None, None, f"the key {doubled[0]} is given twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)
