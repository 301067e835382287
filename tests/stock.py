"""Megatron's own next-token pretraining, without this project's data or loss, for comparison with ratio 0.

Only the CPU adaptation and the local layers are shared, without which Megatron does not run here.
"""

import sys
from pathlib import Path

from megatron_meap.backend import device

device.prepare()

import torch  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_args, get_tokenizer, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.utils import get_blend_and_blend_per_split  # noqa: E402

from megatron_meap.trainer import run  # noqa: E402

seen: list[torch.Tensor] = []


def datasets(num_samples: list[int]) -> tuple:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=blend, blend_per_split=blend_per_split,
        split=args.split, path_to_cache=args.data_cache_path, tokenizer=get_tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, config).build()


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    seen.append(torch.cat([batch["tokens"], batch["labels"], batch["loss_mask"].long()]))
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(output: torch.Tensor):
        total = (output.float() * batch["loss_mask"]).sum()
        count = batch["loss_mask"].sum()
        return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}

    return losses, loss


def main() -> None:
    """`stock.py FILE flags...` or, with FILE named `ours...`, this project's own pipeline; saves the batches there."""
    target = Path(sys.argv.pop(1))
    args, store = run.prepare()
    steps = datasets, forward_step
    if target.name.startswith("ours"):
        original = run.get_batch

        def watched(*arguments, **keywords):
            batch = original(*arguments, **keywords)
            seen.append(torch.cat([batch["tokens"], batch["labels"], batch["loss_mask"].long()]))
            return batch

        run.get_batch = watched
        steps = run.datasets_provider, run.forward_step
    config = pretrain_cfg_container_from_args(args, run.model_config(args))
    pretrain(config, steps[0], ModelType.encoder_or_decoder, steps[1], store=store)
    torch.save(seen, target)


if __name__ == "__main__":
    main()
