"""The errors of a request: each has a status, a code and a message, and becomes JSON in one place (app.py)."""

from fastrm.errors import GroupError


class RequestError(Exception):
    """An error of one request.

    Args:
        status: of HTTP, 4xx for what the client has to change, 503 for what it may try again.
        code: a stable upper-case word such as ``QUEUE_FULL``.
        message: what is wrong and what to do.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class BadRequest(RequestError):
    """An error of a request that can never be answered as it is: status 400."""

    def __init__(self, code: str, message: str):
        super().__init__(400, code, message)


class TooLarge(RequestError):
    """An error of a request that is over a limit: status 413."""

    def __init__(self, message: str):
        super().__init__(413, "REQUEST_TOO_LARGE", message)


class UnknownModel(RequestError):
    """An error of a request for a model that is not served: status 404."""

    def __init__(self, name: object, served: list[str]):
        super().__init__(404, "MODEL_UNKNOWN", f"model {name!r} is not served here; name one of {', '.join(served)}")


class Unavailable(RequestError):
    """An error of a request that came while the queue was full or the server was ending: status 503.

    Clients try again after Retry-After seconds.
    """

    def __init__(self, code: str, message: str, retry_after: int = 1):
        super().__init__(503, code, message, {"Retry-After": str(retry_after)})


def refused_group(error: GroupError) -> RequestError:
    """Return the error of a request whose group cannot be scored: its code, 422, or 500 if the server is to blame."""
    status = 500 if error.code in ("INTERNAL", "INEXACT") else 422
    return RequestError(status, error.code, f"group {error.index}: {error.message}")
