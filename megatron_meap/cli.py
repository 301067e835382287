"""The console command `megatron-meap`: training and every tool as a subcommand."""

import ast
import importlib
import sys
from pathlib import Path

from megatron_meap import __version__, commands, errors

PRETRAIN = "pretrain"


def main() -> None:
    """Run the subcommand that the command line names."""
    errors.run(_dispatch)


def subcommands() -> dict[str, str]:
    """Names and summaries of the subcommands, read without importing them, which takes seconds."""
    here = Path(__file__).parent
    modules = {PRETRAIN: here / "pretrain.py"}
    for folder in commands.__path__:
        modules |= {
            path.stem.replace("_", "-"): path for path in sorted(Path(folder).glob("*.py")) if path.stem != "__init__"
        }
    return {name: _summary(path) for name, path in modules.items()}


def _summary(path: Path) -> str:
    """First line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def _dispatch() -> None:
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else "--help"  # the scripts' names serve too
    if name == "--version":
        print(f"megatron-meap {__version__}")
        return
    known = subcommands()
    if name in ("-h", "--help"):
        width = max(map(len, known))
        print("usage: megatron-meap COMMAND [FLAGS]   (megatron-meap COMMAND --help)\n")
        print(*(f"  {name:<{width}}  {summary}" for name, summary in known.items()), sep="\n")
        print("\nTraining on several processes: torchrun --nproc_per_node N -m megatron_meap.pretrain [FLAGS]")
        return
    if name not in known:
        raise errors.UsageError(f"megatron-meap {name}: no such command; known are {', '.join(known)}")
    sys.argv = [f"megatron-meap {name}", *sys.argv[2:]]
    room = "megatron_meap" if name == PRETRAIN else "megatron_meap.commands"
    importlib.import_module(f"{room}.{name.replace('-', '_')}").main()
