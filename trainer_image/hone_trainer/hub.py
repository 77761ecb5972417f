"""Why the Hub did not give what was asked, as a reason of ours: whether to ask again, or to mend the request.

Called where hf:// sources are fetched.
"""

import errno

from hone.hub.answers import BUSY, NETWORK, NETWORK_FIX, chain, names, status
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed, first_line

_NO_SUCH = frozenset({"DatasetNotFoundError", "HFValidationError"})
_VAGUE = frozenset({"LocalEntryNotFoundError"})
"""Says that the cache lacks it, whatever kept the Hub from giving it: what it came from tells."""

_NAME_FIX = "Check the name and revision; a gated or private repository needs HF_TOKEN in the environment."


def hub_failure(error: BaseException, *, field: str, source: str, otherwise: TrainerExit) -> RunFailed:
    """What an exception of huggingface_hub or datasets means; `otherwise` is the code of one that is not the Hub's."""
    asked = f"{field}: {source}"
    links = list(chain(error))
    for link in links:
        if failed := _meaning(link, asked):
            return failed
    if any(names(link) & _VAGUE for link in links):
        return _unreachable(asked, first_line(links[-1]))
    return RunFailed(otherwise, f"{asked} could not be fetched: {type(error).__name__}: {first_line(error)}")


def _meaning(link: BaseException, asked: str) -> RunFailed | None:
    """What one exception of the chain says for sure."""
    code, kinds = status(link), names(link)
    if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"{asked} could not be fetched: the disk is full."
        return RunFailed(TrainerExit.DISK_FULL, message, fix="Free space below HF_HOME, or set it to another disk.")
    if code and (code in BUSY or code >= 500):
        message = f"{asked} could not be fetched: the Hub answers {code}, to repeated requests too."
        return RunFailed(TrainerExit.STORAGE, message, fix=NETWORK_FIX)
    if code or kinds & _NO_SUCH:
        return RunFailed(TrainerExit.USER, f"{asked}: the Hub refuses it: {first_line(link)}", fix=_NAME_FIX)
    if "OfflineModeIsEnabled" in kinds:
        message = f"{asked} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it."
        return RunFailed(TrainerExit.USER, message, fix="Unset it, or fetch the repository first (hf download).")
    if "CERTIFICATE_VERIFY_FAILED" in str(link):
        message = f"{asked} could not be fetched: the certificate of the Hub, or of a proxy before it, is not trusted."
        return RunFailed(
            TrainerExit.STORAGE_REFUSED, message, fix="Set SSL_CERT_FILE to the certificate of its authority."
        )
    return _unreachable(asked, first_line(link)) if kinds & NETWORK else None


def _unreachable(asked: str, said: str) -> RunFailed:
    message = f"{asked} could not be fetched: the Hub cannot be reached ({said})."
    return RunFailed(TrainerExit.STORAGE, message, fix=NETWORK_FIX)
