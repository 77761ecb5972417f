"""Why the Hub did not give what was asked, as a reason of ours: whether to ask again, or to mend the request.

Called where hf:// sources are fetched. Exceptions are known by name, along the chain of their causes, because the
libraries say "check your connection" of a refusal too; nothing is imported for it.
"""

import errno
from collections.abc import Iterator

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed, first_line

_BUSY = frozenset({408, 425, 429})
_NO_SUCH = frozenset({"DatasetNotFoundError", "HFValidationError"})
_NETWORK = frozenset({"ConnectionError", "TransportError", "TimeoutError", "gaierror"})
_VAGUE = frozenset({"LocalEntryNotFoundError"})
"""Says that the cache lacks it, whatever kept the Hub from giving it: what it came from tells."""

_NAME_FIX = "Check the name and revision; a gated or private repository needs HF_TOKEN in the environment."
_NETWORK_FIX = "Check the way to the Hub: the proxy (HTTPS_PROXY), or the mirror (HF_ENDPOINT)."


def hub_failure(error: BaseException, *, field: str, source: str, otherwise: TrainerExit) -> RunFailed:
    """What an exception of huggingface_hub or datasets means; `otherwise` is the code of one that is not the Hub's."""
    asked = f"{field}: {source}"
    chain = list(_chain(error))
    for link in chain:
        if failed := _meaning(link, asked):
            return failed
    if any(_names(link) & _VAGUE for link in chain):
        return _unreachable(asked, first_line(chain[-1]))
    return RunFailed(otherwise, f"{asked} could not be fetched: {type(error).__name__}: {first_line(error)}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came from, the latest first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _meaning(link: BaseException, asked: str) -> RunFailed | None:
    """What one exception of the chain says for sure."""
    status, names = _status(link), _names(link)
    if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"{asked} could not be fetched: the disk is full."
        return RunFailed(TrainerExit.DISK_FULL, message, fix="Free space below HF_HOME, or set it to another disk.")
    if status and (status in _BUSY or status >= 500):
        message = f"{asked} could not be fetched: the Hub answers {status}, to repeated requests too."
        return RunFailed(TrainerExit.STORAGE, message, fix=_NETWORK_FIX)
    if status or names & _NO_SUCH:
        return RunFailed(TrainerExit.USER, f"{asked}: the Hub refuses it: {first_line(link)}", fix=_NAME_FIX)
    if "OfflineModeIsEnabled" in names:
        message = f"{asked} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it."
        return RunFailed(TrainerExit.USER, message, fix="Unset it, or fetch the repository first (hf download).")
    if "CERTIFICATE_VERIFY_FAILED" in str(link):
        message = f"{asked} could not be fetched: the certificate of the Hub, or of a proxy before it, is not trusted."
        return RunFailed(
            TrainerExit.STORAGE_REFUSED, message, fix="Set SSL_CERT_FILE to the certificate of its authority."
        )
    return _unreachable(asked, first_line(link)) if names & _NETWORK else None


def _unreachable(asked: str, said: str) -> RunFailed:
    message = f"{asked} could not be fetched: the Hub cannot be reached ({said})."
    return RunFailed(TrainerExit.STORAGE, message, fix=_NETWORK_FIX)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
