"""`GET /v1/server/info`: what runs here, the plan in force, and what it predicted beside what was achieved.

For operators, behind the same guards as the model itself. Says nothing about keys, paths or requests.
"""

from dataclasses import replace
from importlib import metadata

from aiohttp import web

from placement.document import to_plain
from server.chat import Json
from server.keys import SERVING
from server.request import EngineStats, Tally

ROUTING = "uniform law"  # of the predictions beside what was achieved, whatever the plan's own figures were made with


async def server_info(request: web.Request) -> web.Response:
    """What is not known before the model is loaded is null. The plan names the model as clients do."""
    serving = request.app[SERVING]
    service, bridge = serving.service, serving.service.bridge
    ready = bridge.ready
    body: Json = {
        "version": _version(),
        "model": serving.name,
        "status": "draining" if service.draining else bridge.phase,
        "device": ready and ready.device,
        "max_model_len": ready and ready.max_model_len,
        "kv_pages": ready and _tiers(ready.page_size, bridge.stats),
        "plan": to_plain(replace(ready.plan, model=serving.name)) if ready and ready.plan else None,
        "profile": ready and ready.profile,
        "routing": ROUTING,
        "predicted_against_achieved": [_line(tally) for tally in bridge.tallies],
    }
    return web.json_response(body)


def _tiers(page_size: int, stats: EngineStats) -> Json:
    """Pages by tier. Those of running requests are on the device; RAM holds prefixes that somebody may come back to."""
    return {
        "page_size": page_size,
        "device": {"total": stats.pages_total, "used": stats.pages_used},
        "ram": {
            "total": stats.ram_pages_total,
            "used": stats.ram_pages_used,
            "demoted": stats.demoted,
            "promoted": stats.promoted,
        },
    }


def _line(tally: Tally) -> Json:
    """Times in seconds, those of one step; `error` is the prediction's, as a share of what was achieved."""
    achieved, predicted = tally.recent_seconds, tally.recent_predicted_seconds
    return {
        "step": tally.kind,
        "sequences" if tally.kind == "decode" else "new_tokens": [tally.least, tally.most],
        "steps": tally.steps,
        "achieved_median": achieved,
        "predicted_median": predicted,
        "error": round(predicted / achieved - 1, 3) if predicted is not None and achieved else None,
        "achieved_mean": tally.seconds / tally.steps,
        "predicted_mean": None if tally.predicted_seconds is None else tally.predicted_seconds / tally.steps,
    }


def _version() -> str:
    try:
        return metadata.version("hybrid")
    except metadata.PackageNotFoundError:  # run from a tree that was not installed
        return "unknown"
