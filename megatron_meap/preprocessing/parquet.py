"""Parquet files: blocks of rows as Arrow streams, which a worker decodes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from megatron_meap.errors import UsageError


def open_parquet(name: str, raw: BinaryIO, keys: tuple[str, ...]) -> Any:
    """Open the file and check its columns.

    Raises:
        UsageError: damaged, or without a column of strings for every key.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, error) from error
    for key in keys:
        _check_column(name, file.schema_arrow, key)
    return file


def blocks(
    name: str, file: Any, keys: tuple[str, ...], block_bytes: int, progress: Callable[[float], None]
) -> Iterator[bytes]:
    """Rows in blocks of about `block_bytes`, each a self-contained Arrow stream; none for a file without rows.

    Args:
        name: of the file, for errors.
        file: as returned by `open_parquet`.
        keys: the columns.
        block_bytes: size of a block.
        progress: called after each row group with the share of them that is read.
    """
    import pyarrow as pa

    try:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group)
            rows = max(1, size.num_rows * block_bytes // max(1, size.total_byte_size))
            for batch in file.iter_batches(rows, [group], list(keys)) if size.num_rows else ():
                yield _arrow_bytes(batch)
            progress((group + 1) / file.num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, error) from error


def rows(block: bytes, keys: tuple[str, ...]) -> Iterable[tuple[bytes | None, ...]]:
    """Rows of a block, as bytes: Arrow does not guarantee that its strings are UTF-8."""
    import pyarrow as pa

    table = pa.ipc.open_stream(block).read_all()
    columns = []
    for key in keys:
        column = table.column(key)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        columns.append(column.cast(pa.large_binary()).to_pylist())
    return zip(*columns, strict=True)


def _check_column(name: str, schema: Any, key: str) -> None:
    import pyarrow as pa

    count = schema.names.count(key)
    if count != 1:
        problem = (
            f"no column {key!r}, only {', '.join(schema.names)}" if not count else f"{count} columns named {key!r}"
        )
        raise UsageError(f"{name}: {problem} (--json-keys)")
    kind = schema.field(key).type
    strings = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    # pandas does not know the type of a column without values, such as that of an empty part
    known = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_one(strings) for is_one in known):
        raise UsageError(f"{name}: column {key!r} holds {kind}, not strings: name another with --json-keys")


def _damaged(name: str, error: Exception) -> UsageError:
    return UsageError(f"{name}: damaged Parquet file: {str(error).splitlines()[0]}")


def _arrow_bytes(batch: Any) -> bytes:
    """One record batch as a self-contained Arrow stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()
