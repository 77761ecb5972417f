"""What the exceptions of huggingface_hub mean: which type of ours, and one sentence with its fix.

Exceptions are known by name and status, along the chain of their causes, because the library says "check your
connection" of a refusal too; nothing is imported for it. The library's own words are repeated without the queries of
addresses, which may be signatures.
"""

import re
from collections.abc import Iterator

from hone.errors import HoneError, NotFound, PermanentError, Refused, Unauthenticated, Unavailable, UserError

BUSY = frozenset({408, 425, 429})
"""Statuses below 500 that pass by themselves."""
NETWORK = frozenset({"ConnectionError", "TransportError", "TimeoutError", "gaierror"})
NETWORK_FIX = "Check the way to the Hub: the proxy (HTTPS_PROXY), or the mirror (HF_ENDPOINT)."
TOKEN_FIX = "Make a token that may write (huggingface.co/settings/tokens), and give it as HF_TOKEN."
MAX_WORDS = 300
"""Characters of the Hub's own words in a sentence of ours."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came from, the latest first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def names(error: BaseException) -> set[str]:
    """What an exception is, by the names of its types."""
    return {kind.__name__ for kind in type(error).__mro__}


def status(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def push_error(error: BaseException, *, repo: str) -> HoneError:
    """What any exception of a push means: temporary where the same push may do later, else whose turn it is."""
    for link in chain(error):
        if isinstance(link, HoneError):  # the run was asked to stop, in the middle of a call of the library
            return link
        if found := _of_status(link, repo) or _of_name(link, repo):
            return found
    return PermanentError(f"The push to {repo} failed: {type(error).__name__}: {_words(str(error))}")


def _of_status(link: BaseException, repo: str) -> HoneError | None:
    code = status(link)
    if code is None or code < 400:
        return None
    if code in BUSY or code >= 500:
        return Unavailable(f"The Hub answers {code}, to repeated requests too.", fix="Try again later.")
    if code == 401:
        return Unauthenticated("The Hub does not accept the token (401).", fix=TOKEN_FIX)
    said = _words(getattr(link, "server_message", None) or "")
    if code == 403:
        return Refused(f"The token has no right to write to {repo} (403{f': {said}' if said else ''}).", fix=TOKEN_FIX)
    if code == 404:
        return NotFound(
            f"{repo} is not on the Hub, or the token may not see it (404).", fix="Check the name, and the token."
        )
    return UserError(f"The Hub refuses the push to {repo} ({code}): {said or 'without a word'}")


def _of_name(link: BaseException, repo: str) -> HoneError | None:
    found = names(link)
    if "OfflineModeIsEnabled" in found:
        return UserError("HF_HUB_OFFLINE forbids to push.", fix="Unset it.")
    if "HFValidationError" in found:
        return UserError(f"{repo} is no repository of the Hub: {_words(str(link))}")
    if "CERTIFICATE_VERIFY_FAILED" in str(link):
        return PermanentError(
            "The certificate of the Hub, or of a proxy before it, is not trusted.",
            fix="Set SSL_CERT_FILE to the certificate of its authority.",
        )
    if found & NETWORK:
        return Unavailable(f"The Hub cannot be reached ({_words(str(link))}).", fix=NETWORK_FIX)
    if "JSONDecodeError" in found:  # a gateway's page, which the library reads before it looks at the status
        return Unavailable("The Hub answers with something else than JSON.", fix=NETWORK_FIX)
    return None


def _words(text: str) -> str:
    """Somebody else's words in one line, without the queries of addresses."""
    line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    return line if len(line) <= MAX_WORDS else f"{line[: MAX_WORDS - 1]}…"
