"""An instruction data set out of Python's own standard library: what does this function do?

Called by `make demo` and by people; needs nothing but Python. It reads source files and never imports them.

    train.jsonl, eval.jsonl    {"prompt": "What does shutil.copyfile(src, dst) do?\\n", "completion": "Copy …"}
    pairs.jsonl                {"prompt": …, "chosen": …, "rejected": …}: a row of train, and its words mixed
    documentation.jsonl        {"module": …, "text": …}: what make_base.py learns from
    stamp.json                 how they were made, with sha256; a second run that finds it true does nothing

A whole top-level module is in train or in eval, by crc32 of its name. No answer of eval stands in train or in
documentation.jsonl, so the loss on eval is the loss on text that no step has seen.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import random
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

HERE = Path(__file__).resolve().parent
FORMAT = 3  # raise it when the rows change: finished output of an older format is then made again
EVAL_BUCKETS = (0,)  # of ten: the modules whose crc32 ends in one of these are held out
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PROMPT_CHARS = (12, 160)
COMPLETION_CHARS = (16, 240)


@dataclass(frozen=True)
class Item:
    """One function, class or module with its docstring."""

    module: str
    name: str
    """Qualified name without the module; empty for the module itself."""
    kind: str
    """module, class, property or function."""
    arguments: str
    """What stands between the parentheses: parameters, or base classes."""
    docstring: str


def main() -> None:
    arguments = parse_arguments()
    settings = {"format": FORMAT, "python": sys.version.split()[0], "source": str(arguments.source)}
    if is_complete(arguments.output, settings):
        print(f"  data      found in {shown(arguments.output)}, nothing to do (--force makes it again)")
        return
    print(f"  data      reading the standard library of Python {settings['python']} …", flush=True)
    items = read_library(arguments.source)
    rows = make_rows(items)
    train, held_out = split_rows(rows)
    if not train or not held_out:
        sys.exit(
            f"  data      {arguments.source} gives {len(train)} rows for train and {len(held_out)} for eval, "
            "and both need some: name a larger library with --source (default: the library of this Python)."
        )
    documents = list(documentation(items, held_out))
    write_files(
        arguments.output,
        settings,
        {
            "train.jsonl": unmarked(train),
            "eval.jsonl": unmarked(held_out),
            "pairs.jsonl": list(pairs(unmarked(train))),
            "documentation.jsonl": documents,
        },
    )
    num_modules = {name: len({row["module"] for row in part}) for name, part in (("train", train), ("eval", held_out))}
    print(
        f"  data      {len(items):,} docstrings → {len(train):,} train ({num_modules['train']} modules), "
        f"{len(held_out):,} eval ({num_modules['eval']} modules) → {shown(arguments.output)}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder with the library's source (default: the standard library of this Python)",
    )
    parser.add_argument(
        "--output", type=Path, default=HERE / "data" / "stdlib", help="folder to write (default: examples/data/stdlib)"
    )
    parser.add_argument("--force", action="store_true", help="make it again, even if it is complete")
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"--source {arguments.source}: no such folder")
    if arguments.force:
        shutil.rmtree(arguments.output, ignore_errors=True)
    return arguments


# Reading


def read_library(source: Path) -> list[Item]:
    """Every docstring under a folder, in the order of its files' names."""
    items: list[Item] = []
    for path in sorted(source.rglob("*.py")):
        module = module_name(path.relative_to(source))
        if module is None:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # lib2to3 and others ship files that are wrong on purpose
        docstring = ast.get_docstring(tree)
        if docstring:
            items.append(Item(module, "", "module", "", docstring))
        items.extend(definitions(tree, module))
    return items


def module_name(path: Path) -> str | None:
    """`email/mime/text.py` → `email.mime.text`; None for what is no module of the library."""
    parts = path.with_suffix("").parts
    if NOT_LIBRARY & set(parts) or not all(part.isidentifier() for part in parts):
        return None
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def definitions(node: ast.AST, module: str, outer: str = "", in_class: bool = False) -> Iterator[Item]:
    """Every class and function below a node that has a docstring, also those under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from definitions(child, module, outer, in_class)
            continue
        name = f"{outer}{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            yield Item(module, name, kind_of(child), arguments_of(child, in_class), docstring)
        yield from definitions(child, module, f"{name}.", isinstance(child, ast.ClassDef))


def kind_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return "property" if decorators & {"property", "cached_property"} else "function"


def arguments_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> str:
    """Parameters as a caller sees them: without annotations, without self."""
    if isinstance(node, ast.ClassDef):
        return ", ".join(ast.unparse(base) for base in node.bases)
    parameters = node.args
    for parameter in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs):
        parameter.annotation = None
    for star in (parameters.vararg, parameters.kwarg):
        if star:
            star.annotation = None
    positional = parameters.posonlyargs or parameters.args
    if in_class and positional and positional[0].arg in ("self", "cls", "mcls", "metacls"):
        del positional[0]
        surplus = len(parameters.defaults) - len(parameters.posonlyargs) - len(parameters.args)
        del parameters.defaults[: max(surplus, 0)]  # the default of a removed parameter
    return ast.unparse(parameters)


# Rows


def make_rows(items: Iterable[Item]) -> list[dict[str, str]]:
    """One row for each item whose question and first paragraph are neither tiny nor huge; no answer twice."""
    rows, seen = [], set()
    for item in items:
        prompt, completion = question(item), first_paragraph(item.docstring)
        if not fits(prompt, PROMPT_CHARS) or not fits(completion, COMPLETION_CHARS) or not is_prose(completion):
            continue
        if same(completion) in seen:
            continue
        seen.add(same(completion))
        rows.append({"module": item.module.split(".")[0], "prompt": prompt + "\n", "completion": completion})
    return rows


def question(item: Item) -> str:
    name = f"{item.module}.{item.name}"
    return {
        "module": f"What is the module {item.module}?",
        "class": f"What is the class {name}({item.arguments})?",
        "property": f"What is {name}?",
        "function": f"What does {name}({item.arguments}) do?",
    }[item.kind]


def first_paragraph(docstring: str) -> str:
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def fits(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]


def is_prose(text: str) -> bool:
    """Words, not a doctest, a ruler or a grammar's production."""
    words = [word for word in text.split() if word.strip("'\"().,:;`").isalpha()]
    return ">>>" not in text and len(words) >= 3 and len(words) >= len(text.split()) / 2


def same(text: str) -> str:
    """Two answers with the same key count as one."""
    return text.casefold().rstrip(". ")


def split_rows(rows: Iterable[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and eval, by module."""
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for row in rows:
        (held_out if is_held_out(row["module"]) else train).append(row)
    return train, held_out


def is_held_out(module: str) -> bool:
    return crc32(module.split(".")[0].encode()) % 10 in EVAL_BUCKETS


def unmarked(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def pairs(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Each answer is preferred to its own words in another order."""
    for row in rows:
        words = row["completion"].split(" ")
        mixed = random.Random(crc32(row["completion"].encode())).sample(words, len(words))
        if mixed != words:
            yield {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(mixed)}


# Documentation


def documentation(items: Iterable[Item], held_out: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Signature and whole docstring of every item of the training modules, unless an answer of eval stands in it."""
    answers = [same(row["completion"]) for row in held_out]
    for item in items:
        text = inspect.cleandoc(item.docstring).strip()
        if is_held_out(item.module):
            continue
        flat = same(" ".join(text.split()))
        if any(answer in flat for answer in answers):
            continue
        yield {"module": item.module, "text": f"{heading(item)}\n{text}"}


def heading(item: Item) -> str:
    if item.kind == "module":
        return f"module {item.module}"
    keyword = {"class": "class", "property": "property", "function": "def"}[item.kind]
    brackets = "" if item.kind == "property" else f"({item.arguments})"
    return f"{keyword} {item.module}.{item.name}{brackets}"


# Files


def is_complete(output: Path, settings: dict[str, object]) -> bool:
    """The stamp says the same settings, and every file is there as it was written."""
    try:
        stamp = json.loads((output / "stamp.json").read_text())
        return bool(stamp["settings"] == settings) and all(
            sha256(output / name) == digest for name, digest in stamp["sha256"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def write_files(output: Path, settings: dict[str, object], files: dict[str, list[dict[str, str]]]) -> None:
    """All files and their stamp, in place at once: an interrupted run leaves nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (made / name).write_text("".join(lines), encoding="utf-8")
        stamp = {"settings": settings, "sha256": {name: sha256(made / name) for name in files}}
        (made / "stamp.json").write_text(json.dumps(stamp, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shown(path: Path) -> str:
    """As a person would type it from where they stand."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
