"""A bounded memory of results that any number of threads may share."""

from collections import OrderedDict
from typing import Any


class Latest:
    """The results of a pure function for the keys that were stored last.

    There is no lock, because a data worker that is forked while another thread holds one would wait for it
    for ever. Each step is one operation of a dictionary with text keys, which Python does as a whole, and no
    step relies on what an earlier one saw. What was stored may be gone at the next look: keep it if you need it.

    Args:
        capacity: number of results that are kept, the oldest of more is forgotten.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._results: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str) -> Any | None:
        """Return the result stored for a key; None if it is not known, or no longer."""
        return self._results.get(key)

    def store(self, key: str, result: Any) -> None:
        """Remember a result, and forget the oldest beyond `capacity`."""
        self._results[key] = result
        while len(self._results) > self.capacity:
            try:
                self._results.popitem(last=False)
            except KeyError:  # other threads have removed them meanwhile
                return

    def __len__(self) -> int:
        return len(self._results)
