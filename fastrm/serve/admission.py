"""The part that scheduler and dispatcher share: models by name, the bound of what waits, and the end of acceptance."""

import asyncio
from typing import Generic, TypeVar

from fastrm.serve.problems import Unavailable, UnknownModel

_Model = TypeVar("_Model")


class Admission(Generic[_Model]):
    """The models of a server, and the groups that it has accepted.

    Args:
        served: the models by their names, the default first.
        max_queue: the number of groups that may wait or be computed; more are refused with `Unavailable`.

    Attributes:
        is_closing: True from the moment on that nothing more is accepted.
        num_lost: the number of groups without an answer when the server ended; the application counts them.
    """

    def __init__(self, served: dict[str, _Model], max_queue: int):
        self.served, self.max_queue = served, max_queue
        self.is_closing = False
        self._num_accepted = self.num_lost = 0

    @property
    def models(self) -> list[str]:
        """The names of the models, the default first."""
        return list(self.served)

    @property
    def queue_length(self) -> int:
        """The number of groups that were accepted and have no answer yet."""
        return self._num_accepted

    @property
    def _accepts(self) -> bool:
        return not self.is_closing

    def find(self, model: str | None) -> _Model:
        """Return the model of a name, or the first for None.

        Raises:
            UnknownModel: for another name.
        """
        if model is None:
            return next(iter(self.served.values()))
        if not isinstance(model, str) or model not in self.served:
            raise UnknownModel(model, self.models)
        return self.served[model]

    def stop_accepting(self) -> None:
        """Refuse what comes from now on; what was accepted is answered."""
        self.is_closing = True

    async def drain(self) -> None:
        """Refuse what comes from now on, and return when all that was accepted has its answer."""
        self.stop_accepting()
        while self._num_accepted:
            await asyncio.sleep(0.01)

    def _admit(self, num_groups: int) -> None:
        if not self._accepts:
            raise Unavailable("CLOSING", "the server is ending; ask another one")
        if self.queue_length + num_groups > self.max_queue:
            raise Unavailable(
                "QUEUE_FULL",
                f"{self.queue_length:,} groups wait, {num_groups:,} more would be over the limit of "
                f"{self.max_queue:,}; try again later",
            )
        self._num_accepted += num_groups
