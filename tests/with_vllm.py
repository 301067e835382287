"""Exported directories read by vLLM: the log-probabilities of random ids, and a greedy text, against transformers'.

    python tests/with_vllm.py EXPORTED...

needs an environment with vLLM, which wants other versions of many packages. On a CPU it wants heads of 32 dimensions or
more.
"""

import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

LENGTH, NEW = 48, 6


def compare(folder: str) -> tuple[float, bool]:
    """The largest difference of a log-probability, and whether the texts are the same."""
    ids = torch.randint(5, 500, (LENGTH,), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(ids[None, :-1]).logits[0].log_softmax(-1)
        text = model.generate(ids[None], max_new_tokens=NEW, do_sample=False)[0, LENGTH:].tolist()
    expected = logits.gather(1, ids[1:, None])[:, 0]
    mask = AutoTokenizer.from_pretrained(folder).mask_token_id
    llm = LLM(folder, dtype="float32", max_model_len=LENGTH + 2 * NEW, enforce_eager=True)
    asked = SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=0, logit_bias={mask: -100.0})
    output = llm.generate([{"prompt_token_ids": ids.tolist()}], asked)[0]
    found = [entry[index].logprob for entry, index in zip(output.prompt_logprobs[1:], ids[1:].tolist(), strict=True)]
    del llm
    cleanup_dist_env_and_memory()
    return (torch.tensor(found) - expected).abs().max().item(), list(output.outputs[0].token_ids) == text


def main() -> None:
    """Compare each; the exit status is 1 if one differs."""
    results = {folder: compare(folder) for folder in sys.argv[1:]}
    for folder, (difference, same) in results.items():
        print(f"{folder}: largest difference {difference:.1e}, {'the same' if same else 'another'} text")
    sys.exit(any(difference > 1e-3 or not same for difference, same in results.values()))


if __name__ == "__main__":
    main()
