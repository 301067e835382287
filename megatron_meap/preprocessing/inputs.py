"""Which files a job reads: files, globs and folders, each file once, and never what a job writes."""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_meap.errors import UsageError

STDIN = "-"

# What a job, finished or not, leaves among its inputs if its prefix is there; and what Spark writes beside its parts
# (`_metadata` even is a Parquet file).
_OUTPUTS = re.compile(
    r".*(\.(bin|idx|lengths|journal|manifest|bad_lines\.jsonl)\.partial|\.manifest\.json|\.bad_lines\.jsonl)"
)
_SPARKS = re.compile(r"_(SUCCESS|metadata|common_metadata|(started|committed)_.*|temporary|spark_metadata)")
_TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
"""What the folder of a table has that keeps the files of its older versions beside those that are valid."""


@dataclass
class Found:
    """The input files, in order, and what was left out from folders and globs."""

    flag: str = "--input"
    """The flag that named the inputs, for errors."""
    paths: list[str] = field(default_factory=list)
    hidden: int = 0
    outputs: int = 0
    """Files of a dataset or of a running job."""

    sparks: int = 0
    repeated: int = 0
    """Files found under another name too: through a link, or a glob that matches a folder and its contents."""

    def left_out(self) -> str:
        """What was left out, in words; empty if nothing was."""
        counts = {
            "hidden": self.hidden,
            "of a dataset or an unfinished job": self.outputs,
            "of Spark's own": self.sparks,
            "names of files that are read already": self.repeated,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def find_inputs(patterns: list[str], flag: str = "--input") -> list[str]:
    """Paths of the input files, as `find`."""
    return find(patterns, flag).paths


def find(patterns: list[str], flag: str = "--input") -> Found:
    """The input files: files, globs, folders (all files below, links followed, hidden ones aside), or `-`.

    Files are in the order of the patterns, and sorted by name within a glob or folder. A file that a folder or glob
    contains twice, through a link, is read once. Errors name the `flag`.

    Raises:
        UsageError: a pattern that matches nothing, a file named by two patterns, `-` together with other inputs, an
            explicitly named output of a job, or something that is neither a file nor a folder.
    """
    found = Found(flag)
    if STDIN in patterns:
        if len(patterns) > 1:
            raise UsageError(f"{flag}: '-' (standard input) cannot be combined with files")
        found.paths.append(STDIN)
        return found
    read: dict[tuple[int, int], str] = {}  # device and inode, and the path
    for pattern in patterns:
        inside: set[tuple[int, int]] = set()  # of this pattern
        for path in _matches(pattern, found):
            identity = _identity(path, flag)
            if identity in inside:
                found.repeated += 1
                continue
            if identity in read:
                other = "" if read[identity] == path else f" (as {read[identity]})"
                raise UsageError(
                    f"{flag}: {path} is named twice{other}, so its documents would be in the dataset twice"
                )
            inside.add(identity)
            read[identity] = path
            found.paths.append(path)
        if not inside:
            raise UsageError(f"{flag} {pattern}: nothing there; give a file, a glob or a folder")
    return found


def _matches(pattern: str, found: Found) -> Iterator[str]:
    """Paths of the files that a pattern matches."""
    entered: set[tuple[int, int]] = set()
    if os.path.isdir(pattern):
        yield from sorted(_files_under(pattern, found, entered))
    elif os.path.exists(pattern):
        if _is_output(pattern):
            raise UsageError(f"{found.flag} {pattern}: written by a preprocessing job, not text; leave it out")
        yield pattern
    else:
        _refuse_closed_folders(pattern, found.flag)
        matches = sorted(glob.glob(pattern, recursive=True))
        for folder in {os.path.dirname(match) for match in matches}:
            _refuse_table(folder, found.flag)
        for match in matches:
            if any(_SPARKS.fullmatch(name) for name in match.split(os.sep) if name not in pattern.split(os.sep)):
                found.sparks += 1
            elif os.path.isdir(match):
                yield from sorted(_files_under(match, found, entered))
            elif not _is_loop(match) and _is_read(match, found):
                yield match  # a hidden one too, if the glob asks for it


def _files_under(folder: str, found: Found, entered: set[tuple[int, int]]) -> Iterator[str]:
    """Files of a folder and its subfolders, each folder once: a link may lead to another of them, or back up."""
    identity = _identity(folder, found.flag, folder=True)
    if identity in entered:
        return
    entered.add(identity)
    try:
        entries = [(entry, entry.is_dir()) for entry in os.scandir(folder)]
    except OSError as error:
        raise UsageError(f"{found.flag} {error.filename or folder}: cannot be read: {error.strerror}") from error
    _refuse_table(folder, found.flag)
    for entry, is_folder in entries:
        if is_folder and not entry.name.startswith(".") and not _SPARKS.fullmatch(entry.name):
            yield from _files_under(entry.path, found, entered)
        elif entry.name.startswith("."):
            found.hidden += 1
        elif _is_read(entry.path, found):
            yield entry.path


def _refuse_closed_folders(pattern: str, flag: str) -> None:
    """Refuse a folder in which a glob may have matches, but which cannot be read: a glob silently skips it."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        for path in glob.glob(pattern, recursive=True):
            if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
                raise UsageError(f"{flag} {path}: cannot be read: {os.strerror(errno.EACCES)}")


def _refuse_table(folder: str, flag: str) -> None:
    """Refuse the folder of a table: which of its files are valid is only in its log."""
    for name, kind in _TABLES.items():
        if os.path.isdir(os.path.join(folder, name)):
            raise UsageError(
                f"{flag} {folder}: a table of {kind}, whose folder also has files that no longer belong to it; export "
                "it to a new folder, or name its valid files"
            )


def _is_loop(path: str) -> bool:
    """Whether a path goes round so often that the system refuses: `**` follows a link that leads back up that far."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _is_read(path: str, found: Found) -> bool:
    """Whether a file in a folder or a glob is an input; counts what is not."""
    output, spark = _is_output(path), _SPARKS.fullmatch(os.path.basename(path)) is not None
    found.outputs += output
    found.sparks += spark
    return not (output or spark)


def _is_output(path: str) -> bool:
    """Whether a job wrote this file: by its name, and for a dataset's two files, by the presence of the other."""
    stem, suffix = os.path.splitext(path)
    pair = {".bin": ".idx", ".idx": ".bin"}.get(suffix)
    paired = pair is not None and (os.path.exists(stem + pair) or os.path.exists(f"{stem}{pair}.partial"))
    return paired or _OUTPUTS.fullmatch(os.path.basename(path)) is not None


def _identity(path: str, flag: str, *, folder: bool = False) -> tuple[int, int]:
    """Device and inode of a file."""
    try:
        found = os.stat(path)
    except OSError as error:
        leads = f"a link to {os.readlink(path)}, which " if os.path.islink(path) else ""
        raise UsageError(f"{flag} {path}: {leads}cannot be read: {error.strerror}") from error
    if not folder and not stat.S_ISREG(found.st_mode):  # a pipe can be read only once; files are checked before that
        raise UsageError(f"{flag} {path}: not a file; leave it out, or pipe it into standard input ({flag} -)")
    return found.st_dev, found.st_ino
