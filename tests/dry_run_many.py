"""Parse and dry-run several commands in one process: `dry_run_many.py COMMANDS.json`; prints the results as JSON."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from megatron_meap.backend import device

device.prepare_to_look()

from megatron.training.training import destroy_global_state  # noqa: E402

from megatron_meap.backend import megatron_patches  # noqa: E402
from megatron_meap.inspection import dry_run  # noqa: E402
from megatron_meap.trainer import arguments  # noqa: E402
from megatron_meap.trainer.tokenizer import set_tokenizer  # noqa: E402

SHOWN = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels seq_length rotary_base "
    "layernorm_epsilon lr min_lr lr_warmup_iters train_iters weight_decay adam_beta1 adam_beta2 clip_grad seed bf16 "
    "global_batch_size meap_mask_ratio meap_official_init meap_decay_all_parameters add_bias_linear "
    "untie_embeddings_and_output_weights lr_decay_style padded_vocab_size data_parallel_size context_parallel_size "
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size"
)


def main() -> None:
    megatron_patches.apply()
    results = {}
    for name, command in json.loads(Path(sys.argv[1]).read_text()).items():
        os.environ |= {"RANK": "0", "WORLD_SIZE": str(command["world"])}
        sys.argv = ["pretrain_gpt_meap.py", *command["flags"]]
        with contextlib.redirect_stdout(io.StringIO()):
            args = arguments.parse_flags()
            arguments.check(args)
            set_tokenizer(args)
        shown = {key: getattr(args, key) for key in SHOWN.split()}
        destroy_global_state()
        sys.argv += command["shorter"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            dry_run.run()
        results[name] = {"args": shown, "output": output.getvalue()}
        destroy_global_state()
    print("\nresults: " + json.dumps(results))


if __name__ == "__main__":
    main()
