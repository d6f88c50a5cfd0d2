"""Rewards by HTTP: `fastrm serve MODEL`.

Requests come in from any number of clients; the rewards of their responses go out. Open `app.py` first.

protocols/  a router for each kind of request: ours, OpenRLHF's, vLLM's, ...
app.py      the application: errors, limits, token, metrics; what protocols use of it is `Service`
scheduler.py  gathers, merges and packs what is asked at the same time
scorer.py   a model that computes packs of what was prepared
"""
