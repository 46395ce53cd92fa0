"""One answer as it comes in: what its pieces say, noted in the request's record."""

from __future__ import annotations

from loadtest.results import records
from loadtest.results.records import Record


class Answer:
    """Collects an answer; the APIs call it for each piece.

    Args:
        record: of the request; its times count from the intended start.

    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.ended_s: float | None = None
        self.finished = False
        self._texts: list[str] = []
        self._asides: list[str] = []
        self._opaque = False
        self._choice_s: float | None = None

    @property
    def text(self) -> str:
        """What was answered, without reasoning and calls of tools."""
        return "".join(self._texts)

    @property
    def generated(self) -> str | None:
        """All text that was generated; None when some of it came as something else than text."""
        return None if self._opaque else "".join([*self._asides, *self._texts])

    def choice(self, arrived: float, text: str = "", aside: str = "", opaque: bool = False) -> None:
        """Take a piece of what is generated.

        Args:
            arrived: when it came, in seconds after the intended start.
            text: text of the answer.
            aside: visible reasoning, which is generated but no part of the answer.
            opaque: whether it holds what is generated but no plain text, such as the call of a tool.

        """
        record = self.record
        self._choice_s = arrived
        if text or aside or opaque:
            if record.first_token_s is None:
                record.first_token_s = arrived
            record.token_s.append(arrived)
            if text:
                self._texts.append(text)
            if aside:
                self._asides.append(aside)
            if opaque:
                self._opaque = True
        if record.first_token_s is not None:
            record.last_token_s = arrived

    def finish(self, reason: str) -> None:
        """Take the reason for which the server stopped."""
        self.record.finish_reason = reason

    def usage(self, prompt_tokens: int | None, output_tokens: int | None, cached_tokens: int | None) -> None:
        """Take what the server counted."""
        record = self.record
        record.prompt_tokens, record.output_tokens, record.cached_tokens = prompt_tokens, output_tokens, cached_tokens

    def end(self, arrived: float) -> None:
        """Take the end of the answer."""
        self.ended_s = arrived
        self.finished = True

    def fail(self, message: str, empty: bool = False) -> None:
        """Take an error that the server reports, or an answer that holds nothing."""
        self.record.fail(records.EMPTY_RESPONSE if empty else records.STREAM_ERROR, message)

    def conclude(self, pending: bool, generates: bool) -> None:
        """Judge the answer when no more comes.

        Args:
            pending: whether the stream stopped inside an event.
            generates: whether it had to hold text.

        """
        record = self.record
        if record.outcome != records.OK:
            return
        if pending:
            record.fail(records.STREAM_CUT, "the stream ended inside an event")
        elif not self.finished and record.finish_reason is None:
            record.fail(records.STREAM_CUT, "the stream ended without [DONE] and without a finish reason")
        elif generates and record.first_token_s is None:
            # All tokens that were asked for came, and none has a text (special tokens): vLLM sends them in one piece.
            if record.finish_reason == "length" and record.output_tokens:
                record.first_token_s = record.last_token_s = self._choice_s
            else:
                record.fail(records.EMPTY_RESPONSE, "the stream held no text")
