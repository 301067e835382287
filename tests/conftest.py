"""Shared fixtures: a small real corpus, a throw-away tokenizer and an indexed dataset; nothing is downloaded."""

import logging
import os
import pydoc_data.topics
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_meap.backend import device

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MEAP_DEVICE", "cpu")  # on a machine with a GPU, too; tests/gpu starts processes
    patch.setenv("MEAP_CPU_THREADS", "1")  # the other core has another file of tests, or another rank
    device.prepare()  # once, before any test imports Megatron
# A shell starts background jobs with SIGINT ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "tools"))  # as for a tool that Python is started with


@pytest.fixture(autouse=True)
def _logging_is_heard() -> Iterator[None]:
    """Undo the silencing of libraries by tools that run in this process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of one rank, and Megatron's random states."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from tests.launch import free_port

    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout (or in MEAP_SHARED); tests that need it skip where it is missing."""
    folder = Path(os.environ.get("MEAP_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus."""

    tokenizer: str
    """SentencePiece model with [MASK] as a control symbol, 512 pieces."""

    prefix: str
    """Path of the .bin and .idx files without their suffix."""

    second_prefix: str
    """Another dataset, of the same documents in reverse order."""

    documents: list[str]

    @property
    def data_flags(self) -> list[str]:
        """Megatron's flags that name the tokenizer and the data."""
        return [
            "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.tokenizer,
            "--data-path", self.prefix, "--split", "90,10,0", "--num-workers", "0",
        ]  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Python's documentation topics as a corpus of about 300,000 tokens."""
    import sentencepiece
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("corpus")
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    text = folder / "text.txt"
    text.write_text("\n".join(documents))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=512, model_type="bpe",
        byte_fallback=True, control_symbols=["[MASK]"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [torch.tensor([*processor.encode(document), processor.eos_id()]) for document in documents]
    for name, order in (("text_document", encoded), ("reversed_document", encoded[::-1])):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=DType.optimal_dtype(512))
        for ids in order:
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(folder / f"{name}.idx"))
    prefixes = [str(folder / name) for name in ("text_document", "reversed_document")]
    return Corpus(str(folder / "tokenizer.model"), *prefixes, documents)


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as Hugging Face keeps it, with <eos> and the tokens of fill-in-the-middle."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<eos>", "<prefix>", "<middle>", "<suffix>", "<pad>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    model.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    folder = tmp_path_factory.mktemp("huggingface")
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def character_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer whose tokens are characters, so that lengths can be counted by hand."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "</s>", "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    folder = tmp_path_factory.mktemp("characters")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder
