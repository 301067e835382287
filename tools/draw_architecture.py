"""Draw docs/architecture.md from the code: the rooms and their imports, and the walk of one sample through a real step.

python tools/draw_architecture.py            writes docs/architecture.md
python tools/draw_architecture.py --check    reports whether it is up to date, and writes nothing
"""

import argparse
import ast
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is drawn, not what is installed

from megatron_meap.errors import UsageError, run  # noqa: E402

PACKAGE = ROOT / "megatron_meap"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn: {} -->", "<!-- end -->"


def rooms() -> dict[str, set[str]]:
    """The rooms of the package (folders and top-level modules), and the rooms that each imports, also lazily."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    names -= {"__init__", "__pycache__"}
    arrows: dict[str, set[str]] = {name: set() for name in names}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if room in names and isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
                inside = (node.module or "").split(".")[1:2] or [alias.name for alias in node.names]
                arrows[room] |= {other for other in inside if other in names and other != room}
    return arrows


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Level of every room: one above the highest room that it imports."""
    found: dict[str, int] = {}
    while len(found) < len(arrows):
        ready = {room for room, others in arrows.items() if room not in found and others <= found.keys()}
        if not ready:
            raise UsageError(f"megatron_meap: a circle of imports among {', '.join(arrows.keys() - found.keys())}")
        found |= {room: 1 + max((found[other] for other in arrows[room]), default=0) for room in ready}
    return found


def picture(arrows: dict[str, set[str]]) -> str:
    """The rooms as a Mermaid graph, highest first, without arrows that are implied by others."""

    def reached(room: str) -> set[str]:
        return arrows[room].union(*(reached(other) for other in arrows[room])) if arrows[room] else set()

    order = levels(arrows)
    lines = ["```mermaid", "graph TD"]
    for room in sorted(arrows, key=lambda name: (-order[name], name)):
        direct = [other for other in arrows[room] if not any(other in reached(step) for step in arrows[room])]
        lines += [f"  {room} --> {other}" for other in sorted(direct)] or [f"  {room}"]
    return "\n".join([*lines, "```"])


def table(arrows: dict[str, set[str]]) -> str:
    """The purpose of every room, from its docstring."""
    order = levels(arrows)
    lines = ["| level | room | what for |", "|---|---|---|"]
    for room in sorted(arrows, key=lambda name: (-order[name], name)):
        path = PACKAGE / room
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| {order[room]} | `{room}` | {text} |")
    return "\n".join(lines)


def walk() -> str:
    """The functions of this project in the order of their first calls, in one training step of a tiny model."""
    seen: dict[str, tuple[int, str]] = {}
    stack: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        name = f"{path.relative_to(PACKAGE).with_suffix('')}:{frame.f_code.co_qualname}".replace("/", ".")
        if event == "call":
            room = name.split(".")[0]
            if room in ("meap", "trainer") and name not in seen and "<locals>" not in name:
                text = (frame.f_code.co_consts[:1] or ("",))[0]
                seen[name] = len(stack), (text if isinstance(text, str) else "").strip().partition("\n")[0]
            stack.append(name)
        elif event == "return" and stack:
            stack.pop()

    one_step(lambda: sys.setprofile(note), lambda: sys.setprofile(None))
    return "\n".join(["```text", *(f"{'  ' * depth}{name}   {text}" for name, (depth, text) in seen.items()), "```"])


def one_step(begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Train a tiny model on Megatron's mock data; `begin` is called before its second step, `end` after it."""
    os.environ |= {"MEAP_DEVICE": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    flags = (
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --num-layers 1 --hidden-size 16 --seq-length 16 "
        "--num-attention-heads 2 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 1 --lr 1e-3 "
        "--train-iters 3 --eval-iters 0 --num-workers 0 --log-interval 100 --fp32"
    )
    sys.argv = ["pretrain_gpt_meap.py", *flags.split()]
    from megatron_meap.backend import device, megatron_patches

    device.prepare()
    from megatron_meap.trainer import run as trainer

    def after_step(model: Any, optimizer: Any, iteration: int) -> None:
        {1: begin, 2: end}.get(iteration, lambda: None)()

    megatron_patches.after_each_step(after_step)
    with tempfile.TemporaryFile("w") as unseen:
        shown, sys.stdout = sys.stdout, unseen
        try:
            trainer.run()
        finally:
            sys.stdout = shown


def page(drawings: dict[str, str]) -> str:
    """The page with its drawings replaced."""
    text = PAGE.read_text()
    for name, drawing in drawings.items():
        before, begin, rest = text.partition(BEGIN.format(name))
        if not begin:
            raise UsageError(f"{PAGE}: has no line {BEGIN.format(name)}; put it where the drawing belongs")
        text = f"{before}{begin}\n{drawing}\n{END}{rest.partition(END)[2]}"
    return text


def main() -> None:
    """Draw, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page, and write nothing")
    parser.add_argument("--no-walk", action="store_true", help="leave the walk as it is (it trains for a few seconds)")
    asked = parser.parse_args()
    arrows = rooms()
    drawings = {"rooms": picture(arrows), "table": table(arrows)}
    if not asked.no_walk:
        drawings["walk"] = walk()
    drawn = page(drawings)
    if asked.check and drawn != PAGE.read_text():
        raise UsageError(f"{PAGE.relative_to(ROOT)}: does not show the code as it is; run tools/draw_architecture.py")
    if not asked.check:
        PAGE.write_text(drawn)


if __name__ == "__main__":
    run(main)
