"""Run several trainings in the same ranks and measure the memory of each rank: `measure_many.py RUNS.json`.

Activations are measured at what autograd saves (`saved_tensors_hooks`), the rest at the tensors themselves: by other
means than the planning measures. Every rank writes `measured-RANK.json` beside RUNS.json.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from megatron_meap.backend import device

device.prepare()

import torch  # noqa: E402
from megatron.training import training as megatrons  # noqa: E402

from megatron_meap.trainer import run  # noqa: E402
from tests.run_many import forget  # noqa: E402


class Saved:
    """Storages that autograd has saved, parameters left out; `kept` is their largest sum after a forward pass."""

    def __init__(self, model) -> None:
        self.bytes = self.kept = 0
        self.uses: dict[int, int] = {}
        self.known = {p.untyped_storage()._cdata for chunk in model for p in chunk.parameters()}
        for chunk in model:
            chunk.register_forward_hook(self.note)

    def note(self, *_) -> None:
        self.kept = max(self.kept, self.bytes)


class Packed:
    def __init__(self, saved: Saved, tensor) -> None:
        self.saved, self.tensor = saved, tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage._cdata, storage.nbytes()
        if self.key not in saved.known:
            if self.key not in saved.uses:
                saved.bytes += self.size
            saved.uses[self.key] = saved.uses.get(self.key, 0) + 1

    def __del__(self) -> None:
        uses = self.saved.uses
        if self.key in uses:
            uses[self.key] -= 1
            if not uses[self.key]:
                del uses[self.key]
                self.saved.bytes -= self.size


def size_of(tensors) -> int:
    """Bytes of the distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measure(model, optimizer, saved: Saved) -> dict[str, int]:
    parameters = [p for chunk in model for p in chunk.parameters()]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    weights = {p.untyped_storage()._cdata for p in parameters}
    states = [
        tensor
        for part in parts
        for parameter, state in part.optimizer.state.items()
        for tensor in [parameter, *state.values()]
        if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in weights
    ]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weights": size_of(parameters),
        "gradients": size_of([p.main_grad for p in parameters]),
        "optimizer": size_of(states),
        "kept": saved.kept,
    }


def main() -> None:
    listing = Path(sys.argv[1])
    measured, built = {}, {}
    original = megatrons.setup_model_and_optimizer

    def capture(*args, **kwargs):
        model, optimizer, scheduler = original(*args, **kwargs)
        built.update(model=model, optimizer=optimizer, saved=Saved(model))
        return model, optimizer, scheduler

    def pack(tensor):
        return Packed(built["saved"], tensor) if built else tensor  # Megatron warms its kernels up before

    def unpack(packed):
        return packed.tensor if isinstance(packed, Packed) else packed

    megatrons.setup_model_and_optimizer = capture
    for name, flags in json.loads(listing.read_text()).items():
        sys.argv = ["pretrain_gpt_meap.py", *flags]
        with contextlib.suppress(SystemExit), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            run.run()
        measured[name] = measure(**built)
        built.clear()
        forget()
    rank = os.environ["RANK"]
    (listing.parent / f"measured-{rank}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
