"""Compressed files of several streams, padded and damaged: read as a whole or refused, never in part.

The reference programs judge what is whole. They are more lenient in one way only: gzip and bzip2 leave out what follows
the last stream that they understand (with a warning, or without one), which loses documents.
"""

import bz2
import gzip
import lzma
import random
import shutil
import subprocess
from itertools import pairwise

import pytest
import zstandard

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.readers import InputFile, InputOptions
from tests.unit.preprocessing import outputs, run_job, tokenizer_args, write_jsonl

COMPRESS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}
SUFFIXES = {"gzip": "gz", "bzip2": "bz2", "xz": "xz", "zstd": "zst"}
TEXT = [b'{"text": "%d"}\n' % n * 40 for n in range(3)]


def read(path) -> bytes | None:
    """What is read from a file; None if it is refused by name."""
    try:
        return b"".join(InputFile(str(path), InputOptions(kind="jsonl")).blocks())
    except UsageError as refused:
        return None if str(refused).startswith(f"{path}: ") else b"refused without the file's name"


def spoiled(form: str, generator: random.Random) -> tuple[bytes, str]:
    """Streams with something between, after or inside them, or nothing at all; and what it is."""
    streams = [COMPRESS[form](text) for text in TEXT]
    place, how = (
        generator.randrange(1, 4),
        generator.choice(["whole", "zeros", "garbage", "flip", "cut", "empty", "lie"]),
    )
    if how == "zeros":
        streams.insert(place, bytes(generator.randrange(1, 5000)))
    elif how == "garbage":
        streams.insert(place, generator.randbytes(generator.randrange(1, 9)))
    elif how == "flip":
        damaged = bytearray(streams[place - 1])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        streams[place - 1] = bytes(damaged)
    elif how == "cut":
        streams[place - 1] = streams[place - 1][: -generator.randrange(1, 30)]
    elif how == "empty":
        streams.insert(place, COMPRESS[form](b""))
    elif how == "lie":  # the first bytes of another stream, and no more
        streams.append(streams[0][: generator.randrange(1, 12)])
    return b"".join(streams), how


def said_by_reference(form: str, path) -> bytes | None:
    """What the format's own program unpacks; None if it refuses it, warns, or leaves something out."""
    done = subprocess.run([form, "-dc", str(path)], capture_output=True, check=False)
    whole = done.returncode == 0 and b"ignored" not in done.stderr
    return done.stdout if whole else None


@pytest.mark.parametrize("form", COMPRESS)
def test_read_as_the_reference_program_does_or_refused(form, tmp_path):
    if shutil.which(form) is None:
        pytest.skip(f"{form} is not installed")
    generator, agreed, refused = random.Random(form), 0, 0
    for number in range(60):
        path = tmp_path / f"{number}.{SUFFIXES[form]}"
        data, how = spoiled(form, generator)
        path.write_bytes(data)
        ours, theirs = read(path), said_by_reference(form, path)
        if form == "gzip" and how == "zeros":
            theirs = None  # it does not report zeros anywhere
        assert ours == theirs, path
        agreed += ours is not None
        refused += ours is None
    assert agreed >= 8
    assert refused >= 15


@pytest.mark.parametrize("form", COMPRESS)
@pytest.mark.parametrize("where", ["between", "after"])
def test_zeros_are_refused_unless_the_format_allows_them(form, where, tmp_path):
    path = tmp_path / f"a.{SUFFIXES[form]}"
    for count in (1, 4, 512, 70_001):
        packed = [COMPRESS[form](text) for text in TEXT[:2]]
        packed.insert(1 if where == "between" else 2, bytes(count))
        path.write_bytes(b"".join(packed))
        allowed = form == "xz" and count % 4 == 0
        assert read(path) == (b"".join(TEXT[:2]) if allowed else None)


@pytest.mark.parametrize("form", COMPRESS)
def test_damage_is_located(form, tmp_path):
    path = tmp_path / f"a.{SUFFIXES[form]}"
    first, second = COMPRESS[form](TEXT[0]), COMPRESS[form](TEXT[1])
    for data, message in [
        (first + second[:-5], f"the file ends within the stream that begins at byte {len(first)}"),
        (first + b"?garbage?" * 3, f"neither a stream nor the end of the file at byte {len(first)}"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            list(InputFile(str(path), InputOptions(kind="jsonl")).blocks())


@pytest.mark.parametrize("form", COMPRESS)
def test_a_job_over_many_small_streams_has_every_document(form, tmp_path):
    """As pigz and pbzip2 cut them: anywhere, within a line or before the first byte that tells what the text is."""
    plain = write_jsonl(tmp_path / "plain.jsonl", [f"{n} {n + 1}" for n in range(80)])
    data, generator = plain.read_bytes(), random.Random(0)
    cuts = [0, 1, *sorted(generator.sample(range(2, len(data)), 30)), len(data)]
    path = tmp_path / f"packed.{SUFFIXES[form]}"
    path.write_bytes(b"".join(COMPRESS[form](data[a:b]) for a, b in pairwise(cuts)))
    args = tokenizer_args("NullTokenizer", vocab_size=100)
    run_job([plain], tmp_path / "a", args)
    run_job([path], tmp_path / "b", args)
    assert outputs(tmp_path / "a_text_document") == outputs(tmp_path / "b_text_document")
