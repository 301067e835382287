"""A gigabyte streamed through the tool in bounded memory (slow)."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.preprocessing import make_tokenizer, topics

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
LIMIT_MB = 1500


@pytest.mark.slow
def test_a_gigabyte_of_new_words_stays_within_the_bound(tmp_path):
    """Through standard input, so that nothing is on disk; half of the words are new, which is what fills caches."""
    model = make_tokenizer(tmp_path, vocab_size=2000)
    command = [sys.executable, str(TOOL), "--input", "-", "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    generator, texts, written, peak, looked = random.Random(0), topics(), 0, 0.0, 0.0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while written < 1_000_000_000:
            words = [f"{generator.getrandbits(60):x}" for _ in range(500)]
            line = json.dumps({"text": generator.choice(texts) + " ".join(words)}) + "\n"
            written += process.stdin.write(line)
            if time.monotonic() - looked > 0.2:
                peak, looked = max(peak, memory_mb(process.pid)), time.monotonic()
        process.stdin.close()
        said = process.stdout.read()
    print(f"{written / 1e6:.0f} MB in, peak memory {peak:.0f} MB; {said}")
    assert process.returncode == 0
    assert 50 < peak < LIMIT_MB


def memory_mb(pid: int) -> float:
    """Memory of a process and its children, shared pages counted once."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for process in (pid, *children):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1000
    return total
