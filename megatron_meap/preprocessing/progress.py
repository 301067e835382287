"""The progress of a job: a bar on a terminal, elsewhere a plain line every few seconds."""

import sys
import time
from dataclasses import dataclass

_BAR_SECONDS, _LINE_SECONDS = 0.2, 5.0


@dataclass(frozen=True)
class Counts:
    """How far a job is."""

    consumed: int = 0
    """Bytes of the input files."""

    text_bytes: int = 0
    """Bytes of text (UTF-8) encoded so far."""

    documents: int = 0
    tokens: int = 0


class Progress:
    """Shows bytes of text per second, documents and tokens per second, and the time left."""

    def __init__(self, total: int, before: Counts, *, every_documents: int | None = None) -> None:
        """Begin.

        Args:
            total: size of the input files in bytes; 0: unknown.
            before: what an earlier run did already, which does not count in the rates.
            every_documents: documents between plain lines; None: one every few seconds.
        """
        self._total = total
        self._before = before
        self._every_documents = every_documents
        self._begun = self._shown = time.monotonic()
        self._shown_documents = before.documents
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            shape = "{percentage:3.0f}%|{bar}| {desc}" if total else "{desc}"
            self._bar = tqdm(total=total or None, bar_format=shape, dynamic_ncols=True, leave=False)

    def update(self, now: Counts) -> None:
        """Show the progress, if it is time to."""
        elapsed = time.monotonic() - self._shown
        if self._bar is not None:
            if elapsed >= _BAR_SECONDS:
                self._bar.n = min(now.consumed, self._total) if self._total else now.consumed
                self._bar.set_description_str(self._line(now))
                self._shown = time.monotonic()
        elif (
            now.documents - self._shown_documents >= self._every_documents
            if self._every_documents
            else elapsed >= _LINE_SECONDS
        ):
            share = f"{100 * min(now.consumed, self._total) / self._total:3.0f}% | " if self._total else ""
            print(share + self._line(now), file=sys.stderr, flush=True)
            self._shown, self._shown_documents = time.monotonic(), now.documents

    def close(self) -> None:
        """End the bar, so that the next line of the terminal begins at its left."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, now: Counts) -> str:
        elapsed, before = max(time.monotonic() - self._begun, 1e-9), self._before
        line = (
            f"{now.documents:,} documents | {(now.text_bytes - before.text_bytes) / elapsed / 1e6:.1f} MB/s"
            f" | {(now.documents - before.documents) / elapsed:,.0f} documents/s"
            f" | {(now.tokens - before.tokens) / elapsed:,.0f} tokens/s"
        )
        if self._total and now.consumed > before.consumed:
            left = int(elapsed * max(0, self._total - now.consumed) / (now.consumed - before.consumed))
            line += f" | ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return line
