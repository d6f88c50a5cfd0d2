"""The kinds of requests that the server answers: a module for each, with `routes(service) -> APIRouter`.

JSON comes in, in the form of a trainer or an engine, and becomes groups; rewards go out in the form that it reads.
Open `native.py` for ours, and `bodies.py` for what the others share.
A new module is named in `PROTOCOLS` of fastrm/serve/app.py, which says what a router gets and what it has to return.
"""
