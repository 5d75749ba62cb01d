"""How many requests may wait: a bound on sequences and prompt tokens that have no first token yet.

The place is taken before the prompt is tokenised, so that refusing stays cheap under a flood. Owned by `service.py`;
knows nothing of the engine but the rate at which first tokens come.
"""

import math
import time
from collections import deque

from server.errors import queue_full

RATE_WINDOW_S = 60.0
GUESS_S = 10  # Retry-After before any rate is known


class Admission:
    """What waits now, and how quickly it was served lately."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.requests = 0
        self.tokens = 0
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._served: deque[tuple[float, int]] = deque()  # (when, prompt tokens) of recent first tokens

    def enter(self, requests: int) -> "Ticket":
        """Take the place of `requests` sequences, or raise the 429."""
        if self.requests and self.requests + requests > self._max_requests:
            raise queue_full(f"{self.requests} requests wait already; try again later", self._retry_after())
        return Ticket(self, requests)

    def check_tokens(self, tokens: int) -> None:
        """Raise the 429 when `tokens` more are too many. A prompt alone is never too long to wait."""
        if self.tokens and self.tokens + tokens > self._max_tokens:
            raise queue_full(f"{self.tokens} prompt tokens wait already; try again later", self._retry_after())

    def note_served(self, tokens: int) -> None:
        """A sequence of `tokens` prompt tokens got its first token."""
        now = time.monotonic()
        self._served.append((now, tokens))
        while self._served[0][0] < now - RATE_WINDOW_S:
            self._served.popleft()

    def _retry_after(self) -> int:
        """Seconds until about half of what waits is served, at the measured rate."""
        if len(self._served) < 2:
            return GUESS_S
        span = time.monotonic() - self._served[0][0]
        rate = sum(tokens for _, tokens in self._served) / max(span, 1e-3)
        return math.ceil(self.tokens / 2 / max(rate, 1e-3))


class Ticket:
    """The places one reply holds; `close` gives back whatever is left."""

    def __init__(self, admission: Admission, requests: int) -> None:
        self._admission = admission
        self._requests = requests
        self._tokens = 0
        admission.requests += requests

    def add_tokens(self, tokens: int) -> None:
        """Count `tokens` prompt tokens as waiting, or raise the 429."""
        self._admission.check_tokens(tokens)
        self._admission.tokens += tokens
        self._tokens += tokens

    def started(self, tokens: int) -> None:
        """One sequence, of `tokens` prompt tokens, waits no longer."""
        self._admission.note_served(tokens)
        self._give_back(1, tokens)

    def close(self) -> None:
        """Nothing of this waits any longer."""
        self._give_back(self._requests, self._tokens)

    def _give_back(self, requests: int, tokens: int) -> None:
        self._requests -= requests
        self._tokens -= tokens
        self._admission.requests -= requests
        self._admission.tokens -= tokens
