"""One answer being decoded: ids with logprobs in, pieces of visible text with their tokens out.

It applies stop strings and keeps the promise that the texts of the tokens, joined, are the text that was sent: a token
carries what became visible when it arrived, which is nothing while a character or a possible stop string is still
open. `service.py` owns one for each sequence. Knows no engine and no wire format.
"""

import codecs
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

from hybrid.batch import TokenLogprob
from server.chat import Delta
from server.parse import StopStrings
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as clients see it. `raw` are its own bytes, `text` what it made visible."""

    token: int
    text: str
    raw: bytes
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A delta and the tokens whose text ends in it (empty where logprobs were not asked for)."""

    delta: Delta
    tokens: tuple[TokenText, ...] = ()


class Parser(Protocol):
    """Ids to deltas: `parse.OutputParser`, or `PlainText` below."""

    @property
    def saw_tool_calls(self) -> bool: ...
    def feed(self, token: int, /) -> list[Delta]: ...
    def finish(self) -> list[Delta]: ...


class PlainText:
    """The parser of a plain completion: every id is text; special ones only where asked for."""

    saw_tool_calls = False

    def __init__(self, tokenizer: Tokenizer, show_specials: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.detokenizer()
        self._show_specials = show_specials

    def feed(self, token: int) -> list[Delta]:
        """The text that `token` completes."""
        return _content(self._decoder.flush() if self.hides(token) else self._decoder.feed(token))

    def hides(self, token: int) -> bool:
        """Whether `token` has no text here."""
        return not self._show_specials and self._tokenizer.is_special(token)

    def finish(self) -> list[Delta]:
        """What was held back."""
        return _content(self._decoder.flush())


def _content(text: str) -> list[Delta]:
    return [Delta(content=text)] if text else []


@dataclass(slots=True)
class _Open:
    """A token whose text is not complete yet."""

    logprob: TokenLogprob
    raw: bytes
    text: str = ""


class Choice:
    """Decodes one sequence. `stop_ids` never show, also where the request goes on after them.

    Logprobs of tokens without text are reported in a plain completion only: its readers count tokens.
    """

    def __init__(self, tokenizer: Tokenizer, parser: Parser, stops: tuple[str, ...], stop_ids: frozenset[int]) -> None:
        self.n_tokens = 0
        self.n_reasoning = 0
        self.stopped = False  # by a stop string
        self._tokenizer = tokenizer
        self._parser = parser
        self._reports_hidden = isinstance(parser, PlainText)
        self._hides = parser.hides if isinstance(parser, PlainText) else tokenizer.is_special
        self._stop_ids = stop_ids
        self._reasoning = _Channel(stops)
        self._content = _Channel(stops)
        self._open: list[_Open] = []  # where logprobs are asked for
        self._n_open = 0  # tokens since the last delta

    @property
    def saw_tool_calls(self) -> bool:
        """True once at least one complete tool call was seen."""
        return self._parser.saw_tool_calls

    def feed(self, token: int, logprob: TokenLogprob | None, *, last: bool = False) -> list[Piece]:
        """The pieces that `token` completes. `last`: the sequence ended with it because it is a stop id."""
        self.n_tokens += 1
        self._n_open += 1
        silent = last or token in self._stop_ids
        hidden = silent or self._hides(token)
        deltas = [] if silent else self._parser.feed(token)
        if logprob is not None and not hidden:
            self._open.append(_Open(logprob, self._tokenizer.token_bytes(token)))
        pieces = self._show(deltas, is_end=hidden)  # a hidden token ends the text of those before it
        if logprob is not None and hidden and self._reports_hidden:
            self._open.append(_Open(logprob, b""))
        return pieces

    def finish(self) -> list[Piece]:
        """Everything held back, once no more tokens come."""
        pieces = self._show(self._parser.finish(), is_end=True)
        if not self.stopped:
            pieces += self._flush(self._reasoning, self._content)
        if self._open and self._reports_hidden:
            pieces.append(Piece(Delta(), tuple(_token_text(one) for one in self._open)))
        self._open = []
        return pieces

    def _show(self, deltas: list[Delta], is_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for delta in deltas:
            if self.stopped:
                break
            pieces += self._show_one(delta, is_end)
        return pieces

    def _show_one(self, delta: Delta, is_end: bool) -> list[Piece]:
        if delta.reasoning:
            self.n_reasoning += self._n_open
        self._n_open = 0
        if delta.tool is not None:
            self._open = []
            return [*self._flush(self._reasoning, self._content), Piece(delta)]
        channel = self._reasoning if delta.reasoning else self._content
        before = self._flush(self._reasoning) if channel is self._content else []
        text = delta.reasoning or delta.content
        shown = channel.cut(text)
        self.stopped = channel.stopped
        tokens = channel.release(shown, self._claim(text, is_end or self.stopped))
        return before + self._pieces(channel, shown, tokens)

    def _claim(self, text: str, is_end: bool) -> list[TokenText]:
        """Give `text` to the latest open token that can have made it, and close the tokens that are complete.

        A token is complete when none of its bytes belong to a character that is still open.
        """
        if not self._open:
            return []
        raw = b"".join(one.raw for one in self._open)
        complete = len(raw) - (0 if is_end else _incomplete(raw))
        end = n_closed = 0
        maker = self._open[0]
        for one in self._open:
            maker = one if end < complete else maker
            end += len(one.raw)
            n_closed += end <= complete
        maker.text += text
        closed, self._open = self._open[:n_closed], self._open[n_closed:]
        return [_token_text(one) for one in closed]

    def _flush(self, *channels: "_Channel") -> list[Piece]:
        return [piece for channel in channels for piece in self._pieces(channel, *channel.flush())]

    def _pieces(self, channel: "_Channel", text: str, tokens: list[TokenText]) -> list[Piece]:
        if not text and not tokens:
            return []
        delta = Delta(reasoning=text) if channel is self._reasoning else Delta(content=text)
        return [Piece(delta, tuple(tokens))]


def _token_text(one: _Open) -> TokenText:
    return TokenText(one.logprob.token, one.text, one.raw, one.logprob.logprob, one.logprob.top)


def _incomplete(raw: bytes) -> int:
    """Bytes at the end of `raw` that begin a UTF-8 character and do not finish it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return len(decoder.getstate()[0])


class _Channel:
    """One text on its way out, with stop strings; a token leaves with the last character of its text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._stops = StopStrings(stops)
        self._tokens: deque[tuple[int, TokenText]] = deque()  # (offset of the end of its text, token)
        self._n_claimed = 0  # characters of all tokens' texts
        self._n_out = 0  # characters sent

    def cut(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        shown, self.stopped = self._stops.feed(text)
        return shown

    def flush(self) -> tuple[str, list[TokenText]]:
        """The text held back, and its tokens."""
        shown = self._stops.flush()
        return shown, self.release(shown, [])

    def release(self, shown: str, tokens: list[TokenText]) -> list[TokenText]:
        """`tokens` have come and `shown` is sent: the tokens that leave with it."""
        for token in tokens:
            self._n_claimed += len(token.text)
            self._tokens.append((self._n_claimed, token))
        self._n_out += len(shown)
        out: list[TokenText] = []
        while self._tokens and self._tokens[0][0] <= self._n_out:
            out.append(self._tokens.popleft()[1])
        if self.stopped and self._tokens:  # the stop string may begin inside a token: keep what was sent of it
            end, token = self._tokens.popleft()
            kept = token.text[: max(0, len(token.text) - (end - self._n_out))]
            self._tokens.clear()
            if kept:
                out.append(replace(token, text=kept, raw=kept.encode()))
        return out
