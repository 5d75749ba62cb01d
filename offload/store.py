"""Where every routed expert's packed bytes lie, each expert once.

Either in memory, packed by all cores while the shards are read, one arena for each NUMA node; or in a packed file
(offload/packed.py), which is mapped where RAM holds it and else paged in (offload/paging.py). The store knows geometry
and bytes, not arithmetic; the caller supplies the tensor names. `offload.experts` and hybrid's engine call it, `hybrid
pack` calls `pack_store`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offload import packed
from offload.checkpoint import Checkpoint, CheckpointError
from offload.config import MATRICES, ExpertFormat, ExpertGeometry, Progress
from offload.numa import address_of, huge_memory, prefer_node
from offload.paging import LEAST_SLOTS, PackedExperts, Pager
from offload.pool import PoolError
from offload.ram import ram
from offload.reading import ExpertReader
from offload.requantise import Squares, error_notice
from offload.sources import Prefix, Target, find_experts, formats, packed_path

Places = npt.NDArray[np.int64]
ONE_NODE = (0,)


class ExpertStore:
    """The experts of all layers as addresses. `close` only after the last kernel that uses them has returned."""

    def __init__(
        self,
        geometry: ExpertGeometry,
        fmt: ExpertFormat,
        layers: Sequence[int],
        addresses: Places,
        owners: Sequence[memoryview],
        notices: Sequence[str],
        pager: Pager | None = None,
    ) -> None:
        self.geometry = geometry
        self.format: ExpertFormat = fmt
        self.layers = tuple(layers)
        self.n_bytes = len(self.layers) * geometry.n_experts * geometry.expert_bytes(fmt)
        self.addresses = addresses  # (n_layers, E, nodes, 2): a node's first gate_up unit and its first down unit
        self.n_nodes = addresses.shape[2]
        self.pager = pager  # of a store larger than RAM: an address is 0 while its expert is on the disk only
        self.notices = tuple(notices)  # lines for the user: weight error, what was not used, what was not read ahead
        self._owners = list(owners)

    @property
    def arenas(self) -> list[tuple[int, int, int]]:
        """(address, bytes, bytes of one expert in it) of all memory that holds experts; none where they are paged."""
        n_experts = len(self.layers) * self.geometry.n_experts
        return [(address_of(owner), len(owner), len(owner) // n_experts) for owner in self._owners]

    @property
    def mapped(self) -> bool:
        """True where a file is mapped, which a GPU's driver does not pin: its pages cannot be written to."""
        return any(owner.readonly for owner in self._owners)

    def close(self) -> None:
        """Lets go of the memory; the addresses are void afterwards."""
        for owner in self._owners:
            owner.release()
        self._owners.clear()
        if self.pager is not None:
            self.pager.close()


def open_store(
    checkpoint: Checkpoint,
    prefix: Prefix,
    geometry: ExpertGeometry,
    layers: Sequence[int],
    target: Target,
    progress: Progress,
    nodes: Sequence[int] = ONE_NODE,
    budget: int | None = None,
) -> ExpertStore:
    """Make the store: from a packed file that fits the checkpoint, else from the shards.

    `prefix(layer, expert, projection)` names a matrix without its `.weight…` ending. `progress(stage, done, total)`
    counts bytes. `nodes` are the system's numbers of the NUMA nodes to use. `budget` bytes of RAM are for experts of a
    packed file, None for all that is free. Raises CheckpointError, one line for the user.
    """
    contents = _contents(checkpoint, prefix, geometry, layers, target)
    notices: list[str] = []
    if packed.usable(checkpoint.directory, contents, notices):
        free = ram()[1] if budget is None else min(budget, ram()[1])
        notices += packed.error_notices(checkpoint.directory, contents)
        if contents.n_bytes > free:
            pager = _pager(checkpoint, contents, len(nodes), free, notices)
            return ExpertStore(geometry, contents.format, layers, pager.addresses, [], notices, pager)
        memory = packed.open_mapped(checkpoint.directory, contents, progress)
        places = _places(contents, len(nodes), [address_of(memory)] * len(nodes), shared=True)
        owners = [memory]
    else:
        with _reader(checkpoint, prefix, contents) as reader:
            crowded = _check_room(checkpoint, contents, len(reader) * reader.n_bytes(0))
            owners = [_arena(contents, node, nodes, notices) for node in range(len(nodes))]
            places = _places(contents, len(nodes), [address_of(arena) for arena in owners], shared=False)
            squares = _fill(reader, places, contents, progress, crowded)
        if contents.published != contents.format:
            notices.append(error_notice(squares, layers, contents.published, contents.format))
    addresses = places.reshape(len(layers), geometry.n_experts, len(nodes), len(MATRICES))
    return ExpertStore(geometry, contents.format, layers, addresses, owners, notices)


def packed_is_used(
    checkpoint: Checkpoint, prefix: Prefix, geometry: ExpertGeometry, layers: Sequence[int], target: Target
) -> bool:
    """Whether `open_store` would map a packed file. Raises CheckpointError where there is a damaged one."""
    return packed.usable(checkpoint.directory, _contents(checkpoint, prefix, geometry, layers, target), [])


def pack_store(
    checkpoint: Checkpoint,
    prefix: Prefix,
    geometry: ExpertGeometry,
    layers: Sequence[int],
    target: Target,
    progress: Progress,
) -> tuple[Path, list[str]]:
    """Write the packed file beside the shards, unless a usable one is there; its path, and lines for the user."""
    contents = _contents(checkpoint, prefix, geometry, layers, target)
    try:
        there = packed.usable(checkpoint.directory, contents, [])
    except CheckpointError:  # damaged
        there = False
    if not there:
        with _reader(checkpoint, prefix, contents) as reader:
            packed.write(checkpoint.directory, contents, reader, progress)
    return packed_path(checkpoint.directory, contents.format), packed.error_notices(checkpoint.directory, contents)


def _contents(
    checkpoint: Checkpoint, prefix: Prefix, geometry: ExpertGeometry, layers: Sequence[int], target: Target
) -> packed.Contents:
    published, fmt = formats(checkpoint, prefix, layers, target)
    return packed.Contents(geometry, fmt, published, tuple(layers), packed.fingerprint(checkpoint))


def _reader(checkpoint: Checkpoint, prefix: Prefix, c: packed.Contents) -> ExpertReader:
    experts = find_experts(checkpoint, prefix, c.geometry, c.layers, c.published, c.format)
    return ExpertReader(experts, c.geometry, c.published, c.format)


def _check_room(checkpoint: Checkpoint, contents: packed.Contents, published: int) -> bool:
    """Whether the shards' pages must leave the system's cache to make room; refuses what does not fit at all."""
    available = ram()[1]
    if contents.n_bytes > available:
        raise CheckpointError(
            f"the experts take {contents.n_bytes / 1e9:.1f} GB in memory and {available / 1e9:.1f} GB of RAM are free; "
            f"`{contents.command(checkpoint.directory)}` writes them to a file that is read as they are needed"
        )
    return contents.n_bytes + published > available


def _arena(contents: packed.Contents, node: int, nodes: Sequence[int], notices: list[str]) -> memoryview:
    """Memory for one node's share of all experts."""
    arena = huge_memory(contents.n_experts * contents.geometry.node_bytes(node, len(nodes), contents.format))
    why = prefer_node(arena, nodes[node]) if len(nodes) > 1 else None
    if why is not None:
        notices.append(f"memory node {nodes[node]}: {why}; its experts lie wherever the system puts them")
    return arena


def _pager(checkpoint: Checkpoint, contents: packed.Contents, n_nodes: int, free: int, notices: list[str]) -> Pager:
    """Slots for as many experts as RAM has room for."""
    inside = _places(replace(contents, layers=contents.layers[:1]), n_nodes, [0] * n_nodes, shared=True)[0]
    n_layers, n_experts = len(contents.layers), contents.geometry.n_experts
    path = packed_path(checkpoint.directory, contents.format)
    lying = PackedExperts(path, packed.DATA_AT, contents.expert_bytes, n_layers, n_experts, inside)
    needed = LEAST_SLOTS * lying.slot_bytes
    if free < needed:
        raise CheckpointError(
            f"{path}: {free / 1e9:.2f} GB of RAM are free and two experts, {needed / 1e9:.2f} GB, are the least that "
            "must fit; free memory"
        )
    try:
        pager = Pager(lying, free)
    except PoolError as error:
        raise CheckpointError(str(error)) from error
    notices.append(
        f"experts take {contents.n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB of RAM are free: "
        f"{pager.n_slots / contents.n_experts:.0%} are kept there, the others come from the disk when they are needed"
    )
    return pager


def _places(contents: packed.Contents, n_nodes: int, bases: Sequence[int], shared: bool) -> Places:
    """(experts, nodes, 2): where a node's gate_up and down units begin, an arena each or all `shared` in one."""
    geometry, fmt = contents.geometry, contents.format
    gate_up, down = (geometry.unit_bytes(matrix, fmt) for matrix in MATRICES)
    places = np.empty((contents.n_experts, n_nodes, len(MATRICES)), np.int64)
    for node, base in enumerate(bases):
        units, later = (geometry.units_of(matrix, node, n_nodes) for matrix in MATRICES)
        if shared:
            step = contents.expert_bytes
            offsets = units.start * gate_up, geometry.n_units("gate_up") * gate_up + later.start * down
        else:
            step = geometry.node_bytes(node, n_nodes, fmt)
            offsets = 0, len(units) * gate_up
        places[:, node] = base + step * np.arange(contents.n_experts)[:, None] + offsets
    return places


def _fill(reader: ExpertReader, places: Places, contents: packed.Contents, progress: Progress, drop: bool) -> Squares:
    """Pack every expert; returns the squares by layer."""
    squares = np.zeros((len(contents.layers), 2))
    same = contents.published == contents.format
    stage = "reading experts" if same else f"converting experts to {contents.format}"
    finished, total = 0, sum(reader.n_bytes(expert) for expert in range(len(reader)))
    progress(stage, 0, total)

    def done(expert: int, found: Squares) -> None:
        nonlocal finished
        squares[expert // contents.geometry.n_experts] += found
        finished += reader.n_bytes(expert)
        progress(stage, finished, total)

    reader.run(range(len(reader)), lambda expert: reader.pack(expert, places[expert]), done, drop)
    return squares
