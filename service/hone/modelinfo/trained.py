"""What fine-tuning trains of a model: which layers an adapter targets, and how many parameters that is.

The rules are PEFT's: a plain name matches a module's path from a dot on, a regular expression matches the whole path.
Two differ. A target that matches nothing is an error, because somebody meant something by it. And `all-linear` is the
linear layers alone, where PEFT 0.21 adds fused experts and the router of Mixtral; so the trainer gives PEFT the paths
of what was selected, not the word.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Literal

from hone.modelinfo.pattern import compile_pattern
from hone.modelinfo.shape import Linear, ModelShape, Module, UnknownModule


def select(layers: Iterable[Linear], targets: Sequence[str], *, exclude: Sequence[str] = ()) -> tuple[Linear, ...]:
    """The layers that an adapter targets, narrowed to the numbers that match, in order of depth.

    A target is `all-linear` (without the head), `attention`, a plain name (`q_proj`, `layers.0.self_attn.q_proj`) or
    `re:<regular expression>` over whole paths. `exclude` takes modules_to_save, which PEFT never adapts too.
    Raises UnknownModule for a target that matches nothing, BadPattern for an expression that cannot be used.
    """
    layers = tuple(layers)
    patterns = {target: _pattern(target, layers) for target in targets if target.startswith("re:")}
    matched = {target: [_matching(target, layer, patterns.get(target)) for layer in layers] for target in targets}
    for target, numbers in matched.items():
        if not any(numbers):
            raise UnknownModule(
                f"target module {target!r} matches no linear layer of this model.",
                fix=f"{_names_that_exist(target, layers)} Other modules are trained in full by modules_to_save.",
            )
    chosen = []
    for index, layer in enumerate(layers):
        wanted = {number for numbers in matched.values() for number in numbers[index]}
        kept = {number for number in wanted if not (exclude and _saved(layer.path.format(number), exclude))}
        if len(kept) == layer.count:
            chosen.append(layer)
        elif kept:
            chosen.append(replace(layer, layers=tuple(sorted(kept))))
    return tuple(chosen)


def lora_parameters(layers: Iterable[Linear], *, rank: int) -> int:
    """Parameters that LoRA trains: rank · Σ (in + out).

    Source: Hu et al. 2021, section 4.1. Fully trained modules (modules_to_save) are counted by their own function.
    """
    return sum(rank * layer.count * (layer.in_features + layer.out_features) for layer in layers)


def dora_parameters(layers: Iterable[Linear]) -> int:
    """What DoRA trains on top of LoRA: one magnitude for each output. Source: Liu et al. 2024, section 4.1."""
    return sum(layer.count * layer.out_features for layer in layers)


def bias_parameters(shape: ModelShape, layers: Iterable[Linear], *, mode: Literal["none", "all", "lora_only"]) -> int:
    """Biases that PEFT's `bias` option trains: every bias of the model, or those of the targeted layers."""
    chosen: Iterable[Module] = {"none": (), "all": shape.modules, "lora_only": layers}[mode]
    return sum(module.count * module.biases for module in chosen)


def saved_module_parameters(shape: ModelShape, names: Sequence[str]) -> int:
    """Parameters of modules_to_save: PEFT trains a full copy of each, so a tied head counts in full.

    A name matches every module or parent whose path ends with it, without regard to dots, as in PEFT: `norm` is also
    `input_layernorm`. Raises UnknownModule for a name that matches nothing.
    """
    total = 0
    found: set[str] = set()
    for module in shape.modules:
        for path in module.paths():
            owners = {name for name in names if any(parent.endswith(name) for parent in _with_parents(path))}
            found |= owners
            total += module.weights + module.biases if owners else 0
    for name in names:
        if name not in found:
            raise UnknownModule(
                f"modules_to_save names {name!r}, and this model has no such module.",
                fix=_names_that_exist(name, shape.modules),
            )
    return total


def token_row_parameters(shape: ModelShape, count: int, *, with_head: bool) -> int:
    """Parameters of the rows of `count` new tokens: in the embedding, and in a head that is not tied to it."""
    return count * shape.hidden_size * (2 if with_head and not shape.tied_embeddings else 1)


def _matching(target: str, layer: Linear, pattern: re.Pattern[str] | None) -> Sequence[int]:
    """Numbers of the layers in which the target names this module."""
    if pattern is not None:
        return [number for number in layer.layers if pattern.fullmatch(layer.path.format(number))]
    if target in ("all-linear", "attention"):
        wanted = layer.role != "head" if target == "all-linear" else layer.role == "attention"
        return layer.layers if wanted else ()
    if any(part.isdigit() for part in target.split(".")):
        return [number for number in layer.layers if f".{layer.path.format(number)}".endswith(f".{target}")]
    return layer.layers if f".{layer.path}".endswith(f".{target}") else ()


def _pattern(target: str, layers: Sequence[Linear]) -> re.Pattern[str]:
    longest = max((len(path) for layer in layers for path in layer.paths()), default=0)
    return compile_pattern(target.removeprefix("re:"), longest_path=longest)


def _saved(path: str, names: Sequence[str]) -> bool:
    """Whether a module of modules_to_save is this module or one of its parents."""
    return any(f".{name}." in f".{path}." for name in names)


def _with_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _names_that_exist(wanted: str, modules: Iterable[Module]) -> str:
    names = list(dict.fromkeys(module.name for module in modules))
    close = get_close_matches(wanted, names, n=1)
    return f"{f'Did you mean {close[0]}? ' if close else ''}It has {', '.join(names)}."
