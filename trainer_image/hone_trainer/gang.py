"""The nodes of one run: their supervisors meet before anything is fetched, go on together, and end together.

Every node keeps one connection to the main node's supervisor, JSON objects line by line. It is for what the ranks'
own connections cannot do: notice within seconds that a node is missing, dead or holds another request, while gloo and
NCCL would wait for half an hour; and carry the reason of the node that failed first to all others, which only see that
a peer went away.

    gang.meet()      every node is there, with the same request, within the rendezvous deadline
    gang.ready()     every node has its inputs
    gang.cause       why another node ended, once it has; looked at while the ranks run
    gang.tell(…)     why this one ended
    gang.leave()     this one has done its part: others may go

A node that another one's end stops has no reason of its own: its failure is PEER_LOST, and says whose it is.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hone.job import Failure
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed, failure_from_json, failure_of, failure_to_json
from hone_trainer.node import Node
from hone_trainer.report import say

CAUSE_S = 15.0
"""How long a node that only sees a peer go waits to be told why."""
_POLL_S = 0.5
_CONNECT_S = 5.0
_CLOSE_S = 1.0
_MAX_LINE = 256 * 1024
_SILENCE_S = 40
"""A connection whose other end does not even answer the kernel's questions for so long is lost."""


class PeerEnded(RunFailed):
    """Another node ended; `failure` is why, as far as it is known."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(TrainerExit(failure.exit_code or TrainerExit.PEER_LOST), failure.message)


class Alone:
    """A run of one node."""

    cause: Failure | None = None

    def meet(self) -> None:
        """There is nobody to wait for."""

    def ready(self) -> None:
        """There is nobody to wait for."""

    def tell(self, failure: Failure) -> None:
        """There is nobody to tell."""

    def wait_for_cause(self) -> Failure | None:
        """There is no other node to blame."""
        return None

    def leave(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class _Peer:
    """One connection."""

    link: socket.socket
    node: int | None = None
    """None until it has said who it is."""
    is_ready: bool = False
    has_left: bool = False
    rest: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, **message: Any) -> None:
        """Send one message; a connection that is broken shows when it is read."""
        with suppress(OSError), self.lock:
            self.link.sendall(json.dumps(message).encode() + b"\n")


class Gang:
    """This node's part; one thread reads every connection. `on_end` is called there, once, when another node ended."""

    def __init__(self, node: Node, *, nodes: int, request_hash: str, on_end: Callable[[], None] = lambda: None) -> None:
        self._node, self._nodes, self._hash = node, nodes, request_hash
        self._deadline = time.monotonic() + node.rendezvous_s
        self._on_end = on_end
        self._changed = threading.Condition()
        self._peers: list[_Peer] = []
        self._met = self._is_ready = self._all_ready = self._has_left = self._is_closed = False
        self.cause: Failure | None = None
        """Why another node ended; None while all go on."""
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def meet(self) -> None:
        """Wait until every node is there with the same request. Raises PeerEnded, and RunFailed (PEERS_MISSING)."""
        if self._node.is_main:
            self._listen()
        else:
            self._peers = [_Peer(self._connect(), node=0)]
            self._watch(self._peers[0])
        self._thread = threading.Thread(target=self._read_on, name="gang", daemon=True)
        self._thread.start()
        if not self._node.is_main:
            self._peers[0].send(node=self._node.rank, hash=self._hash)
        self._wait(lambda: self._met, deadline=self._deadline)
        self._wait_for_name()
        say(f"All {self._nodes} nodes are there.")

    def ready(self) -> None:
        """Wait until every node has what it needs. Raises PeerEnded; nobody is hurried."""
        if not self._node.is_main:
            self._peers[0].send(ready=True)
        with self._changed:
            self._is_ready = True
            self._decide()
        self._wait(lambda: self._all_ready, deadline=None)

    def tell(self, failure: Failure) -> None:
        """Say why this node ended; the main one passes it on."""
        with self._changed:
            peers = list(self._peers)
        for peer in peers:
            peer.send(failure=failure_to_json(failure))

    def wait_for_cause(self) -> Failure | None:
        """Why another node ended, when it says so in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.cause is not None, CAUSE_S)
        return self.cause

    def leave(self) -> None:
        """This node has done its part; what becomes of others is no concern of it any more."""
        with self._changed:
            self._has_left = True
            peers = list(self._peers)
        for peer in peers:
            peer.send(left=True)

    def close(self) -> None:
        """End the connections; what was said last still arrives."""
        with self._changed:
            self._has_left = True
            for peer in self._peers:
                with suppress(OSError):
                    peer.link.shutdown(socket.SHUT_WR)
            self._changed.wait_for(lambda: not self._peers, _CLOSE_S)
            self._is_closed = True
        if self._thread:
            self._thread.join(2 * _POLL_S)
        for peer in self._peers:
            peer.link.close()
        if self._listener:
            self._listener.close()
        self._selector.close()

    def _listen(self) -> None:
        address, port = self._node.main_address, self._node.main_port + 1
        host = address if address in ("127.0.0.1", "localhost") else ""
        dual = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (host, port), family=family, dualstack_ipv6=dual, backlog=self._nodes + 8
            )
        except OSError as error:
            message = f"Port {port} of the first node cannot be listened on: {error.strerror}."
            raise RunFailed(TrainerExit.WRONG_WORLD, message, fix="Give the run another HONE_MAIN_PORT.") from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def _connect(self) -> socket.socket:
        """Until the first node can be found and listens: it may start later, and its name is published after that."""
        place = (self._node.main_address, self._node.main_port + 1)
        while True:
            try:
                link = socket.create_connection(place, timeout=_CONNECT_S)
                link.settimeout(None)
                return link
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise self._missing(f"Node 0 cannot be reached at {place[0]}:{place[1]} ({error})") from error
            time.sleep(_POLL_S)

    def _wait_for_name(self) -> None:
        """The ranks of this node use it next."""
        while True:
            try:
                socket.getaddrinfo(self._node.main_address, self._node.main_port)
                return
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise self._missing(f"The name {self._node.main_address} is not known ({error})") from error
            time.sleep(_POLL_S)

    def _watch(self, peer: _Peer) -> None:
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            peer.link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        peer.link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000)
        self._selector.register(peer.link, selectors.EVENT_READ, peer)

    def _wait(self, done: Callable[[], bool], *, deadline: float | None) -> None:
        with self._changed:
            while not done() and self.cause is None:
                left = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
                if left <= 0:
                    raise self._missing(self._who_is_missing())
                self._changed.wait(left)
            if self.cause is not None:
                raise PeerEnded(self.cause)

    def _who_is_missing(self) -> str:
        if not self._node.is_main:
            return "Node 0 is there, and waits for others"
        here = {peer.node for peer in self._peers}
        missing = [str(rank) for rank in range(1, self._nodes) if rank not in here]
        shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        return f"{len(missing)} of {self._nodes} nodes did not come (node {shown})"

    def _missing(self, what: str) -> RunFailed:
        return RunFailed(
            TrainerExit.PEERS_MISSING,
            f"{what} within {self._node.rendezvous_s:g} s, so the run gives back what it holds.",
            fix="Look at the pods of its Job: a pod that finds no place is Pending. Kueue or a gang scheduler places "
            "all pods or none.",
        )

    def _read_on(self) -> None:
        while not self._is_closed:
            try:
                found = self._selector.select(_POLL_S)
            except (OSError, ValueError):  # closed meanwhile
                return
            for key, _ in found:
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            link, _ = self._listener.accept()
            link.setblocking(True)
            peer = _Peer(link)
            self._watch(peer)
            with self._changed:
                self._peers.append(peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.link.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._lose(peer)
            return
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        for line in lines:
            try:
                self._heard(peer, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self._lose(peer)  # nobody of ours
                return
        if len(peer.rest) > _MAX_LINE:
            self._lose(peer)

    def _heard(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.node is None:
            self._admit(peer, int(message["node"]), str(message["hash"]))
        elif "failure" in message:
            self._end(failure_from_json(message["failure"]), but=peer)
        with self._changed:
            peer.is_ready |= bool(message.get("ready"))
            peer.has_left |= bool(message.get("left"))
            self._met |= bool(message.get("met"))
            self._all_ready |= bool(message.get("go"))
            self._decide()
            self._changed.notify_all()

    def _admit(self, peer: _Peer, node: int, request_hash: str) -> None:
        """A node says who it is: one that is expected, has not come yet, and holds the same request."""
        if not 0 < node < self._nodes:
            raise ValueError(f"there is no node {node}")
        taken = any(other.node == node for other in self._peers)
        if taken:
            error = RunFailed(TrainerExit.FENCED, f"Another pod is node {node} of this run; this one stops.")
            peer.send(failure=failure_to_json(failure_of(error)))
            raise ValueError(error.message)
        peer.node = node
        if request_hash != self._hash:
            error = RunFailed(
                TrainerExit.USER,
                f"Node {node} holds another request than node 0 (SHA-256 {request_hash[:12]}… and {self._hash[:12]}…).",
                fix="Somebody edited it between their starts: apply the manifest again.",
            )
            self._end(failure_of(error))

    def _decide(self) -> None:
        """On the main node: what all have done, all are told."""
        if not self._node.is_main:
            return
        known = [peer for peer in self._peers if peer.node is not None]
        if not self._met and len(known) == self._nodes - 1:
            self._met = True
            for peer in known:
                peer.send(met=True)
        if self._met and not self._all_ready and self._is_ready and all(peer.is_ready for peer in known):
            self._all_ready = True
            for peer in known:
                peer.send(go=True)

    def _lose(self, peer: _Peer) -> None:
        with suppress(KeyError, ValueError, OSError):
            self._selector.unregister(peer.link)
        peer.link.close()
        with self._changed:
            if peer in self._peers:
                self._peers.remove(peer)
            self._changed.notify_all()
        if peer.node is None or peer.has_left:
            return
        error = RunFailed(
            TrainerExit.PEER_LOST,
            f"Node {peer.node} went away without a word: its pod was killed, or its machine or the network failed.",
            fix="Look at that pod and its machine.",
        )
        self._end(failure_of(error))

    def _end(self, failure: Failure, *, but: _Peer | None = None) -> None:
        """Another node ended: the first reason counts, and the main node passes it on."""
        with self._changed:
            if self.cause is not None or self._has_left or self._is_closed:
                return
            self.cause = failure
            others = [peer for peer in self._peers if peer is not but and peer.node is not None]
            self._changed.notify_all()
        if self._node.is_main:
            for peer in others:
                peer.send(failure=failure_to_json(failure))
        self._on_end()


def follow_up(cause: Failure, *, node: Node) -> Failure:
    """What a node says of its own end when another one's failure caused it.

    The first node speaks for the run, so it says the cause itself, and so does every node of a gang that never formed.
    """
    if node.is_main or cause.exit_code in (TrainerExit.PEERS_MISSING, TrainerExit.FENCED):
        return cause
    return failure_of(
        RunFailed(TrainerExit.PEER_LOST, f"Another node ended the run: {cause.message}", fix=cause.next_step)
    )
