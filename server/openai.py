"""The small OpenAI endpoints, and vLLM's /tokenize and /detokenize."""

from aiohttp import web

from server.chat import Json
from server.errors import ApiError, invalid
from server.keys import SERVING, Serving
from server.openai_request import ignored_header, read_chat, read_ids, read_mode, read_model
from server.validation import Fields
from server.wire import read_body


async def list_models(request: web.Request) -> web.Response:
    """`GET /v1/models`: the model, and its aliases that set the mode."""
    serving = request.app[SERVING]
    return web.json_response({"object": "list", "data": [_model(serving, name) for name in _names(serving)]})


async def get_model(request: web.Request) -> web.Response:
    """`GET /v1/models/{id}`; ids may hold slashes."""
    serving = request.app[SERVING]
    name = request.match_info["id"]
    if name not in _names(serving):
        raise ApiError(404, f"no model {name[:200]!r} here", param="model", code="model_not_found")
    return web.json_response(_model(serving, name))


def _names(serving: Serving) -> list[str]:
    aliases = ["-instant", "-thinking"] if serving.service.template.kind == "kimi" else []
    return [serving.name, *(serving.name + alias for alias in aliases)]


def _model(serving: Serving, name: str) -> Json:
    ready = serving.service.bridge.ready
    length = None if ready is None else ready.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "hybrid",
        "root": serving.name,
        "max_model_len": length,
    }


async def tokenize(request: web.Request) -> web.Response:
    """`POST /tokenize`: of a prompt, or of messages rendered as they are written (tool-call ids too)."""
    serving = request.app[SERVING]
    service = serving.service
    fields = Fields(await read_body(request))
    _, alias = read_model(fields, serving.name)
    prompt = fields.text("prompt")
    if (prompt is None) == (fields.raw("messages") is None):
        raise invalid("prompt", "send either prompt or messages")
    strings = fields.boolean("return_token_strs")
    if prompt is not None:
        parse, add = fields.boolean("parse_special"), fields.boolean("add_special_tokens", True)
        ids = await service.tokenise(prompt, parse_special=parse, add_special=add)
    else:
        fields.ignore("add_special_tokens")  # the template decides
        mode, rest = read_mode(fields, alias)
        ids = await service.render(read_chat(fields, mode, rest, render_only=True))
    answer: Json = {"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len()}
    if strings:
        answer["token_strs"] = [service.tokenizer.decode([token]) for token in ids]
    return web.json_response(answer, headers=ignored_header(fields))


async def detokenize(request: web.Request) -> web.Response:
    """`POST /detokenize`: the text of token ids, special ones by name."""
    serving = request.app[SERVING]
    fields = Fields(await read_body(request))
    read_model(fields, serving.name)
    tokens = fields.items("tokens")
    if tokens is None:
        raise invalid("tokens", "is missing; it must be an array of token ids")
    text = serving.service.tokenizer.decode(read_ids(tokens, "tokens", serving.n_vocab))
    return web.json_response({"prompt": text}, headers=ignored_header(fields))
