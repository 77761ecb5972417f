"""Fetch splits of a Hub data set as parquet files, in a process that may go online. Called by inputs.py."""

import sys
from pathlib import Path


def main(source: str, config: str, target: str, *splits: str) -> int:
    """Write `<target>/<split name>.parquet` for every split; a slice is left to the reader of the file."""
    from datasets import load_dataset

    repository, _, revision = source.removeprefix("hf://").partition("@")
    for name in sorted({split.partition("[")[0] for split in splits}):
        rows = load_dataset(repository, config or None, split=name, revision=revision or None)
        rows.to_parquet(Path(target) / f"{name}.parquet")
    sys.stdout.write(revision)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
