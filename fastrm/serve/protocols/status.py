"""The answers about the server itself, for clients and routers: GET /health and GET /v1/models."""

from fastapi import APIRouter

from fastrm.serve.app import Service
from fastrm.serve.problems import Unavailable


def routes(service: Service) -> APIRouter:
    """Return the router of /health and /v1/models."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict:
        if not service.scheduler.is_ready:
            raise Unavailable("CLOSING", "the server is ending; ask another one")
        return {"status": "ok", "queue": service.scheduler.queue_length}

    @router.get("/v1/models")
    async def models() -> dict:
        entries = [{"id": name, "object": "model", "owned_by": "fastrm"} for name in service.scheduler.models]
        return {"object": "list", "data": entries}

    return router
