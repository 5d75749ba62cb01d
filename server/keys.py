"""Where the application keeps what its handlers share. Written once by `app.py`."""

from dataclasses import dataclass

from aiohttp import web

from server.metrics import Metrics
from server.sampling_defaults import SamplingDefaults
from server.service import Service


@dataclass(frozen=True, slots=True)
class Serving:
    """The served model, as handlers see it."""

    name: str
    service: Service
    metrics: Metrics
    n_vocab: int  # ids below it exist in the model, whether or not the tokenizer has a token for them
    sampling: SamplingDefaults  # what a request leaves open
    created: int  # Unix time of the start
    stall_seconds: float
    api_keys: tuple[bytes, ...]
    hosts: frozenset[str]  # names a Host header may carry when there is no API key


@dataclass(slots=True)
class Bodies:
    """Bytes of request bodies in memory now."""

    n_bytes: int = 0


SERVING = web.AppKey("serving", Serving)
BODIES = web.AppKey("bodies", Bodies)
REQUEST_ID = web.RequestKey("request_id", str)
