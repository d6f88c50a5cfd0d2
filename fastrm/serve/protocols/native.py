"""The protocol of fastrm itself: one prompt with images and any number of responses is one group.

    POST /v1/rewards  {"model"?: name, "groups": [{"prompt" | "messages", "images"?: [...], "responses": [text, ...]}]}
    -> {"model": name, "rewards": [[float, ...] | {"error": {"code", "message"}}, ...],
        "usage": {"groups", "responses", "prompt_tokens", "total_tokens"}}

A group has the keys of `RewardModel.score`. The answer has one entry for each group, in order; one that cannot be
scored has its error there, and the others have their rewards, so that the status is 200 for every well-formed body.
"""

from fastapi import APIRouter, Request

from fastrm.errors import GroupError
from fastrm.serve.app import Service, error_body
from fastrm.serve.problems import BadRequest


def routes(service: Service) -> APIRouter:
    """Return the router of /v1/rewards."""
    router = APIRouter()

    @router.post("/v1/rewards")
    async def rewards(request: Request) -> dict:
        body = await service.read(request)
        if unknown := body.keys() - {"model", "groups"}:
            raise BadRequest("UNKNOWN_KEY", f'"{min(unknown)}" is not read here; the keys are "groups" and "model"')
        groups = body.get("groups")
        if not isinstance(groups, list):
            raise BadRequest("BAD_REQUEST", '"groups" is missing or no list; send a list of groups')
        scored = await service.score(request, groups, body.get("model"))
        results = [
            error_body(result.code, result.message) if isinstance(result, GroupError) else result
            for result in scored.results
        ]
        num_responses = sum(len(result) for result in results if isinstance(result, list))
        usage = {
            "groups": len(groups),
            "responses": num_responses,
            "prompt_tokens": scored.num_tokens,
            "total_tokens": scored.num_tokens,
        }
        return {"model": scored.model, "rewards": results, "usage": usage}

    return router
