"""Loading as lines of a log: the ledger, a line for each stage and one every few seconds within it."""

import logging
import time

from server.request import LoadProgress, Notice, Ready

logger = logging.getLogger(__name__)

LINE_SECONDS = 5.0


class LoadLog:
    """Takes the engine's messages while it loads."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._said = 0.0

    def __call__(self, message: LoadProgress | Notice | Ready) -> None:
        match message:
            case Notice(text):
                for line in text.splitlines():
                    logger.info("%s", line)
            case Ready():
                what = f"{message.max_model_len} tokens of context, {message.n_pages} pages of {message.page_size}"
                logger.info("ready on %s after %.1f s: %s", message.device, message.load_seconds, what)
            case LoadProgress():
                self._progress(message)

    def _progress(self, message: LoadProgress) -> None:
        now = time.monotonic()
        if message.stage != self._stage:
            self._stage, self._started, self._said = message.stage, now, now
            logger.info("loading: %s", message.stage)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            rate = message.bytes_done / (now - self._started)
            eta = "" if message.eta_s is None else f", {message.eta_s:.0f} s left"
            done, total = message.bytes_done / 1e9, message.bytes_total / 1e9
            logger.info("loading: %s: %.2f of %.2f GB, %.2f GB/s%s", message.stage, done, total, rate / 1e9, eta)
