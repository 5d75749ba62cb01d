"""Ids to text one at a time, for streams: never a broken character, never text that later ids would change.

Knows only how to ask a tokenizer for a token's bytes or for the text of some ids. `tokenizer.py` hands these out.
"""

import codecs
from collections.abc import Callable, Sequence


class Utf8Decoder:
    """Ids to text one at a time, for tokens that are byte strings.

    An incomplete UTF-8 sequence is held back; bytes that can no longer become valid give U+FFFD at once.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Text that may be shown after this id."""
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What the end of the stream adds: U+FFFD for a sequence cut short, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class DiffDecoder:
    """Ids to text one at a time, for decoders that look at neighbours (sentencepiece and the like).

    A token's text is what decoding it after its predecessors adds. Text that ends in U+FFFD is held back, for the
    next byte token may complete it, but no more than four tokens (the longest UTF-8 sequence).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], special_text: Callable[[int], str | None]) -> None:
        self._decode = decode
        self._special_text = special_text
        self._context: list[int] = []  # shown already; the decoder needs it to place spaces
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Text that may be shown after this id."""
        special = self._special_text(token)
        if special is not None:
            text = self.flush() + special
            self._context = [token]
            return text
        self._pending.append(token)
        text = self._added()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < 4:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What the end of the stream adds."""
        return self._show(self._added()) if self._pending else ""

    def _added(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _show(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text


IncrementalDecoder = Utf8Decoder | DiffDecoder
