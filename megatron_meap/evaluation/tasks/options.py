"""Settings of the tasks: one place for what lm-evaluation-harness hands over as `--metadata`."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from megatron_meap.errors import UsageError, refuse, refusing

GENERATED_TOKENS = 32
"""Room that every prompt leaves for the model's answer; the task files ask for as many tokens."""


class Unsuitable(UsageError):
    """A task has no samples with these settings, as a context length that holds none; a suite then leaves it out."""


@dataclass(frozen=True)
class Options:
    """What decides the samples of the generated tasks, beside the tokenizer; the same options, the same samples."""

    tokenizer: str
    """Hugging Face directory (or hub name) whose tokenizer measures the prompts."""
    max_seq_lengths: tuple[int, ...] = (1024,)
    """Context lengths, in tokens: prompt, BOS and the room for the answer together."""
    samples: int = 10
    """Samples of each cell: a length and depth, a position, a number of needles."""
    seed: int = 1234
    chat_template: bool = False
    """Prompts are a user's message in the tokenizer's chat template, which counts among their tokens."""
    haystack: str | None = None
    """Text file or JSON Lines with `text`; Python's own documentation where not given."""
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """Percent of the context that stand before the needle."""
    needle: str = "The special magic number for {key} is {value}."
    question: str = "What is the special magic number for {key}? The special magic number for {key} is"
    answer: str = "{value}"
    needles: tuple[int, ...] = (2, 3, 4, 5)
    """Lengths of the kinship chains."""
    kv_pairs: int | None = None
    """Pairs of a key-value sample; as many as fit into each context length where not given."""
    kv_digits: int | None = None
    """Hexadecimal digits of keys and values; UUIDs, as in the original, where not given."""
    kv_positions: int = 5
    """Gold positions, spread evenly from the first pair to the last."""
    kv_instruction: bool = True
    """Ask as the original does; otherwise the prompt is the JSON object and the key again, for small base models."""
    kv_file: str | None = None
    """A file of the original (`ordered_kv_records`, `key`, `value`), which then decides pairs and values."""
    qa_file: str | None = None
    """Questions with documents, in the format of lost-in-the-middle."""
    qa_positions: tuple[int, ...] | None = None
    """Gold positions, from 0; the original's where not given."""
    qa_documents: int = 5
    """Documents of a question in `meap_multidoc`; the other tasks have their number in their names."""
    piqa_file: str | None = None
    """PIQA's validation set as its authors ship it."""
    piqa_rows: int | None = None
    """So many of it, the first ones; all where not given."""
    summaries_file: str | None = None
    """Texts to summarise: JSON Lines with `document`."""

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Options":
        """Pick the options out of what lm-eval hands to a task: its metadata and the model's arguments.

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
            (self.samples < 1, f"samples {self.samples}: must be at least 1"),
            (not self.max_seq_lengths, "context lengths: give at least one"),
            (any(not 0 <= depth <= 100 for depth in self.depths), f"depths {self.depths}: must lie between 0 and 100"),
            (any(not 2 <= n <= 19 for n in self.needles), f"needles {self.needles}: a chain has 2 to 19"),
            (self.kv_pairs is not None and self.kv_pairs < 2, f"key-value pairs {self.kv_pairs}: must be at least 2"),
            (digits is not None and not 2 <= digits <= 32, f"digits {digits}: must be from 2 to 32"),
            (self.qa_documents < 2, f"--qa-documents {self.qa_documents}: must be at least 2"),
            (self.kv_positions < 1, f"key-value positions {self.kv_positions}: must be at least 1"),
        )


class TokenCounter:
    """Counts tokens as the model will see them: special tokens that the tokenizer adds by itself included.

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
        answered = [*chat, {"role": "assistant", "content": ""}]  # with all that a template puts before an answer
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
