"""The kernel's watch over connections to other hosts."""

import socket

import pytest

from megatron_meap.cluster import connections


@pytest.mark.parametrize(("backend", "limit"), [("gloo", 8000), ("nccl", 0)])
def test_connections_are_watched_where_gloo_communicates(backend: str, limit: int) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
        server.accept()[0],
    ):
        connections.watch(8, backend)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == limit
