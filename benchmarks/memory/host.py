"""Memory and disk of one machine that runs the demo, a merge and a QLoRA merge, beside what their plans said.

Each case is one `hone run` in a home of its own, on the CPU, whose trainer is looked at ten times a second: the
proportional share (PSS) of all its processes, and the bytes below its run directory and its temporary one. Printed: the
peaks, the plan's figures without its margin, and their ratios. Models have random weights; needs no network.

    python benchmarks/memory/host.py [--only TEXT] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
HONE = [sys.executable, "-c", "from hone.cli import main; main()"]
LOOK_S = 0.1
SHAPE = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 12,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32_768, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip
LORA = {"adapter": {"lora": {"rank": 16}}}


def main() -> None:
    """Run the cases and print a table."""
    arguments = _arguments()
    found = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        made = [sys.executable, "-m", "hone_trainer", "random-model", f"{place}/config.json", place]
        subprocess.run(made, check=True, cwd=place, stdout=subprocess.DEVNULL)
        for name, request in _requests(Path(place)).items():
            if arguments.only in name:
                found.append({"case": name, **run(request, Path(place) / name.replace(" ", "-"))})
                print(line(found[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _requests(place: Path) -> dict[str, dict[str, Any]]:
    import yaml

    demo = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    for part in (demo["model"], demo["dataset"]):
        for key in ("source", "eval_source"):
            if key in part:
                part[key] = f"file://{ROOT / 'examples' / part[key].removeprefix('file://')}"
    demo["training"]["max_steps"] = 40
    train = {
        "name": "host",
        "model": {"source": f"file://{place / 'model'}"},
        "dataset": {"source": f"file://{place / 'rows.jsonl'}"},
        "method": {"sft": {"max_length": 128}},
        "training": {"max_steps": 3, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-5},
        "compute": {"gpus_per_node": 0},
        "output": {"merged": True},
        **LORA,
    }
    return {"demo": demo, "lora and merge": train, "qlora and merge": {**train, "quantization": "nf4"}}


def run(request: dict[str, Any], home: Path) -> dict[str, Any]:
    """One run to its end; peaks and plan."""
    scratch = home / "tmp"
    scratch.mkdir(parents=True)
    file = home / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    environment = {**os.environ, "HONE_HOME": str(home), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*HONE, "run", str(file), "--json"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    memory, disk = 0, 0
    with tempfile.TemporaryFile() as kept:
        reader = threading.Thread(target=lambda: kept.write(process.stdout.read()))  # type: ignore[union-attr]
        reader.start()
        while process.poll() is None:
            memory = max(memory, sum(map(_pss, _trainers(home))))
            disk = max(disk, _bytes_below(home / "runs") + _bytes_below(scratch))
            time.sleep(LOOK_S)
        reader.join()
        kept.seek(0)
        job = json.load(kept)
    assert process.returncode == 0, job
    plan = job["plan"]
    margin = sum(item["size_bytes"] for item in plan["memory"] if item["name"] == "margin")
    return {
        "memory_bytes": memory,
        "planned_memory_bytes": plan["host_memory_bytes"] - margin * plan["launch"]["processes_per_node"],
        "disk_bytes": disk,
        "planned_disk_bytes": plan["disk_bytes"],
        "lines": {item["name"]: item["size_bytes"] for item in plan["memory"]},
    }


def _trainers(home: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if "hone_trainer" in " ".join(command) and str(home) in " ".join(command):
                yield process


def _pss(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0


def _bytes_below(directory: Path) -> int:
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_blocks * 512
    return total


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    words = [f"{found['case']:16}"]
    for name in ("memory", "disk"):
        planned, measured = found[f"planned_{name}_bytes"], found[f"{name}_bytes"]
        words.append(
            f"{name} {measured / 2**20:8.0f} MiB, planned {planned / 2**20:8.0f} ({planned / max(measured, 1):.2f})"
        )
    return "  ".join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args()


if __name__ == "__main__":
    main()
