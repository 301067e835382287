"""Check that this node has its GPUs and reaches the other nodes of a job; run on all of them at the same time.

    python tools/check_nodes.py --index 0 --gpus 8 --port 29500 first=10.0.0.1 second=10.0.0.2     # on the first

The batch scripts in examples/slurm do so before every launch.
"""

from megatron_meap.cluster.nodes import Node, check_gpus, check_network, check_pytorch
from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser


def main() -> None:
    """Parse the flags and check."""
    parser = Parser(__doc__)
    parser.add_argument("nodes", nargs="+", metavar="NAME=ADDRESS", help="all nodes, in the same order everywhere")
    parser.add_argument("--index", type=int, required=True, help="index of this node among them, from 0")
    parser.add_argument(
        "--port", type=int, required=True, help="port of the rendezvous; nothing may be listening on it yet"
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that this node must have (default: none)")
    parser.add_argument("--seconds", type=float, default=60, help="how long to try (default: 60)")
    args = parser.parse_args()
    if not 0 <= args.index < len(args.nodes):
        raise UsageError(f"--index {args.index}: there are {len(args.nodes)} nodes, counted from 0")
    if not 0 < args.port < 65536:
        raise UsageError(f"--port {args.port}: must lie between 1 and 65535")
    nodes = [Node(name, address or name) for name, _, address in (word.partition("=") for word in args.nodes)]
    check_network(nodes, args.index, args.port, args.seconds)  # first, because the others wait for this node
    check_gpus(nodes[args.index], args.gpus)
    check_pytorch(nodes[args.index], args.gpus)
