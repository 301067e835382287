"""Settings of the tasks: one place for what lm-evaluation-harness hands over as `--metadata`."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

from megatron_meap.errors import UsageError, refuse, refusing
from megatron_meap.flags import Settings, flag

GENERATED_TOKENS = 32
"""Room that every prompt leaves for the model's answer; the task files ask for as many tokens."""


class Unsuitable(UsageError):
    """A task has no samples with these settings, such as too short a context; a suite then leaves it out."""


@dataclass(frozen=True)
class Options(Settings):
    """What determines the samples of the generated tasks, besides the tokenizer: same options, same samples."""

    PREFIX: ClassVar[str] = ""

    tokenizer: str
    """Hugging Face directory (or hub name) whose tokenizer measures the prompts."""
    max_seq_lengths: tuple[int, ...] = flag(
        (1024,), "lengths of the generated prompts, in tokens, room for the answer included", name="--context-lengths"
    )
    samples: int = flag(10, "samples of each cell (a length and depth, a position, ...)")
    seed: int = flag(1234, "seed of all samples")
    chat_template: bool = flag(False, "ask in the tokenizer's chat template")
    haystack: str | None = flag(None, "text or JSON Lines with text (default: Python's documentation)", metavar="FILE")
    depths: tuple[float, ...] = flag((0, 25, 50, 75, 100), "percent of the context before the needle")
    needle: str = flag(
        "The special magic number for {key} is {value}.", "sentence to hide, with {key} and {value}", metavar="TEXT"
    )
    question: str = flag(
        "What is the special magic number for {key}? The special magic number for {key} is",
        "question at the end, with {key}",
        metavar="TEXT",
    )
    answer: str = flag(
        "{value}", "part of the needle that must be found; to be ranked it needs {value}", metavar="TEXT"
    )
    needles: tuple[int, ...] = flag((2, 3, 4, 5), "lengths of the kinship chains")
    kv_pairs: int | None = flag(None, "pairs of an object (default: as many as fit)")
    kv_digits: int | None = flag(None, "hexadecimal digits of keys and values (default: UUIDs, as in the original)")
    kv_positions: int = flag(5, "number of gold positions, spread evenly")
    kv_instruction: bool = flag(True, "ask in words, or only with the key, for small base models")
    kv_file: str | None = flag(None, "lost-in-the-middle's key-value file, instead of generated pairs", metavar="FILE")
    qa_file: str | None = flag(None, "lost-in-the-middle's questions, for the document tasks", metavar="FILE")
    qa_documents: int = flag(5, "documents per question in meap_multidoc")
    qa_positions: tuple[int, ...] | None = flag(None, "gold positions, from 0 (default: the original's)")
    piqa_file: str | None = flag(None, "PIQA's valid.jsonl, with its labels next to it", metavar="FILE")
    piqa_rows: int | None = None
    """Only this many of its rows, the first ones."""
    commonsense_data: str | None = flag(
        None, "<task>.jsonl of lm-eval's commonsense tasks, if there is no hub", metavar="DIR"
    )
    summaries_file: str | None = flag(None, "JSON Lines with document, for meap_faithfulness", metavar="FILE")

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Options":
        """Pick the options out of what lm-eval passes to a task: its metadata and the model's arguments.

        Raises:
            UsageError: there is no tokenizer to measure with, or a value cannot be used.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in metadata.items() if name in known and value is not None}
        given.setdefault("tokenizer", metadata.get("pretrained") or metadata.get("model"))
        if not isinstance(given["tokenizer"], str):
            raise UsageError("the tasks need a tokenizer to measure prompts: give pretrained=... or tokenizer=...")
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        options = cls(**{**given, **lists})
        options._check()
        return options

    @property
    def count(self) -> "TokenCounter":
        """Counts the tokens of prompts."""
        return counter(self.tokenizer, self.chat_template)

    def _check(self) -> None:
        digits = self.kv_digits
        refuse(
            (self.samples < 1, f"--samples {self.samples}: must be at least 1"),
            (not self.max_seq_lengths, "--context-lengths: give at least one"),
            (any(not 0 <= each <= 100 for each in self.depths), f"--depths {self.depths}: must lie between 0 and 100"),
            (any(not 2 <= n <= 19 for n in self.needles), f"--needles {self.needles}: a chain has 2 to 19"),
            (self.kv_pairs is not None and self.kv_pairs < 2, f"--kv-pairs {self.kv_pairs}: must be at least 2"),
            (digits is not None and not 2 <= digits <= 32, f"--kv-digits {digits}: must be from 2 to 32"),
            (self.qa_documents < 2, f"--qa-documents {self.qa_documents}: must be at least 2"),
            (self.kv_positions < 1, f"--kv-positions {self.kv_positions}: must be at least 1"),
        )


class TokenCounter:
    """Counts tokens as the model will see them, including the special tokens that the tokenizer adds.

    Args:
        tokenizer: of transformers.
        chat_template: whether a prompt is a user's message in its chat template.
    """

    def __init__(self, tokenizer: Any, chat_template: bool = False) -> None:
        self.tokenizer = tokenizer
        self._chat_template = chat_template

    def __call__(self, text: str) -> int:
        """Tokens of a prompt."""
        if not self._chat_template:
            return len(self.tokenizer(text)["input_ids"])
        chat = [{"role": "user", "content": text}]
        answered = [
            *chat,
            {"role": "assistant", "content": ""},
        ]  # with everything that a template puts before an answer
        asked = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts = [asked, self.tokenizer.apply_chat_template(answered, tokenize=False)]
        return max(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def each(self, texts: list[str]) -> list[int]:
        """Tokens of each of many texts, without added special tokens."""
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


@cache
def counter(tokenizer: str, chat_template: bool = False) -> TokenCounter:
    """The counter of a tokenizer's directory (or hub name).

    Raises:
        UsageError: nothing there can be loaded, it gives no tokens for text, or it has no chat template.
    """
    from transformers import AutoTokenizer

    with refusing(f"{tokenizer}: holds no tokenizer that transformers can load"):
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    if chat_template and not loaded.chat_template:
        raise UsageError(f"--chat-template: the tokenizer of {tokenizer} has none; leave the flag out")
    found = TokenCounter(loaded, chat_template)
    if found("The quick brown fox.") == 0:
        raise UsageError(f"{tokenizer}: its tokenizer gives no tokens for text; is tokenizer.json complete?")
    return found


def as_dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples in the form that lm-eval expects of a task's `custom_dataset`."""
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}
