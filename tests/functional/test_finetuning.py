"""Fine-tuning up to the first step: losses of packed rows, the cache of tokenized turns, what is refused."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.utils import flatten_batch_for_packed_sequences
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_meap.errors import UsageError
from megatron_meap.huggingface import megatron_model
from megatron_meap.huggingface.export import ExportJob, export
from megatron_meap.huggingface.importer import ImportJob, import_model
from megatron_meap.meap.objectives import OBJECTIVES
from megatron_meap.sft import data
from megatron_meap.sft.rows import shifted
from megatron_meap.sft.templates import TEMPLATES
from megatron_meap.tokenization.huggingface import tokenizer_of
from megatron_meap.trainer import run
from tests import warm
from tests.conftest import REPOSITORY, Corpus
from tests.launch import MODEL, TRAINING, environment, launch
from tests.sft import conversations, prepare, save, write_jsonl

LENGTH = ["--seq-length", "320", "--max-position-embeddings", "320"]


@pytest.fixture
def prepared():
    """Everything up to the start of training, in this process."""
    return prepare


@pytest.fixture
def flags(corpus: Corpus, tmp_path: Path) -> list[str]:
    path = write_jsonl(tmp_path / "train.jsonl", conversations(corpus.documents, 40, longest=12))
    tokenizer = corpus.data_flags[: corpus.data_flags.index("--data-path")]
    sft = ["--meap-sft", "--meap-sft-template", "vicuna", "--meap-sft-threshold", "10", "--train-data-path", str(path)]
    return [*MODEL, *LENGTH, *TRAINING, *tokenizer, *sft]


@pytest.mark.parametrize("concat", [False, True])
def test_packed_rows_have_the_losses_of_rows_alone(prepared, flags: list[str], concat: bool) -> None:
    """Every label of every row: in a sample with others, and in a forward pass of its own."""
    args = prepared(*flags, "--meap-mask-ratio", "0.2", *(["--meap-sft-rows", "concat"] if concat else []))
    dataset = data.datasets(args, [None, None, None])[0]
    assert dataset is not None
    with megatron_model.one_process(), torch.inference_mode():
        model = megatron_model.build(args, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() > 1 else 1))
        compared = 0
        for index in range(8):
            batch = {key: value.unsqueeze(0) for key, value in dataset[index].items()}
            batch |= {"cu_seqlens_padded": None, "local_cp_size": None, "hybrid_cp_group": None}
            batch = flatten_batch_for_packed_sequences(batch)
            packing = run._packed_seq_params(batch, args)
            tokens, positions, labels = batch["tokens"], batch["position_ids"], batch["labels"]
            together = model(tokens, positions, None, labels=labels, packed_seq_params=packing)[0]
            start = 0
            for row in dataset._plan(0)[index]:
                inputs, targets, learned = (torch.from_numpy(part) for part in shifted(dataset.row(int(row), 0)))
                places = torch.arange(len(inputs)).unsqueeze(0)
                alone = model(inputs.unsqueeze(0), places, None, labels=targets.unsqueeze(0))[0]
                assert torch.allclose(together[start : start + len(inputs)], alone, rtol=0, atol=1e-5)
                assert torch.equal(batch["loss_mask"][0, start : start + len(inputs)], learned)
                start += len(inputs)
                compared += 1
        assert compared > 8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(prepared, flags: list[str], objective: str, tmp_path: Path) -> None:
    """Its noise is that of the answers' masked copies; settings that contradict the objective are refused."""
    refused = {"mir": "--meap-copy-weight", "mixed": "--meap-noised-share"}
    flags = [*flags, "--meap-objective", objective]
    if objective == "predictable":  # its weights belong to answers as well, a warm-up of pretraining does not
        (tmp_path / "weights.txt").write_text("1\n" * 512)
        flags += ["--meap-mask-weights", str(tmp_path / "weights.txt"), "--meap-mask-warmup-shape", "linear"]
    elif objective in refused:
        with pytest.raises(UsageError, match=rf"--meap-objective {objective} \({refused[objective]}\): not possible"):
            prepared(*flags)
        return
    args = prepared(*flags)
    never = set(args.meap_special_ids) - {args.meap_mask_token_id}
    (dataset,) = filter(None, data.datasets(args, [None, None, None]))
    noised = 0
    for index in range(min(20, len(dataset))):
        for row, clean in zip(dataset.sample_rows(index), dataset.sample_rows(index, masked=False), strict=True):
            changed = row.tokens != clean.tokens
            became = row.tokens[changed]
            assert (became == args.meap_mask_token_id).all() or args.meap_random_share > 0
            assert never.isdisjoint(became.tolist())
            assert (row.labels[changed] == clean.tokens[changed]).all()
            noised += int(changed.sum())
    assert (noised > 0) == (objective != "ntp")


def test_turns_are_tokenized_once_for_the_same_settings(prepared, flags: list[str], tmp_path: Path, capsys) -> None:
    cache = tmp_path / "cache"

    def stores() -> dict[str, float]:
        return {path.name: (path / "ids.bin").stat().st_mtime_ns for path in cache.iterdir()}

    args = prepared(*flags)
    said = capsys.readouterr().out
    assert re.search(r"fine-tuning data \(train\): \d+ answers of 40 conversations read; 0 answers cut", said)
    assert re.search(r"an epoch is \d+ samples of 320 tokens = [\d.]+ iterations, [\d.]+% of it padding", said)
    first = stores()
    assert len(first) == 1
    assert prepared(*flags, "--seq-length", "200", "--meap-mask-ratio", "0").meap_sft_digests == args.meap_sft_digests
    assert stores() == first
    assert "answers cut to 201 tokens" in capsys.readouterr().out
    assert prepared(*flags, "--meap-sft-template", "chatml").meap_sft_train_digest != args.meap_sft_train_digest
    path = Path(flags[-1])
    path.write_text(path.read_text() + path.read_text().splitlines()[0])
    assert prepared(*flags).meap_sft_train_digest != args.meap_sft_train_digest
    assert len(stores()) == 3


def test_what_decides_the_turns_names_them(
    prepared, flags: list[str], huggingface_folder: Path, tmp_path: Path
) -> None:
    """The tokenizer's own template is a file that may be edited; so is the name of its EOS."""
    folder = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    tokenizer.chat_template = TEMPLATES["vicuna"]
    tokenizer.save_pretrained(folder)
    place = flags.index("--meap-sft-template")
    own = [*flags[:place], *flags[place + 2 :], "--tokenizer-type", "HuggingFaceTokenizer"]
    own += ["--tokenizer-model", str(folder)]
    digests, templates = [], []
    for change in ({}, {"chat_template": TEMPLATES["chatml"]}, {"eos_token": "<pad>"}):
        for name, value in change.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        args = prepared(*own)
        digests.append(args.meap_sft_train_digest)
        templates.append(args.meap_sft_template_text)
    assert len(set(digests)) == 3
    assert templates == [TEMPLATES["vicuna"], TEMPLATES["chatml"], TEMPLATES["chatml"]]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()} == {0o755}


def test_without_validation_data_nothing_is_evaluated(prepared, flags: list[str], capsys) -> None:
    wanted = ["--eval-iters", "5"]
    assert prepared(*flags, *wanted).eval_iters == 0
    assert "nothing is evaluated" in capsys.readouterr().out
    assert prepared(*flags, *wanted, "--valid-data-path", flags[-1]).eval_iters == 5
    split = [*flags[:-2], *wanted, "--data-path", flags[-1], "--split"]
    assert prepared(*split, "100,0,0").eval_iters == 0
    assert prepared(*split, "90,10,0").eval_iters == 5
    for shares, message in {
        "99,1,0": "gives valid none of the 40 conversations; give it a larger share, or 0 for none",
        "0,100,0": "gives train none of the 40 conversations; give it a larger share$",
        "nan": "expected up to three shares",
    }.items():
        with pytest.raises(UsageError, match=f"--split {shares}: {message}"):
            prepared(*split, shares)


def test_a_cache_on_a_full_disk_is_refused(prepared, flags: list[str], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)], check=True)
    try:
        with pytest.raises(UsageError, match=f"{disk}: the cache of tokenized conversations cannot be used"):
            prepared(*flags, "--data-cache-path", str(disk))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_does_not_take_its_cache_for_conversations(prepared, flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    Path(flags[-1]).rename(folder / "train.jsonl")
    flags[-1] = str(folder)
    assert prepared(*flags).meap_sft_digests == prepared(*flags).meap_sft_digests
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["cache"]


def test_resuming_with_other_conversations_is_refused(prepared, flags: list[str], tmp_path: Path) -> None:
    resume = [*flags, "--save", str(tmp_path / "saved"), "--load", str(tmp_path / "saved"), "--save-interval", "5"]
    args = prepared(*resume)
    save(args, tmp_path / "saved")
    prepared(*resume)
    for extra, said in (
        (["--meap-sft-threshold", "11"], "--meap-sft-threshold 10 there, 11 here"),
        (["--seq-length", "300"], "--seq-length 320 there, 300 here"),
        (["--seed", "5"], "--meap-mask-seed 1234 there, 5 here; --seed 1234 there, 5 here"),
        (["--meap-sft-template", "chatml"], "the conversations or their template (a digest)"),
        (
            ["--train-data-path", str(write_jsonl(tmp_path / "other.jsonl", [{"instruction": "a", "output": "b"}]))],
            "the",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(f"was trained with other settings: {said}")):
            prepared(*resume, *extra)


def test_splits_are_of_whole_conversations(prepared, flags: list[str]) -> None:
    flags = [*flags[:-2], "--data-path", flags[-1], "--split", "70,20,10"]
    made = data.datasets(prepared(*flags), [None, 5, None])
    parts = [set(each.store.table[each.rows.turns, 3].tolist()) for each in made if each is not None]
    assert [len(part) for part in parts] == [28, 8, 4]
    assert len(set.union(*parts)) == 40
    again = data.datasets(prepared(*flags, "--data-parallel-random-init"), [None, 5, None])
    assert all(np.array_equal(one.rows.turns, two.rows.turns) for one, two in zip(made, again, strict=True))
    assert len(made[1]) == 5
    masked = [bool((dataset[0]["tokens"] == 3).any()) for dataset in made]
    assert masked[0] or made[0].rows.kinds.any()
    assert not made[1].rows.kinds.any()  # validation is clean


BAD_LINES = [
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "roles out of order"),
    ('{"conversations": [{"from": "human"}]}', "has no 'value'"),
    ('{"messages": []}', "'messages' is empty"),
    ('{"instruction": "x", "output": 5}', "has a number as 'output'"),
    ("{broken", "not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_named(prepared, flags: list[str], line: str, message: str) -> None:
    path = Path(flags[-1])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(UsageError, match=rf"train.jsonl, line 3: .*{message}.*--skip-bad-lines"):
        prepared(*flags)
    assert not any((path.parent / "cache").iterdir())  # nothing half-written


def test_bad_lines_are_skipped_and_counted(prepared, flags: list[str], capsys) -> None:
    path = Path(flags[-1])
    path.write_text(path.read_text() + "\n".join(line for line, _ in BAD_LINES))
    prepared(*flags, "--skip-bad-lines")
    said = capsys.readouterr().out
    assert "40 conversations read, 5 bad lines skipped" in said
    assert said.count("skipped: ") == 5
    path.write_text(BAD_LINES[0][0])
    with pytest.raises(UsageError, match=r"holds no conversation to train on \(1 bad lines skipped\)"):
        prepared(*flags, "--skip-bad-lines")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--meap-sft-template llama-9", "--meap-sft-template llama-9: no such template; use alpaca"),
        ("--train-data-path /nonexistent.jsonl", "--train-data-path /nonexistent.jsonl: nothing there"),
        ("--train-data-path 0.5 /nonexistent.jsonl", "--train-data-path 0.5: weights are not supported"),
        ("--data-path x.jsonl", "--train-data-path: not possible with --data-path, which stands for all data"),
        ("--mock-data", "--mock-data: not possible with --meap-sft"),
        ("--fim-data", "--fim-data: not possible"),
        ("--dataloader-type cyclic", "--dataloader-type: not possible with --meap-sft"),
        ("--meap-mask-strategy official", "--meap-mask-strategy official: not possible"),
        ("--meap-sft-ntp-budget double", "--meap-sft-ntp-budget: not possible with --meap-sft: it is about next-token"),
        ("--meap-sft-threshold -1", "--meap-sft-threshold -1: must not be negative"),
        ("--seq-length 8", "--seq-length 8: the prompts alone of all"),
        ("--pipeline-model-parallel-size 2", "--micro-batch-size 2: Megatron passes packed documents"),
        ("--tokenizer-type NullTokenizer --vocab-size 100", "needs a tokenizer"),
    ],
)
def test_flags_that_cannot_be_used(prepared, flags: list[str], extra: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as refusal:
        prepared(*flags, *extra.split(), world_size=2 if "pipeline" in extra else 1)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_said_before_a_missing_template(prepared, flags: list[str]) -> None:
    place = flags.index("--meap-sft-template")
    del flags[place : place + 2]
    with pytest.raises(UsageError, match="no chat template"):
        prepared(*flags)
    with pytest.raises(UsageError, match="--train-data-path absent: nothing there"):
        prepared(*flags, "--train-data-path", "absent")


@pytest.mark.parametrize("extra", ["--meap-sft-rows concat", "--skip-bad-lines", "--meap-sft-template chatml"])
def test_flags_of_fine_tuning_need_it(prepared, corpus: Corpus, extra: str) -> None:
    with pytest.raises(UsageError, match=f"{extra.split()[0]}: belongs to fine-tuning; add --meap-sft"):
        prepared(*MODEL, *TRAINING, *corpus.data_flags, *extra.split())


def test_mask_ratio_is_the_papers_for_each(prepared, flags: list[str], corpus: Corpus) -> None:
    assert prepared(*flags).meap_mask_ratio == 0.10
    assert prepared(*MODEL, *TRAINING, *corpus.data_flags).meap_mask_ratio == 0.15


def test_the_template_travels_with_the_checkpoint(prepared, flags: list[str]) -> None:
    assert tokenizer_of(prepared(*flags)).chat_template == TEMPLATES["vicuna"]


def test_the_tokenizers_own_template_is_the_default(
    prepared, flags: list[str], huggingface_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    own = [*flags, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "tokenizer")]
    del own[own.index("--meap-sft-template") : own.index("--meap-sft-template") + 2]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="no chat template; name one of alpaca"):
        prepared(*own)
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    dataset = data.datasets(prepared(*own), [None, None, None])[0]
    assert "<|im_start|>user" in tokenizer.decode(dataset.store.turn(0).ids)


def test_samples_can_be_looked_at(flags: list[str]) -> None:
    tool = [REPOSITORY / "tools" / "inspect_batches.py", "--show", "0", "--statistics", "1"]
    done = warm.run([*tool, "--digest", "0:8", *flags], environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "-- next row --" in done.stdout
    assert "fine-tuning data (train)" in done.stdout
    assert re.search(r"sample 0: \d+ tokens, [1-9]\d* masked .*\d+ learned, \d+ rows, \d+ of padding", done.stdout)
    shown = done.stdout.partition("sample 0:")[2].partition("fine-tuning data")[0]
    assert shown.count("«⟦") > 0
    assert "[MASK]" not in shown  # masked inputs are shown by their clean text
    assert "digest of samples 0 to 7" in done.stdout


@pytest.mark.slow  # a launch and two conversions, each with its self-check
def test_an_imported_model_is_fine_tuned_and_exported(
    flags: list[str], huggingface_folder: Path, tmp_path: Path
) -> None:
    """From Hugging Face and back: the tokenizer's own chat template is used, and is there again at the end."""
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES["chatml"]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=320, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    import_model(ImportJob(str(tmp_path / "original"), str(tmp_path / "imported")))
    model = shlex.split((tmp_path / "imported" / "megatron_flags.txt").read_text())
    saved = ["--save", str(tmp_path / "saved"), "--save-interval", "4", "--train-iters", "4"]
    start = [
        "--pretrained-checkpoint",
        str(tmp_path / "imported"),
        "--seq-length",
        "320",
        "--train-data-path",
        flags[-1],
    ]
    done = launch(1, [*model, *TRAINING, "--meap-sft", "--meap-sft-threshold", "10", *start, *saved])
    assert len(done.steps) == 4, done.output[-3000:]
    export(ExportJob(str(tmp_path / "saved"), str(tmp_path / "exported")))
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "exported"))
    settings = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [exported.eos_token_id, exported.convert_tokens_to_ids("<|im_end|>")]
    assert exported.chat_template == TEMPLATES["chatml"]
    assert exported.apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)[0] == (
        tokenizer.convert_tokens_to_ids("<|im_start|>")
    )
