"""Several hosts on one machine: network namespaces on a separate switch; the machine's own network is not touched."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

INTERFACE = "eth0"
"""Name of the network interface of every host."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface."""

    name: str
    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """Command line that runs another one on this host."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *words]

    def link(self, state: str) -> None:
        """Connect the host to the switch ("up"), or cut it off ("down") without notice to those waiting for it."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, state)


@dataclass
class Network:
    """Hosts that reach one another and nothing else; all of them share the machine's disk and its host name."""

    hosts: list[Host] = field(default_factory=list)

    def __init__(self, count: int) -> None:
        self._namespaces: list[str] = []
        self._prefix = f"meap-{os.getpid()}"
        self.hosts = [Host(f"node{n}", f"{self._prefix}-{n}", f"10.213.77.{n}") for n in range(1, count + 1)]

    def __enter__(self) -> "Network":
        switch = self._namespace(f"{self._prefix}-switch")
        try:
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number, host in enumerate(self.hosts):
                self._namespace(host.namespace)
                port = f"port{number}"
                peer = ["type", "veth", "peer", "name", INTERFACE, "netns", host.namespace]
                _ip("-n", switch, "link", "add", port, *peer)
                _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    _ip("-n", host.namespace, "link", "set", interface, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)

    def _namespace(self, name: str) -> str:
        _ip("netns", "add", name)
        self._namespaces.append(name)
        return name


def network_or_skip(count: int) -> Network:
    """A network of hosts; the test is skipped if this machine cannot create one."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for command in ("ip", "nsenter"):
        if shutil.which(command) is None:
            pytest.skip(f"no `{command}` on this machine (Debian: apt install iproute2 util-linux)")
    made = subprocess.run(["ip", "netns", "add", f"meap-{os.getpid()}-probe"], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    _ip("netns", "delete", f"meap-{os.getpid()}-probe")
    return Network(count)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
