"""Fail when a wheel lacks what an installation needs: both packages, migrations, the schema, shipped tables."""

import sys
import zipfile

NEEDED = (
    "hone/py.typed",
    "hone/spec/job.schema.json",
    "hone/gpus.yaml",
    "hone/modelinfo/shapes.yaml",
    "hone/report/page.html.jinja",
    "hone/store/migrations/env.py",
    "hone/v1/training_service_pb2_grpc.py",
    "hone_trainer/__main__.py",
    "hone_trainer/py.typed",
)


def main(path: str) -> int:
    """Compare the wheel's names with NEEDED; nothing but the two packages may be in it."""
    names = zipfile.ZipFile(path).namelist()
    missing = [name for name in NEEDED if name not in names]
    strange = [name for name in names if not name.startswith(("hone/", "hone_trainer/", "hone_tuning-"))]
    sys.stdout.write(f"{path}: {len(names)} files, missing {missing or 'none'}, strange {strange or 'none'}\n")
    return 1 if missing or strange else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
