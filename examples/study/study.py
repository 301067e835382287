"""Run the study and write its page.

python examples/study/study.py list                        the runs, and which are done
python examples/study/study.py run --texts FOLDER          run what is not done yet; after Ctrl-C, it resumes
python examples/study/study.py run ... --gpus 8            one run per GPU at a time; --jobs N: N at a time on CPU
python examples/study/study.py run ... --member 3/20       the third of twenty parts, as in a Slurm array
python examples/study/study.py page                        results/*.jsonl and the page, from what is done
"""

from megatron_meap.errors import run
from megatron_meap.study.command import main

if __name__ == "__main__":
    run(main)
