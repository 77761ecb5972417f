"""The trainer's entry: `python -m hone_trainer COMMAND`, each called by a part of the service, and by people.

run DIRECTORY: the local backend starts it, one for each machine; ends with a TrainerExit code and exit.json. pod: the
same in a pod, where the environment says what is to be run. inspect FILE: what a request's data set becomes (lengths,
dropped rows, one rendered row), without a model. preflight FILE: whether all that it names is there and fits together.
answer: answers prompts with the outputs of jobs, for `hone try`. random-model: what `hone calibrate` measures a machine
with. Answers are JSON on stdout; no command imports torch before it must.
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the answer is the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hone_trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the attempt that a directory describes")
    run.add_argument("directory", type=Path, help="holds run.yaml")
    commands.add_parser("pod", help="run the attempt that this pod's manifest describes")
    inspect = commands.add_parser("inspect", help="tell what the data set of a request becomes, as JSON")
    inspect.add_argument("file", type=Path, help="a request, or a run file")
    preflight = commands.add_parser("preflight", help="look at everything that a request names, as JSON")
    preflight.add_argument("file", type=Path, help="a request, or a run file")
    preflight.add_argument("--elsewhere", action="store_true", help="it will run on machines with rights of their own")
    model = commands.add_parser("random-model", help="make a model of random weights, and rows for it")
    model.add_argument("file", type=Path, help="its config.json")
    model.add_argument("directory", type=Path, help="where it goes")
    commands.add_parser("answer", help="answer prompts with the outputs of jobs; JSON lines on stdin and stdout")
    parsed = parser.parse_args(arguments)
    if parsed.command == "run":
        from hone_trainer.supervisor import supervise

        return int(supervise(parsed.directory.absolute()))
    if parsed.command == "pod":
        from hone_trainer import pod

        return pod.main()
    if parsed.command == "answer":
        from hone_trainer import trial

        return trial.main()
    if parsed.command == "preflight":
        from hone_trainer.preflight import preflight_file

        return int(preflight_file(parsed.file, elsewhere=parsed.elsewhere))
    if parsed.command == "random-model":
        from hone_trainer import random_model

        return int(random_model.make(parsed.file, parsed.directory))
    from hone_trainer.inspection import inspect_file

    return int(inspect_file(parsed.file))


if __name__ == "__main__":
    sys.exit(main())
