"""Conversations for tests: made from the corpus, of all lengths, with every edge that the code has."""

import json
import os
import random
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch
from megatron.training.global_vars import unset_global_variables
from megatron.training.training import destroy_global_state

from megatron_meap.huggingface import megatron_model
from megatron_meap.trainer import run


def conversations(documents: list[str], count: int, seed: int = 0, longest: int = 40) -> list[dict]:
    """Generated conversations in all three shapes: one to three turns, answers of one to `longest` words."""
    draw = random.Random(seed)
    words = " ".join(documents).split()

    def text(most: int) -> str:
        start = draw.randrange(len(words) - most)
        return " ".join(words[start : start + draw.randint(1, most)])

    made: list[dict] = []
    for number in range(count):
        turns = [(text(8), text(longest)) for _ in range(draw.randint(1, 3))]
        if number % 3 == 0:
            messages = [{"role": "system", "content": text(4)}] if number % 2 else []
            for question, answer in turns:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            made.append({"messages": messages})
        elif number % 3 == 1:
            said = [part for question, answer in turns for part in (("human", question), ("gpt", answer))]
            made.append({"conversations": [{"from": role, "value": part} for role, part in said]})
        else:
            made.append({"instruction": turns[0][0], "input": text(4) if number % 2 else "", "output": turns[0][1]})
    return made


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """One record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(*flags: str, world_size: int = 1) -> Namespace:
    """The arguments of a training run, in this process, which does everything up to the start of the training."""
    environment = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    with mock.patch.object(sys, "argv", ["pretrain_gpt_meap.py", *flags]), mock.patch.dict(os.environ, environment):
        try:
            return run.prepare()[0]
        finally:
            unset_global_variables()
            destroy_global_state()


def save(args: Namespace, directory: Path) -> None:
    """Save a checkpoint of iteration 2 as a run with these arguments would, with zeros and without its optimizer."""
    with megatron_model.one_process():
        model = megatron_model.build(args, torch.float32)
        for parameter in model.parameters():
            parameter.detach().zero_()
        megatron_model.save(model, args, directory / "iter_0000002")
    (directory / "latest_checkpointed_iteration.txt").write_text("2")
