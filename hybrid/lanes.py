"""Blocks, and the tokens that go through them: in one lane, or in two that take turns at the device and the experts.

    one lane    attend A | experts A             | attend A | …
    two lanes   attend A | attend B, experts A   | attend A, experts B | …

With two lanes one half of the batch is on the device while the CPU runs the other half's experts. Nothing else
changes: every half goes through the same operations as a batch of its own. The experts take one half at a time, so a
lane hands over only when the other one's sum has been collected; that sum is added when the lane attends again.
Knows no requests. Called by `hybrid.model`; who decides is `hybrid.ping_pong`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid.inputs import StepInputs
from hybrid.kv import LatentCache
from hybrid.layers import Mlp, by_pieces, rms_norm
from hybrid.mla import Attention
from hybrid.moe import Moe, Pending, Routed
from hybrid.rope import Rope


@dataclass(frozen=True, slots=True)
class Block:
    """One layer, with a norm before each of its two halves."""

    attention_norm: torch.Tensor  # (D,)
    attention: Attention
    mlp_norm: torch.Tensor  # (D,)
    mlp: Mlp | Moe


class Lane:
    """One half's tokens on their way, or all of them."""

    def __init__(
        self, x: torch.Tensor, pieces: Sequence[StepInputs], cache: LatentCache, rope: Rope, eps: float
    ) -> None:
        """`pieces` are the lane's tokens in order, those of `x` (T, D): a layer takes a piece at a time, so that no
        more than one has its queries or a dense MLP's inner values in memory. The routed experts take all at once."""
        self.x = x  # the residual stream, changed in place
        self._cache, self._rope, self._eps = cache, rope, eps
        parts = torch.split(x, [len(piece.ids) for piece in pieces])
        tables = [rope.table(piece.positions) for piece in pieces]  # 2 x (T, R/2) each
        self._pieces = tuple(zip(parts, pieces, tables, strict=True))
        self._routed: Routed | None = None
        self._pending: Pending | None = None
        self._shared: torch.Tensor | None = None  # what the shared expert said while the others run
        self._update: torch.Tensor | None = None  # collected, not yet added

    @property
    def result(self) -> torch.Tensor:
        """The residual stream of the lane's tokens."""
        return self.x

    def attend(self, block: Block) -> None:
        """What the block has on the device before its routed experts."""
        self.settle()
        inner = []
        for part, piece, table in self._pieces:  # a piece's queries see the keys of those before it
            x, normed = self.before(block, part, piece, table)
            part.copy_(x)
            inner.append(normed)
        if isinstance(block.mlp, Moe):
            self._routed = block.mlp.route(inner[0] if len(inner) == 1 else torch.cat(inner))

    def hand_over(self) -> None:
        """Start the routed experts, if the block has any, and the shared expert beside them."""
        if self._routed is not None:
            routed, self._routed = self._routed, None
            self._pending = routed.submit()
            self._shared = by_pieces(routed.moe.shared, routed.x)

    def collect(self) -> None:
        """Wait for the routed experts, which are free for another lane afterwards."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            routed = pending.wait()
            assert self._shared is not None, "computed while the experts ran"
            self._update, self._shared = routed + self._shared, None

    def settle(self) -> None:
        """Add what the last block's experts said."""
        self.collect()
        if self._update is not None:
            self.x += self._update
            self._update = None

    def before(
        self, block: Block, x: torch.Tensor, piece: StepInputs, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream (T, D) with attention, or with the whole of a dense block, and its last norm: what the
        experts get. Reads its arguments, writes the cache, and may be run again.
        """
        normed = rms_norm(x, block.attention_norm, self._eps)
        x = x + block.attention(normed, piece, self._cache, self._rope, table)
        normed = rms_norm(x, block.mlp_norm, self._eps)
        return (x, normed) if isinstance(block.mlp, Moe) else (x + block.mlp(normed), normed)


def run(blocks: Sequence[Block], lanes: Sequence[Lane]) -> None:
    """Take the lanes through all blocks, in turn; their `x` is the residual stream after the last."""
    try:
        for block in blocks:
            for lane in lanes:
                lane.attend(block)
                for other in lanes:
                    other.collect()
                lane.hand_over()
        for lane in lanes:
            lane.settle()
    except BaseException:  # the device ran out of memory, say: the experts must be free for the next step
        for lane in lanes:
            with contextlib.suppress(Exception):
                lane.collect()
        raise
