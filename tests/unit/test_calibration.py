"""What is measured of a device, kept, and used by plans; what finished runs say of its speed."""

from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hone.calibration import BadCalibration, read_calibration, write_calibration
from hone.cli.calibrate import LEAST_MARGIN, Measured, coefficients
from hone.cli.plan import speeds_here
from hone.cluster import Cluster
from hone.gpus import load_profiles
from hone.job import Attempt, Job, Plan, Progress, State
from hone.modelinfo import load_shape
from hone.plan import Hardware, make_plan
from hone.plan.coefficients import LEAST_RUNS, SHIPPED, WIDER, Coefficients, Speed, speed_of
from hone.settings import Settings
from hone.spec.parse import parse
from hone.speeds import KEPT_S, LEAST_S, Speeds, speeds
from hone.store import Store

PROFILES = load_profiles()
BARE = Hardware(profiles=PROFILES, cpu_cores=2, memory_bytes=64 << 30)
FOUND = Coefficients(fragmentation=0.01, margin=0.05, flops_low=1e14, flops_high=4e14, source="on 2026-11-27")
SPEC = parse(
    {
        "name": "demo",
        "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
        "dataset": {"source": "hf://org/data"},
        "method": {"sft": {"max_length": 2048}},
        "adapter": {"lora": {}},
        "training": {"max_steps": 100, "activation_checkpointing": True},
        "compute": {"gpu": "H100-80GB", "gpus_per_node": 1},
    }
)
SHAPE = load_shape(SPEC.model.source)


def planned(**measured: Any) -> Plan:
    return make_plan(SPEC, SHAPE, replace(BARE, **measured)).plan


def test_what_was_measured_takes_the_place_of_what_is_shipped() -> None:
    before, after = planned(), planned(measured={"H100-80GB": FOUND})
    sizes = {item.name: item.size_bytes for item in after.memory}
    rest = sum(size for name, size in sizes.items() if name not in ("fragmentation", "margin"))
    assert sizes["fragmentation"] == int(rest * 0.01)
    assert sizes["margin"] == int((rest + sizes["fragmentation"]) * 0.05)
    assert after.peak_bytes < before.peak_bytes
    assert any("calibrated on H100-80GB on 2026-11-27" in note for note in after.notes)
    assert any("not calibrated" in note for note in before.notes)
    assert planned(measured={"L4": FOUND}) == before


def test_time_is_by_runs_then_by_a_calibration_then_by_the_data_sheet() -> None:
    flops = 4 * 7_248_023_552 * 16 * 2048 * 4 / 3
    assert planned().step_flops == pytest.approx(flops)
    sheet, measured = planned(), planned(measured={"H100-80GB": FOUND})
    assert sheet.seconds_low == pytest.approx(100 * flops / (989e12 * 0.42))
    assert (measured.seconds_low, measured.seconds_high) == (
        pytest.approx(100 * flops / 4e14),
        pytest.approx(100 * flops / 1e14),
    )
    runs = planned(measured={"H100-80GB": FOUND}, speeds={"H100-80GB": Speed(low=2e14, high=2.5e14, runs=7)})
    assert (runs.seconds_low, runs.seconds_high) == (
        pytest.approx(100 * flops / 2.5e14),
        pytest.approx(100 * flops / 2e14),
    )
    assert any("7 finished runs" in note for note in runs.notes)


def test_the_worst_case_of_the_grid_makes_the_margin() -> None:
    def case(allocated: int, reserved: int, planned: int, flops: float) -> Measured:
        return Measured(
            case="x",
            step_s=1.0,
            flops_per_second=flops,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            planned_bytes=planned,
        )

    found = coefficients([case(100, 110, 100, 3e14), case(104, 106, 100, 2e14), case(80, 84, 100, 4e14)], source="now")
    assert found.fragmentation == pytest.approx(0.10)
    assert found.margin == pytest.approx(0.04 + LEAST_MARGIN)
    assert (found.flops_low, found.flops_high, found.source) == (2e14, 4e14, "now")
    generous = coefficients([case(80, 84, 100, 1e14)], source="now")
    assert generous.margin == LEAST_MARGIN


def test_without_a_gpu_only_speed_is_known() -> None:
    found = coefficients([Measured(case="x", step_s=1.0, flops_per_second=1e10)], source="now")
    assert found == replace(SHIPPED, flops_low=1e10, flops_high=1e10, source="now")


def test_the_file_keeps_other_profiles(tmp_path: Path) -> None:
    path = tmp_path / "home" / "calibration.json"
    assert read_calibration(path) == {}
    write_calibration(path, {"L4": FOUND})
    write_calibration(path, {"": SHIPPED})
    write_calibration(path, {"L4": replace(FOUND, margin=0.06)})
    assert read_calibration(path) == {"L4": replace(FOUND, margin=0.06), "": SHIPPED}
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"L4": {"margin": "wide"}}', "L4.margin"),
        ('{"L4": {"margin": 8}}', "fragmentation and margin of L4 are shares"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadCalibration, match=message):
        read_calibration(path)


def test_a_platform_gives_it_with_its_cluster() -> None:
    data = {
        "image": "x",
        "store": {"uri": "s3://models"},
        "calibration": {"H100-80GB": {"fragmentation": 0.01, "margin": 0.05}},
    }
    [found] = Cluster.model_validate(data).hardware().measured.values()
    assert (found.fragmentation, found.margin, found.flops_low) == (0.01, 0.05, None)


def test_few_runs_say_nothing_and_many_lose_their_odd_ones() -> None:
    assert speed_of([1.0] * (LEAST_RUNS - 1)) is None
    found = speed_of([5.0, 6.0, 7.0])
    assert found == Speed(low=5.0 / WIDER, high=7.0 * WIDER, runs=3)
    odd = speed_of([0.1, *[5.0] * 10, 99.0])
    assert odd == Speed(low=5.0 / WIDER, high=5.0 * WIDER, runs=12)


def job(seconds: float, *, attempts: int = 1, step: int = 100) -> Job:
    now = datetime(2026, 11, 27, tzinfo=UTC)
    ran = Attempt(
        number=1,
        nonce="x",
        state=State.SUCCEEDED,
        create_time=now,
        start_time=now,
        end_time=now + timedelta(seconds=seconds),
    )
    return Job(
        namespace="default",
        id="demo-x",
        uid="1",
        requested_spec=SPEC,
        resolved_spec=SPEC,
        plan=planned(),
        state=State.SUCCEEDED,
        state_reason="",
        creator="",
        create_time=now,
        update_time=now,
        version=1,
        attempts=(ran,) * attempts,
        progress=Progress(step=step),
    )


def test_runs_count_that_trained_in_one_go_for_a_while() -> None:
    flops = planned().step_flops
    assert flops is not None
    told = [job(1000), job(2000), job(1250), job(LEAST_S - 1), job(1000, attempts=2), job(1000, step=0)]
    [(gpu, found)] = speeds(told).items()
    assert gpu == "H100-80GB"
    assert found == Speed(low=100 * flops / 2000 / WIDER, high=100 * flops / 1000 * WIDER, runs=3)
    assert speeds(told[:2]) == {}


def test_a_plan_of_this_machine_knows_the_runs_of_its_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert speeds_here(settings) == {} and not settings.database_file.exists()
    with closing(Store(settings.database_url)) as records:
        for number in range(3):
            ended = job(1000)
            [ran] = ended.attempts
            records.create(replace(ended, id=f"demo-{number}", uid=str(number), state=State.RUNNING, attempts=()))
            with records.change("default", f"demo-{number}", now=ended.create_time) as change:
                change.add_attempt(ran)
                change.set(progress=ended.progress)
                change.to_state(State.SUCCEEDED, "Done.")
    assert speeds_here(settings) == speeds([job(1000)] * 3) != {}
    settings.database_file.write_bytes(b"no database" * 100)
    assert speeds_here(settings) == {}


def test_the_store_is_asked_once_in_a_while() -> None:
    asked, now = [], [0.0]

    def finished(limit: int) -> list[Job]:
        asked.append(limit)
        return [job(1000)] * 3

    known = Speeds(finished, clock=lambda: now[0])
    assert known() == known() and len(asked) == 1
    now[0] = KEPT_S + 1
    known()
    assert len(asked) == 2
