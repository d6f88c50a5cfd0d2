"""The errors of the hub's client in words, with what a user can do: for models, data sets and uploads alike."""

import os
from collections.abc import Iterator


def explain(name: str, error: Exception, kind: str = "model") -> str:
    """Return why a repository of the hub cannot be read or written, and the next step.

    Args:
        name: of the repository, owner/name.
        error: of huggingface_hub or of `datasets`, which wraps those.
        kind: model or dataset.
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    names = {type(one).__name__ for one in chain}
    status = next((one.response.status_code for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    log_in = "log in with hf auth login, or set HF_TOKEN"
    # `datasets` drops the client's error and keeps its words.
    if "is a gated dataset" in str(error) or any(isinstance(one, errors.GatedRepoError) for one in chain):
        return f"it is gated: accept its terms at {place}, then {log_in}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        cache = constants.HF_HUB_CACHE
        return (
            f"HF_HUB_OFFLINE is set, and {cache} does not hold all of it; unset that, or download it where there is a "
            f"network, hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}, and copy that folder"
        )
    if {"RepositoryNotFoundError", "DatasetNotFoundError"} & names:
        return f"{constants.ENDPOINT} has no {kind} of this name, or it is private; check the spelling, or {log_in}"
    if status in (401, 403) or "LocalTokenNotFoundError" in names:
        return f"{constants.ENDPOINT} does not allow it ({status or 'no token'}); {log_in} of an account that may"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{constants.ENDPOINT}: {reason}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
