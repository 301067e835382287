"""Whether the nodes of a job can train together: checked in seconds, before a launch that would wait for minutes."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass

import torch

from megatron_meap.backend import device
from megatron_meap.errors import UsageError

_ATTEMPT_S = 5.0


@dataclass(frozen=True)
class Node:
    """A node of the job."""

    name: str
    address: str
    """Host name or IP address at which the other nodes reach it."""


def check_gpus(node: Node, wanted: int) -> None:
    """Refuse a node with fewer GPUs than `wanted`."""
    if wanted == 0:
        return
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"node {node.name}: nvidia-smi does not run ({error}), {wanted} GPUs wanted") from error
    found = sum(line.startswith("GPU ") for line in listed.splitlines())
    if found < wanted:
        raise UsageError(
            f"node {node.name}: has {found} GPUs, {wanted} wanted; leave it out, or ask for fewer with --gpus-per-node"
        )


def check_pytorch(node: Node, wanted: int) -> None:
    """Refuse a node whose PyTorch cannot use `wanted` GPUs, though the driver lists them."""
    if wanted == 0:
        return
    if problem := device.gpu_problem():
        raise UsageError(f"node {node.name}: {problem}; it has a driver: install one that fits this PyTorch")
    if (found := torch.cuda.device_count()) < wanted:
        raise UsageError(f"node {node.name}: PyTorch sees {found} GPUs, {wanted} wanted; look at CUDA_VISIBLE_DEVICES")


def check_network(nodes: list[Node], index: int, port: int, seconds: float) -> None:
    """Meet every other node on `port`, each of them running this at the same time.

    Args:
        nodes: all nodes of the job, in the same order everywhere.
        index: of this node.
        port: TCP port that the rendezvous will use; nothing may be listening there yet.
        seconds: how long to try.

    Raises:
        UsageError: names the nodes that cannot be reached, the port and the reason.
    """
    own = nodes[index]
    deadline = time.monotonic() + seconds
    visitors: set[int] = set()
    try:
        listener = socket.create_server(("", port), backlog=len(nodes))
    except OSError as error:
        raise UsageError(f"node {own.name}: cannot listen on port {port} ({os.strerror(error.errno or 0)})") from error
    with listener:
        threading.Thread(target=_welcome, args=(listener, visitors), daemon=True).start()
        others = [node for number, node in enumerate(nodes) if number != index]
        failures: dict[str, str] = {}
        visits = [threading.Thread(target=_visit, args=(node, index, port, deadline, failures)) for node in others]
        for visit in visits:
            visit.start()
        for visit in visits:
            visit.join()
        while len(visitors) < len(others) and time.monotonic() < deadline:  # they need our answer
            time.sleep(0.05)
    if failures:
        raise UsageError(
            f"node {own.name} cannot reach {', '.join(f'{name} ({why})' for name, why in sorted(failures.items()))} on "
            f"port {port} within {seconds:.0f} s; check the network and its firewall, or name the INTERFACE"
        )


def _welcome(listener: socket.socket, visitors: set[int]) -> None:
    """Record which nodes connect, until the listener is closed; each sends its index and gets an answer."""
    with contextlib.suppress(OSError):
        while True:
            visitor, _ = listener.accept()
            with visitor, contextlib.suppress(OSError, ValueError):
                visitor.settimeout(_ATTEMPT_S)
                number = int(visitor.recv(16))
                visitor.sendall(b"welcome")
                visitors.add(number)


def _visit(node: Node, index: int, port: int, deadline: float, failures: dict[str, str]) -> None:
    """Try to meet one node until the deadline; leave the last reason in `failures`."""
    while True:
        try:
            with socket.create_connection((node.address, port), timeout=_ATTEMPT_S) as connection:
                connection.sendall(f"{index}\n".encode())
                if connection.recv(16) == b"welcome":
                    return
                reason = "something else answers there"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            failures[node.name] = reason if node.address == node.name else f"{node.address}: {reason}"
            return
        time.sleep(0.2)
