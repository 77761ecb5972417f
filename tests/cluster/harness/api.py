"""Words to the API server: kubectl as a person would use it, its answers as JSON."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar


class KubectlFailed(AssertionError):
    """kubectl ended with an error; the text is its own."""


@dataclass(frozen=True, kw_only=True)
class Kubectl:
    """kubectl with one kubeconfig."""

    program: str
    kubeconfig: Path

    def __call__(
        self, *words: str, namespace: str | None = None, stdin: str | None = None, timeout_s: float = 60
    ) -> str:
        """Run it; its standard output. Raises KubectlFailed with what it said."""
        command = [self.program, f"--kubeconfig={self.kubeconfig}", *(["-n", namespace] if namespace else []), *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise KubectlFailed(f"kubectl {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def get(self, *words: str, namespace: str | None = None) -> dict[str, Any]:
        """`kubectl get … -o json`, parsed."""
        answer: dict[str, Any] = json.loads(self("get", *words, "-o", "json", namespace=namespace))
        return answer

    def items(self, *words: str, namespace: str | None = None) -> list[dict[str, Any]]:
        """The objects of a list."""
        items: list[dict[str, Any]] = self.get(*words, namespace=namespace)["items"]
        return items

    def apply(self, *objects: dict[str, Any], namespace: str | None = None) -> str:
        """`kubectl apply` of objects."""
        bundle = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        return self("apply", "-f", "-", namespace=namespace, stdin=json.dumps(bundle))


_Seen = TypeVar("_Seen")


def wait_until(what: str, look: Callable[[], _Seen | None], *, timeout_s: float, every_s: float = 0.2) -> _Seen:
    """Look until there is something true to see, and return it; a look that fails has seen nothing."""
    deadline = time.monotonic() + timeout_s
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if seen := look():
                return seen
        except (KubectlFailed, OSError, subprocess.TimeoutExpired) as error:
            last = error
        time.sleep(every_s)
    raise TimeoutError(f"{what}: not within {timeout_s:g} s{f' ({last})' if last else ''}")
