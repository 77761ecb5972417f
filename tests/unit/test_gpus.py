from pathlib import Path

import pytest

from hone.gpus import BadProfiles, UnknownGpu, find_profile, load_profiles

GOOD = """\
Mine:
  memory_bytes: 42_949_672_960
  gpus_per_node: 2
  interconnect: pcie
  bf16: true
  dense_tflops: 100
  product_label: NVIDIA-Mine
"""


def test_shipped_profiles_hold_what_cuda_reports_and_never_more_than_the_name_says() -> None:
    profiles = load_profiles()
    named_gib = {"T4": 16, "V100-32GB": 32, "L4": 24, "A10": 24, "A10G": 24, "RTX-3090": 24, "RTX-4090": 24}
    named_gib |= {
        "RTX-5090": 32,
        "A100-40GB": 40,
        "A100-80GB": 80,
        "L40S": 48,
        "H100-80GB": 80,
        "H200": 141,
        "B200": 180,
    }
    assert list(profiles) == list(named_gib)
    for name, gib in named_gib.items():
        assert 0.90 * gib < profiles[name].memory_bytes / 2**30 < gib, name


def test_shipped_profiles_say_bf16_for_every_card_since_ampere() -> None:
    assert [name for name, profile in load_profiles().items() if not profile.bf16] == ["T4", "V100-32GB"]


def test_shipped_product_labels_are_distinct_label_values() -> None:
    labels = [profile.product_label for profile in load_profiles().values()]
    assert len(set(labels)) == len(labels)
    assert all(label.replace("-", "").isalnum() and len(label) <= 63 for label in labels)


def test_a_platforms_file_replaces_the_shipped_profiles(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(GOOD)
    profiles = load_profiles(path)
    assert list(profiles) == ["Mine"]
    assert profiles["Mine"].memory_bytes == 40 * 2**30
    assert profiles["Mine"].dense_tflops == 100


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("42_949_672_960", "40", "line 2: Mine.memory_bytes is 40; it takes whole bytes"),
        ("42_949_672_960", "40GiB", "line 2: Mine.memory_bytes is '40GiB'"),
        ("node: 2", "node: 0", "line 3: Mine.gpus_per_node is 0"),
        ("pcie", "sli", "line 4: Mine.interconnect is 'sli'; it takes pcie or nvlink"),
        ("true", "1", "line 5: Mine.bf16 is 1; it takes true or false"),
        ("100", ".nan", "line 6: Mine.dense_tflops is nan"),
        ("NVIDIA-Mine", "[a]", "line 7: Mine.product_label is ['a']"),
        ("bf16", "bf_16", "line 5: Mine.bf_16 is no field; did you mean bf16?"),
        ("  bf16: true\n", "", "line 1: Mine.bf16 is missing"),
        (GOOD, "- Mine\n", "line 1: there is no GPU profile"),
        (GOOD, "", "line 1: there is no GPU profile"),
        (GOOD, "Mine: 80\n", "line 1: Mine needs fields"),
        (GOOD, GOOD + GOOD, "line 8: Mine stands here a second time"),
        (GOOD, "Mine: {bf16: ]\n", "line 1, column"),
        ("true", "!!python/name:os.system ''", "line 5, column"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_field(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(BadProfiles) as error:
        load_profiles(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(GOOD.replace("pcie", "sli").replace("true", "maybe"))
    with pytest.raises(BadProfiles, match=r"2 mistake\(s\)"):
        load_profiles(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadProfiles, match=r"none\.yaml"):
        load_profiles(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["H100-80GB", "h100-80gb", "NVIDIA-H100-80GB-HBM3"])
def test_a_profile_is_found_by_name_or_product_label(name: str) -> None:
    assert find_profile(load_profiles(), name).name == "H100-80GB"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("H100", "Did you mean H100-80GB?"),
        ("A100", "A100-40GB or A100-80GB?"),
        ("RTX4090", "RTX-4090?"),
        ("", "Known: T4"),
    ],
)
def test_an_unknown_gpu_is_answered_with_the_likely_ones(name: str, hint: str) -> None:
    with pytest.raises(UnknownGpu) as error:
        find_profile(load_profiles(), name)
    assert hint in str(error.value)
