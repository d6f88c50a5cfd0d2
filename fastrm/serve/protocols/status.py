"""The answers about the server itself, for clients, routers and monitoring: /health, /v1/models and /metrics."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fastrm.serve.app import Service
from fastrm.serve.problems import Unavailable


def routes(service: Service) -> APIRouter:
    """Return the router of /health, /v1/models and /metrics."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict:
        if not service.scheduler.is_ready:
            why = "the server is ending, no process with the models runs, or the latest groups all failed"
            raise Unavailable("NOT_READY", f"{why}; ask another one")
        return {"status": "ok", "queue": service.scheduler.queue_length}

    @router.get("/v1/models")
    async def models() -> dict:
        entries = [{"id": name, "object": "model", "owned_by": "fastrm"} for name in service.scheduler.models]
        return {"object": "list", "data": entries}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
