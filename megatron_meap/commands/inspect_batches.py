"""Show what the model sees: decoded samples with the noised tokens marked, mask statistics, a digest of the stream.

    python tools/inspect_batches.py --show 0 1 --digest 0:64 <the flags of the training run>
    torchrun --nproc_per_node 4 tools/inspect_batches.py --digest 0:64 <the same flags>

The digest covers the samples in training order, read by the real data loaders of the given layout: equal digests mean
that two runs, layouts or resumptions train on the same masked batches.
"""

import argparse
import sys
from pathlib import Path

from megatron_meap.backend import device
from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser, with_files


def parse() -> argparse.Namespace:
    """Take this tool's flags from the command line and leave the rest for Megatron's parser."""
    parser = Parser(__doc__, allow_abbrev=False)
    parser.add_argument(
        "--show", type=int, nargs="+", default=[], metavar="INDEX", help="samples to decode (default: 0)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the decoded samples as a page")
    parser.add_argument(
        "--statistics", type=int, default=0, metavar="SAMPLES", help="show mask statistics over this many"
    )
    parser.add_argument("--digest", metavar="FIRST:END", help="digest of the stream of these samples")
    own, rest = parser.parse_known_args(with_files(sys.argv[1:]))
    sys.argv = [sys.argv[0], *rest]
    return own


def main() -> None:
    """Build the datasets as a training run would, and show them."""
    own = parse()
    if own.statistics < 0:
        raise UsageError(f"--statistics {own.statistics}: at least 1, or 0 for none")
    device.prepare()
    from megatron_meap.inspection.streams import Streams

    streams = Streams()
    if own.digest:
        first, _, end = own.digest.partition(":")
        if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
            raise UsageError(f"--digest {own.digest}: expected FIRST:END, such as 0:64")
        streams.print_digest(int(first), int(end))
    if not (own.digest or own.statistics) or own.html:
        own.show = own.show or [0]
    if own.show or own.statistics:
        streams.print_samples(own.show, own.statistics, own.html)
