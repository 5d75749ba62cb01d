"""What a run of agents may spend, and what it has spent. Asked before every turn and call; time ends turns too.

Called by `run.py`.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a whole run, except for the steps. Kimi-K2.5's published swarm: 100 sub-agents, 1,500 tool calls."""

    seconds: float = 3600.0
    tokens: int = 5_000_000  # read and written, cached ones too
    tool_calls: int = 1500
    subagents: int = 100  # created, and tasks at work at once
    orchestrator_steps: int = 100  # turns
    subagent_steps: int = 100
    tool_seconds: float = 120.0  # of one call, but not of a sub-agent's task
    output_bytes: int = 100_000  # of one tool result


class Spent(Exception):
    """A limit is reached. One line: which."""


class Budget:
    """Counters of one run."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tokens = 0
        self.tool_calls = 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    @property
    def seconds_left(self) -> float:
        """Not below zero."""
        return max(0.0, self.limits.seconds - self.seconds)

    def check(self) -> None:
        """Before a turn, and before a call. Raises Spent."""
        if not self.seconds_left:
            raise Spent(self.late)
        if self.tokens >= self.limits.tokens:
            raise Spent(f"{self.tokens:,} of {self.limits.tokens:,} tokens are used")

    @property
    def late(self) -> str:
        """That the time is over."""
        return f"{self.limits.seconds:g} seconds have passed"

    def take_call(self) -> None:
        """One more tool call. Raises Spent where there is none left."""
        self.check()
        if self.tool_calls >= self.limits.tool_calls:
            raise Spent(f"all {self.limits.tool_calls:,} tool calls of the run are made")
        self.tool_calls += 1
