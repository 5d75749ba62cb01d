"""Web search through a SearXNG-compatible endpoint that the operator names. Called by `swarm.py`."""

import json
from dataclasses import dataclass, field

import aiohttp

from server.agents.tools import Json, ToolError, declared

MOST_RESULTS = 8
MOST_BYTES = 2 << 20  # of an answer
SECONDS = 30.0
DECLARATION = declared("search", "Search the web.", query="What to look for.")


@dataclass(frozen=True, slots=True)
class Search:
    """`url` of the endpoint, to which /search is added. JSON must be among its formats."""

    url: str
    declaration: Json = field(default_factory=lambda: DECLARATION)

    async def run(self, arguments: dict[str, str]) -> str:
        """Titles, addresses and excerpts of the first results."""
        question = {"q": arguments["query"], "format": "json"}
        try:
            timeout = aiohttp.ClientTimeout(total=SECONDS)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                async with session.get(f"{self.url.rstrip('/')}/search", params=question) as response:
                    if response.status != 200:
                        raise ToolError(f"the search answered {response.status}")
                    found = json.loads(await _whole(response))["results"][:MOST_RESULTS]
                    lines = [f"{one['title']} ({one['url']})\n{one.get('content') or ''}" for one in found]
        except (TimeoutError, aiohttp.ClientError) as error:
            raise ToolError(f"the search cannot be reached: {error or 'it took too long'}") from None
        except (ValueError, LookupError, TypeError):
            raise ToolError("what answered is no SearXNG with JSON among its formats") from None
        return "\n\n".join(lines) or "Nothing found."


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    raw = b""
    async for piece in response.content.iter_any():
        raw += piece
        if len(raw) > MOST_BYTES:
            raise ToolError("the search answered with too much")
    return raw
