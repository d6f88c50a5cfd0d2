"""What tests of judges by URL share."""

import pytest


@pytest.fixture
def waits(monkeypatch):
    """The seconds between tries, none of which is waited for."""
    pytest.importorskip("httpx")
    from fastrm.judge.endpoint import Endpoint

    found = []
    monkeypatch.setattr(Endpoint, "_stops_within", lambda self, some: found.append(some) or self._stopped.is_set())
    return found
