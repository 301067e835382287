"""Limiting and reporting the memory of a conversion."""

import contextlib
import ctypes
import resource

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE = 2**20


class PeakMemory:
    """The peak memory of this process, and how much it has grown since this object was created.

    Creating one also lets glibc return every large block to the system as soon as it is freed: by default it keeps
    blocks of up to 32 MB, and the gaps between tensors of different sizes cost a quarter of the weights (measured).
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to set
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE)
        self._before = self._peak()

    @staticmethod
    def _peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def growth(self) -> int:
        """Bytes by which the process's peak has grown."""
        return self._peak() - self._before

    def __str__(self) -> str:
        return f"peak memory {self._peak() / 1e6:,.0f} MB, {self.growth / 1e6:,.0f} MB of it for the conversion"
