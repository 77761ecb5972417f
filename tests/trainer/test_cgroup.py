from pathlib import Path

import pytest

from hone_trainer.cgroup import memory_kills

V1 = "9:name=systemd:/\n4:memory:/kubepods/pod1/c1\n0::/\n"
V2 = "0::/kubepods.slice/c1\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("own", "file", "text"),
    [
        (V2, "kubepods.slice/c1/memory.events", "low 0\nhigh 0\noom 3\noom_kill 2\n"),
        (V2, "memory.events", "oom 3\noom_kill 2\n"),
        (V1, "memory/kubepods/pod1/c1/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
        (V1, "memory/memory.oom_control", "oom_kill_disable 0\noom_kill 2\n"),
    ],
)
def test_kills_for_want_of_memory_are_counted_wherever_the_group_is_seen_from(
    tmp_path: Path, own: str, file: str, text: str
) -> None:
    write(tmp_path / "own", own)
    write(tmp_path / "groups" / file, text)
    assert memory_kills(tmp_path / "groups", tmp_path / "own") == 2


def test_a_machine_that_counts_nothing_says_nothing(tmp_path: Path) -> None:
    assert memory_kills(tmp_path, tmp_path / "absent") == 0
    write(tmp_path / "own", V2)
    assert memory_kills(tmp_path, tmp_path / "own") == 0


def test_this_machine_can_be_asked() -> None:
    assert memory_kills() >= 0
