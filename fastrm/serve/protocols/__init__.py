"""The kinds of requests that the server answers: a module for each, with `routes(service) -> APIRouter`.

A new module is named in `PROTOCOLS` of fastrm/serve/app.py, which says what a router gets and what it has to return.
"""
