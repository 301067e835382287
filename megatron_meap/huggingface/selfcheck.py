"""Proof that a conversion computes the same: both sides loaded by their own libraries, and compared.

That a directory loads proves nothing: a missing weight gets random numbers, a superfluous one is dropped, a wrong
`rope_theta` is not noticed (all of these have been seen). So the weights in the files must be exactly those of the
model, the logits must agree, and so must the rotary frequencies, which short texts hardly show.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import Checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.huggingface.source import read_directory
from megatron_meap.tokenization.huggingface import load_directory, plain_ids
from megatron_meap.tokenization.reference import plain_encode

TOLERANCE = 1e-4  # of the logits in fp32, for the largest logit up to 1; relative to it above
LENGTH, SEQUENCES = 192, 2
SAMPLES = (
    "The quick brown fox jumps over the lazy dog, 1,234.5 times; then it sleeps.",
    "def main(argv: list[str]) -> int:\n    return sum(len(word) ** 2 for word in argv)  # [MASK] <s> </s>\n",
    "Größe, naïve café, ½ · ﬁ — « œuvre »; Ελληνικά, русский язык, العربية, עברית, 日本語テキスト, 한국어, ไทย",
    "  leading and  double   spaces, a\ttab, a\u00a0hard space, emoji 🙂👩‍👩‍👧, e\u0301 and a zero\u200bwidth space ",
    "In the beginning of a document nobody knows what its end will say. That is what a language model is for: it reads "
    "what has been written so far, and says how likely every next word is.",
)


class CheckFailed(UsageError):
    """The two sides of a conversion are not the same model."""


def check_export(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype, args: Namespace) -> None:
    """Check an exported directory against its checkpoint, and print the findings.

    Args:
        checkpoint: what was exported.
        directory: the export.
        dtype: of the exported weights.
        args: the checkpoint's arguments, with the current place of the tokenizer.
    """
    if wrong := latest.damage(checkpoint.directory):
        raise UsageError(f"{checkpoint.directory}: the checkpoint is damaged: {wrong}")
    if args.tokenizer_type != "NullTokenizer":
        check_tokenizer(directory, args)
    compare(directory, checkpoint.directory, dtype, None)


def compare(huggingface: Path, megatron: Path, dtype: torch.dtype, columns: int | None) -> float:
    """Load both models in fp32, with their weights rounded to `dtype`, and compare what they compute.

    One model is in memory at a time.

    Args:
        huggingface: a Hugging Face directory.
        megatron: directory of one iteration of a Megatron checkpoint.
        dtype: of the weights of the converted side.
        columns: compare only the logits of the first so many tokens; all that both have if not given.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        CheckFailed: they differ, or transformers does not load exactly the weights in the files.
    """
    model = load_completely(huggingface)
    _round(model, dtype)
    vocabulary = min(model.config.vocab_size, columns or model.config.vocab_size)
    tokens = _tokens(huggingface, vocabulary, model.config.max_position_embeddings)
    with torch.inference_mode():
        theirs = model(tokens).logits[..., :vocabulary].float()
    frequencies = model.model.rotary_emb.inv_freq.float()
    del model
    ours, our_frequencies = _megatron_side(megatron, dtype, tokens)
    if not torch.allclose(frequencies, our_frequencies, rtol=1e-5, atol=0):
        raise CheckFailed(f"{huggingface}: its rotary frequencies are not Megatron's: rope_theta or its scaling differ")
    difference = (theirs - ours[..., :vocabulary]).abs().max().item()
    allowed = TOLERANCE * max(1.0, ours.abs().max().item())
    text = (
        f"largest difference of the logits in fp32 over {tokens.numel()} tokens {difference:.2e}, allowed {allowed:.2e}"
    )
    if not difference <= allowed:  # also where it is not a number
        raise CheckFailed(f"{huggingface}: does not compute what Megatron computes: {text}")
    print(f"self-check: all weights loaded, none missing, unexpected or mismatched; {text}", flush=True)
    return difference


def load_completely(directory: Path) -> Any:
    """Load a directory with transformers in fp32.

    Raises:
        UsageError: a weight is missing, superfluous or of another shape, as transformers reports it or not.
    """
    read_directory(directory)  # refuses what transformers drops without a word, such as another head in a tied model
    load: Any = AutoModelForCausalLM.from_pretrained  # its types do not know of the loading info
    model, report = load(str(directory), dtype=torch.float32, output_loading_info=True, local_files_only=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            found = sorted(map(str, report[kind]))
            raise CheckFailed(f"{directory}: transformers reports {kind.replace('_', ' ')}: {', '.join(found[:3])}")
    return model.eval()


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round fp32 weights to values of `dtype`, so that only the conversion is compared, not the rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def _megatron_side(directory: Path, dtype: torch.dtype, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [b, s, vocabulary], and the rotary frequencies [head dim / 2]."""
    from megatron_meap.huggingface import megatron_model

    with megatron_model.one_process():
        model, _ = megatron_model.load(directory, torch.float32)
        _round(model, dtype)
        angles = model.rotary_pos_emb.get_emb(2)  # of positions 0 and 1, [2, 1, 1, head dim]
        angles = angles[0] if isinstance(angles, tuple) else angles  # YaRN has a factor beside them
        return megatron_model.logits(model, tokens), angles[1, 0, 0, : angles.shape[-1] // 2]


def _tokens(directory: Path, vocabulary: int, longest: int) -> Tensor:
    """Token ids [b, s]: of the sample texts, or random ones if the directory has no tokenizer."""
    length = min(LENGTH, longest)
    if not (directory / "tokenizer_config.json").is_file():
        return torch.randint(vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    ids = [token for text in SAMPLES for token in load_directory(directory)(text)["input_ids"] if token < vocabulary]
    repeated = ids * (SEQUENCES * length // len(ids) + 1)
    return torch.tensor(repeated[: SEQUENCES * length]).view(SEQUENCES, length)


def check_tokenizer(directory: Path, args: Namespace) -> None:
    """Check that the saved tokenizer gives the same ids and texts as Megatron's, and has the mask token."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    saved = load_directory(directory)
    suppressed = GenerationConfig.from_pretrained(str(directory)).suppress_tokens or []
    if saved.mask_token_id is None or saved.mask_token_id not in suppressed:
        raise CheckFailed(f"{directory}: the mask token (id {saved.mask_token_id}) is not suppressed in generation")
    reference = build_tokenizer(args)
    same_ids(saved, plain_encode(reference), reference.detokenize, str(directory))
    if saved.mask_token_id in saved(saved.mask_token, split_special_tokens=True)["input_ids"]:
        print(f"note: with this tokenizer the text {saved.mask_token} always becomes the mask token", flush=True)
    print(f"self-check: the tokenizer round-trips; {saved.mask_token} is id {saved.mask_token_id}", flush=True)


def same_ids(
    saved: Any, encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str], where: str
) -> None:
    """Compare a saved tokenizer with a reference on the sample texts."""
    for text in SAMPLES:
        ids = plain_ids(saved, text)
        if ids != list(encode(text)):
            raise CheckFailed(f"{where}: its tokenizer gives other ids than the one in training, such as for {text!r}")
        if saved.unk_token_id not in ids and saved.decode(ids) != decode(ids):
            raise CheckFailed(f"{where}: its tokenizer decodes to another text than the one in training, for {text!r}")
