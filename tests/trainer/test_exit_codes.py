import re
from pathlib import Path

from hone.run import FAILURE_CLASSES, TrainerExit

PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_the_page_lists_every_exit_code_of_the_trainer_with_its_class() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## The trainer")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (\d+) \| (\w+) \| (\w*) ?\|", section, re.MULTILINE)
    expected = [(str(int(code)), code.name, str(FAILURE_CLASSES.get(code, ""))) for code in TrainerExit]
    assert listed == expected
