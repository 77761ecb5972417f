"""Which machine of a run this is, and where its first one is met. Frozen data; pod.py reads it from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hone.job import Launch
from hone.manifests import names
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

RENDEZVOUS_S = 300.0
"""How long the nodes of a run wait for each other (HONE_RENDEZVOUS_S); shorter than people wait, longer than a
scheduler needs that has room."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a run; the defaults are those of a machine on its own."""

    rank: int = 0
    main_address: str = "127.0.0.1"
    """Name or address of the machine whose rank is 0."""
    main_port: int = 0
    """Where the ranks meet there; its supervisor listens on the next one. 0: any that is free."""
    rendezvous_s: float = RENDEZVOUS_S

    @property
    def is_main(self) -> bool:
        """Whether this machine claims, reports and publishes."""
        return self.rank == 0

    def ranks(self, launch: Launch) -> range:
        """The processes of this machine, by their number in the whole run."""
        first = self.rank * launch.processes_per_node
        return range(first, first + launch.processes_per_node)

    def check(self, launch: Launch) -> None:
        """Raise RunFailed (WRONG_WORLD) when there is no such machine in the plan."""
        if self.rank >= launch.nodes:
            raise _wrong(f"This is node {self.rank}, counted from 0, and the plan has {launch.nodes}.")
        if launch.nodes > 1 and not self.main_port:
            raise _wrong(f"{names.ENV_MAIN_ADDRESS} and {names.ENV_MAIN_PORT} are not set, and the plan has nodes.")

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Node":
        """As the manifest and Kubernetes tell it. Raises RunFailed (WRONG_WORLD) for what is no number."""
        try:
            return Node(
                rank=int(environment.get(names.ENV_NODE_RANK) or 0),
                main_address=environment.get(names.ENV_MAIN_ADDRESS) or "127.0.0.1",
                main_port=int(environment.get(names.ENV_MAIN_PORT) or 0),
                rendezvous_s=float(environment.get("HONE_RENDEZVOUS_S") or RENDEZVOUS_S),
            )
        except ValueError as error:
            raise _wrong(f"{names.ENV_NODE_RANK}, {names.ENV_MAIN_PORT} or HONE_RENDEZVOUS_S: {error}.") from error


def cores(environment: Mapping[str, str]) -> int:
    """Cores that this machine's processes may use: of a container the limit, which the kernel does not show them."""
    here = len(os.sched_getaffinity(0))
    limit = environment.get(names.ENV_CPU_LIMIT, "")
    return min(here, int(limit)) if limit.isdecimal() and int(limit) else here


def _wrong(text: str) -> RunFailed:
    return RunFailed(
        TrainerExit.WRONG_WORLD, text, fix="Render the manifest again; only Kubernetes and Hone set these."
    )
