"""Rewards by HTTP: `fastrm serve MODEL`.

Requests come in from any number of clients; the rewards of their responses go out. Open `app.py` first.

command.py    loads the models, opens the port, ends in order
gate.py       asks for the token and counts every answer
app.py        the application: errors and limits; what protocols use of it is `Service`
protocols/    a router for each kind of request: ours, OpenRLHF's, vLLM's, ...
scheduler.py  gathers what is asked at the same time; waiting.py joins it and chooses packs, scorer.py computes them
media.py      opens the images that requests name, where that is allowed; caches.py remembers by content
"""
