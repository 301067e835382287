"""Many hosts: connections, disks, nodes, signals."""
