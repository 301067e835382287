"""What examples/slurm/job.sh does apart from Slurm, tested without Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

JOB = """
trap - USR1 TERM
. examples/slurm/job.sh
HANG_MINUTES=$1
touch -d "$2" "$MEAP_HEARTBEAT"
scancel() { echo "scancel $*"; }
run_step sleep 2
"""


@pytest.mark.parametrize(
    ("minutes", "beat", "hangs"), [("0.01", "-2 minutes", True), ("3", "-2 minutes", False), ("", "-2 days", False)]
)
def test_a_run_without_a_sign_of_life_is_ended(tmp_path: Path, minutes: str, beat: str, hangs: bool) -> None:
    environment = {
        **os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "CHECKOUT": str(REPOSITORY),
        "LOGS": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", JOB, "_", minutes, beat], cwd=REPOSITORY, env=environment, text=True, capture_output=True
    )
    assert ("no sign of life for HANG_MINUTES=0.01 minutes" in done.stdout) is hangs
    assert ("scancel --signal=TERM 7" in done.stdout) is hangs  # then it is killed
    assert ("job 7: done" in done.stdout) is not hangs
    assert done.returncode == (2 if hangs else 0)
    assert ("job 7 failed with status 143" in done.stderr) is hangs
