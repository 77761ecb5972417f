"""The HONE_* variables, as commands read them: a wrong one is told as a sentence."""

from typing import TYPE_CHECKING

from hone.errors import InvalidRequest, Violation

if TYPE_CHECKING:
    from hone.settings import Settings


def read_settings() -> "Settings":
    """The settings. Raises InvalidRequest that names each variable that cannot be read, with its value."""
    from pydantic import ValidationError

    from hone.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        raise InvalidRequest(
            [
                Violation(
                    path=f"HONE_{'_'.join(map(str, detail['loc'])).upper()}",
                    value=detail["input"],
                    message=f"{detail['input']!r}: {detail['msg']}. Correct or unset this environment variable.",
                )
                for detail in error.errors(include_url=False)
            ]
        ) from error
