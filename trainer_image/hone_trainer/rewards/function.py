"""A signal from a function of the user's own, where the platform allows it: it runs in the trainer's own process.

    def reward(prompts, completions, answer, **_):    # TRL's form: columns of the rows by name, one list each
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

It is called with the names that it takes; with `**columns` it gets every column.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hone.run import TrainerExit
from hone.spec.methods import PythonPart
from hone_trainer.failure import RunFailed
from hone_trainer.rewards.answers import Answer, SignalFailed


def open_function(part: PythonPart, path: Path, *, field: str) -> Callable[[Sequence[Answer]], list[float]]:
    """The function of a file, as a signal. Raises RunFailed (USER) where there is none that can be called."""
    function = getattr(_imported(path, field), part.function, None)
    if not callable(function):
        raise RunFailed(TrainerExit.USER, f"{field}.function: {path.name} has no function {part.function}.")
    if inspect.iscoroutinefunction(function):
        raise RunFailed(TrainerExit.USER, f"{field}.function: {part.function} is asynchronous: write an ordinary def.")
    wanted = inspect.signature(function).parameters
    return lambda answers: _numbers(_call(function, _given(answers, wanted, path), path))


def _imported(path: Path, field: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"hone_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RunFailed(TrainerExit.USER, f"{field}.file: {path.name} is no Python file.", fix="Name a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RunFailed(TrainerExit.USER, f"{field}.file: importing {path.name}: {_told(error, path)}.") from error
    return module


def _given(answers: Sequence[Answer], wanted: Mapping[str, inspect.Parameter], path: Path) -> dict[str, list[Any]]:
    """What the function takes, by name: one list each, in the order of the answers."""
    columns = {name: [answer.row.get(name) for answer in answers] for name in answers[0].row} if answers else {}
    own: dict[str, list[Any]] = {
        "prompts": [answer.prompt for answer in answers],
        "completions": [answer.text for answer in answers],
    }
    known = {**columns, **own}
    kinds = inspect.Parameter
    if any(one.kind == kinds.VAR_KEYWORD for one in wanted.values()):
        given = known
    else:
        given = {name: values for name, values in known.items() if name in wanted}
    needed = [
        name
        for name, one in wanted.items()
        if one.default is kinds.empty and one.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    if missing := [name for name in needed if name not in given]:
        raise SignalFailed(
            f"takes {', '.join(missing)}, and there are {', '.join(known)}",
            kind="column",
            code=TrainerExit.DATA,
            fix=f"Give the parameters in {path.name} the names of columns.",
        )
    return given


def _call(function: Callable[..., Any], given: Mapping[str, list[Any]], path: Path) -> Any:
    try:
        return function(**given)
    except (Exception, SystemExit) as error:
        raise SignalFailed(f"raised {_told(error, path)}", kind=type(error).__name__) from error


def _numbers(found: Any) -> list[float]:
    try:
        return [float(score) for score in found]
    except (TypeError, ValueError) as error:
        raise SignalFailed("gave something that is no list of numbers", kind="form") from error


def _told(error: BaseException, path: Path) -> str:
    """Kind, message and the last line of the file that was reached."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" (line {lines[-1]} of {path.name})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
