"""One service in a process of its own, for tests that kill it: `service_process.py SCENARIO SPEC.yaml`.

It does what a caller of that scenario does, once: what an earlier process of the same home did is found by the request
id. It ends with the state of the job on stdout.
"""

import sys
import time
from pathlib import Path

from hone.errors import NotFound
from hone.job import State
from hone.jobs import Jobs
from hone.service import open_service
from hone.settings import Settings
from hone.spec.parse import load


def main(scenario: str, spec_file: Path) -> None:
    """Run the scenario to its end."""
    with open_service(Settings()) as service:
        jobs = service.jobs
        state = to_the_end(jobs, spec_file, scenario)
    sys.stdout.write(state)


def to_the_end(jobs: Jobs, spec_file: Path, scenario: str) -> str:
    """Submit, perhaps cancel, or pause the first attempt and resume, wait, perhaps delete."""
    try:
        job = jobs.create("default", load(spec_file), request_id="the one request")
        while not (job := jobs.get("default", job.id)).state.is_terminal:
            has_begun = job.progress and job.progress.step
            if scenario == "cancel" and has_begun:
                jobs.cancel("default", job.id)
            if scenario == "pause" and has_begun and len(job.attempts) == 1 and job.state == State.RUNNING:
                jobs.pause("default", job.id)
            if job.state == State.PAUSED:
                jobs.resume("default", job.id)
            time.sleep(0.05)
        if scenario != "delete":
            return str(job.state)
        jobs.delete("default", job.id, artifacts=True)
        while True:
            jobs.get("default", job.id)
            time.sleep(0.05)
    except NotFound:
        return "DELETED"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
