"""Experts on their way to slots on the device, beside the steps: begun in turn, looked at, never waited for.

Where the device is a GPU a thread of its own brings the bytes into pinned memory, from where the copy stream fetches
them: a step's thread would stand still for milliseconds of plain copying. On the CPU as device an upload is over when
it is begun. Knows bytes and events; whether a slot may be written is the caller's to know. Called by offload/vram.py.
"""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.copies import Copies, Event, PlainEvent


@dataclass(slots=True, eq=False)
class Upload:
    """One expert under way."""

    parts: Sequence[torch.Tensor]  # uint8 on the host, one after another
    target: torch.Tensor  # (n_bytes,) uint8 on the device
    after: Event | None  # of the device: its last reader's end
    event: Event | None = None  # its end, once the last copy has begun
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether the bytes are there. Raises RuntimeError where the copy failed."""
        if self.error is not None:
            raise RuntimeError(f"an expert's upload to the device failed: {self.error}") from self.error
        return self.event is not None and (isinstance(self.event, PlainEvent) or bool(self.event.query()))


class Uploads:
    """The queue, and who works it off."""

    def __init__(self, copies: Copies, n_bytes: int, *, staged: bool) -> None:
        """`n_bytes` of an expert; `staged`: through pinned memory, by a thread."""
        self._copies = copies
        self._staging = copies.host_memory(2, n_bytes) if staged else None
        self._staged: list[Event | None] = [None, None]  # when each place may be filled again
        self._queue: queue.SimpleQueue[Upload | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="expert uploads", daemon=True) if staged else None
        if self._thread is not None:
            self._thread.start()

    def begin(self, parts: Sequence[torch.Tensor], target: torch.Tensor, after: Event | None) -> Upload:
        """`target` is written once `after` is over. The parts must stay where they are until the upload is."""
        upload = Upload(parts, target, after)
        if self._thread is None:
            self._copy(upload, parts)
        else:
            self._queue.put(upload)
        return upload

    def close(self) -> None:
        """Finish what is in the queue. The parts' memory may go then."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        for event in self._staged:
            if event is not None:
                self._copies.host_after(event)

    def _work(self) -> None:
        assert self._staging is not None
        place = 0
        while (upload := self._queue.get()) is not None:
            try:
                before = self._staged[place]
                if before is not None:
                    self._copies.host_after(before)
                torch.cat(tuple(upload.parts), out=self._staging[place])
                self._copy(upload, (self._staging[place],))
                self._staged[place] = upload.event
            except Exception as error:  # noqa: BLE001 - told to whoever looks at the upload
                upload.error = error
            place = 1 - place

    def _copy(self, upload: Upload, parts: Sequence[torch.Tensor]) -> None:
        if upload.after is not None:
            self._copies.copy_after(upload.after)
        at = 0
        for part in parts:
            self._copies.copy(upload.target[at : at + part.numel()], part)
            at += part.numel()
        assert at == upload.target.numel(), "an expert of another size"
        upload.event = self._copies.copied()
