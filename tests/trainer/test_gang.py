"""Supervisors of several nodes, here as threads over loopback: they meet, go on together and end together."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hone.job import Failure
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed, failure_of
from hone_trainer.gang import Gang, PeerEnded, follow_up
from hone_trainer.node import Node

from ..integration.servers import free_port

MakeGang = Callable[..., Gang]


@pytest.fixture
def make() -> Iterator[MakeGang]:
    """Makes one node's part of a gang of two, unless told otherwise."""
    port, made = free_port(), []

    def gang(rank: int, *, nodes: int = 2, request: str = "same", rendezvous_s: float = 20.0) -> Gang:
        node = Node(rank=rank, main_address="127.0.0.1", main_port=port - 1, rendezvous_s=rendezvous_s)
        made.append(Gang(node, nodes=nodes, request_hash=request))
        return made[-1]

    yield gang
    closing = [threading.Thread(target=one.close) for one in made]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def at_once(*calls: Callable[[], Any]) -> list[BaseException | None]:
    """Run calls side by side; what each raised."""
    raised: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def failure(code: TrainerExit, message: str = "x") -> Failure:
    return failure_of(RunFailed(code, message, fix="y"))


def wait_for_cause(gang: Gang) -> Failure:
    deadline = time.monotonic() + 10
    while gang.cause is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return gang.cause


def test_nodes_wait_for_each_other_twice(make: MakeGang) -> None:
    gangs = [make(rank, nodes=3) for rank in range(3)]
    assert at_once(*(gang.meet for gang in gangs)) == [None] * 3
    order: list[str] = []

    def late_download() -> None:
        time.sleep(0.5)
        order.append("fetched")
        gangs[1].ready()

    def ready(rank: int) -> None:
        gangs[rank].ready()
        order.append("go")

    assert at_once(late_download, lambda: ready(0), lambda: ready(2)) == [None] * 3
    assert order[0] == "fetched"


def test_the_first_node_may_come_last(make: MakeGang) -> None:
    def late_main() -> None:
        time.sleep(1.0)
        make(0).meet()

    assert at_once(make(1).meet, late_main) == [None, None]


def test_a_node_that_does_not_come_is_named_when_the_time_is_over(make: MakeGang) -> None:
    main, one = make(0, nodes=4, rendezvous_s=1.5), make(1, nodes=4, rendezvous_s=20)

    def give_up() -> None:
        try:
            main.meet()
        except RunFailed as error:
            main.tell(failure_of(error))
            raise

    raised = at_once(give_up, one.meet)
    assert isinstance(raised[0], RunFailed) and raised[0].code == TrainerExit.PEERS_MISSING
    assert raised[0].message.startswith("2 of 4 nodes did not come (node 2, 3) within 1.5 s")
    assert isinstance(raised[1], PeerEnded)
    told = follow_up(raised[1].failure, node=Node(rank=1))
    assert told.exit_code == TrainerExit.PEERS_MISSING


def test_without_a_first_node_nobody_waits_for_ever(make: MakeGang) -> None:
    with pytest.raises(RunFailed, match=r"Node 0 cannot be reached at 127\.0\.0\.1:\d+ .* within 0\.5 s"):
        make(1, rendezvous_s=0.5).meet()


def test_nodes_with_different_requests_do_not_start(make: MakeGang) -> None:
    raised = at_once(make(0, request="a" * 64).meet, make(1, request="b" * 64).meet)
    assert isinstance(raised[0], PeerEnded) and raised[0].failure.exit_code == TrainerExit.USER
    assert "Node 1 holds another request than node 0" in raised[0].failure.message
    assert isinstance(raised[1], PeerEnded)


def test_a_second_pod_of_a_rank_is_turned_away(make: MakeGang) -> None:
    main, one, twin = make(0, nodes=3), make(1, nodes=3), make(1, nodes=3)
    two = make(2, nodes=3)
    started = threading.Thread(target=lambda: at_once(main.meet, one.meet))
    started.start()
    deadline = time.monotonic() + 10
    while not any(peer.node == 1 for peer in main._peers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(PeerEnded) as caught:
        twin.meet()
    assert caught.value.failure.exit_code == TrainerExit.FENCED
    assert "Another pod is node 1 of this run" in caught.value.failure.message
    two.meet()
    started.join(20)
    assert main.cause is None


@pytest.mark.parametrize("failing", [0, 1])
def test_the_reason_of_one_node_reaches_all_others(make: MakeGang, failing: int) -> None:
    gangs = [make(rank, nodes=3) for rank in range(3)]
    assert at_once(*(gang.meet for gang in gangs)) == [None] * 3
    gangs[failing].tell(failure(TrainerExit.OUT_OF_MEMORY, "rank 1 ran out of memory"))
    for rank in set(range(3)) - {failing}:
        cause = wait_for_cause(gangs[rank])
        assert (cause.exit_code, cause.message) == (TrainerExit.OUT_OF_MEMORY, "rank 1 ran out of memory")
    assert gangs[failing].cause is None


def test_a_node_that_dies_without_a_word_is_missed_at_once(make: MakeGang) -> None:
    main, one = make(0), make(1)
    assert at_once(main.meet, one.meet) == [None, None]
    one._peers[0].link.shutdown(socket.SHUT_RDWR)
    cause = wait_for_cause(main)
    assert cause.exit_code == TrainerExit.PEER_LOST
    assert cause.message.startswith("Node 1 went away without a word")


def test_a_node_that_has_done_its_part_may_go(make: MakeGang) -> None:
    main, one = make(0), make(1)
    assert at_once(main.meet, one.meet) == [None, None]
    one.leave()
    one.close()
    time.sleep(0.5)
    assert main.cause is None


def test_what_is_said_last_arrives_before_the_connection_ends(make: MakeGang) -> None:
    main, one = make(0), make(1)
    assert at_once(main.meet, one.meet) == [None, None]
    one.tell(failure(TrainerExit.DATA, "row 7 has no text"))
    one.close()
    assert wait_for_cause(main).message == "row 7 has no text"


def test_strangers_do_not_disturb(make: MakeGang) -> None:
    main, one = make(0), make(1)
    meeting = threading.Thread(target=lambda: at_once(main.meet))
    meeting.start()
    address = ("127.0.0.1", main._node.main_port + 1)
    deadline = time.monotonic() + 10
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"node": 7, "hash": "x"}\n', b"[]\n", b"x" * 300_000):
        while True:
            try:
                stranger = socket.create_connection(address, timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        try:
            stranger.sendall(hello)
            assert stranger.recv(100) == b""
        except ConnectionError:
            pass
        stranger.close()
    one.meet()
    meeting.join(20)
    assert main.cause is None


def test_only_the_first_node_speaks_for_the_run() -> None:
    cause = failure(TrainerExit.DATA, "row 7 has no text")
    assert follow_up(cause, node=Node()) is cause
    other = follow_up(cause, node=Node(rank=1))
    assert other.exit_code == TrainerExit.PEER_LOST
    assert other.message == "Another node ended the run: row 7 has no text"
