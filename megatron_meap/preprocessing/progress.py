"""How far a job is: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time


class Progress:
    """Shows bytes of text per second, documents and tokens per second, and the time left."""

    def __init__(self, total: int, *, every_seconds: float = 5, every_documents: int | None = None) -> None:
        """`total` is the size of the input files in bytes (0: unknown); the intervals are for the plain lines."""
        self._total = total
        self._every = (every_seconds, every_documents)
        self._begun = self._shown = time.monotonic()
        self._shown_documents = 0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            shape = "{percentage:3.0f}%|{bar}| {postfix}" if total else "{postfix}"
            self._bar = tqdm(total=total or None, bar_format=shape, dynamic_ncols=True, mininterval=0.2)

    def update(self, consumed: int, text_bytes: int, documents: int, tokens: int) -> None:
        """Show where the job is, if it is time: input consumed (bytes of the files), and what came out of it."""
        now = time.monotonic()
        seconds, count = self._every
        if self._bar is not None:
            self._bar.n = min(consumed, self._total) if self._total else consumed
            self._bar.set_postfix_str(self._line(now, consumed, text_bytes, documents, tokens), refresh=False)
            self._bar.update(0)
        elif documents - self._shown_documents >= count if count else now - self._shown >= seconds:
            share = f"{100 * min(consumed, self._total) / self._total:3.0f}% | " if self._total else ""
            print(share + self._line(now, consumed, text_bytes, documents, tokens), file=sys.stderr, flush=True)
            self._shown, self._shown_documents = now, documents

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, now: float, consumed: int, text_bytes: int, documents: int, tokens: int) -> str:
        elapsed = max(now - self._begun, 1e-9)
        line = (
            f"{documents:,} documents | {text_bytes / elapsed / 1e6:.1f} MB/s | {documents / elapsed:,.0f} documents/s"
            f" | {tokens / elapsed:,.0f} tokens/s"
        )
        if self._total and consumed:
            left = int(elapsed * max(0, self._total - consumed) / consumed)
            line += f" | ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return line
