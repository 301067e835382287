"""Plan several trainings in one process: `plan_many.py RUNS.json`; prints the plans as JSON."""

import dataclasses
import json
import os
import sys
from pathlib import Path

from megatron_meap.backend import device

device.prepare_to_look()

from megatron_meap.backend import megatron_patches  # noqa: E402
from megatron_meap.errors import UsageError  # noqa: E402
from megatron_meap.planning import layouts, text  # noqa: E402
from megatron_meap.trainer import arguments  # noqa: E402


def main() -> None:
    megatron_patches.apply()
    plans = {}
    for name, (world, flags) in json.loads(Path(sys.argv[1]).read_text()).items():
        os.environ |= {"RANK": "0", "WORLD_SIZE": str(world)}
        sys.argv = ["plan", *flags]
        try:
            plan = layouts.plan(arguments.parse_flags())
        except UsageError as error:
            plans[name] = {"error": str(error)}
            continue
        plans[name] = dataclasses.asdict(plan.memory) | {
            "work": dataclasses.asdict(plan.work),
            "totals": [stage.total for stage in plan.memory.stages],
            "warnings": text.warnings(plan, 2**20, 8),
        }
    print("\nplans: " + json.dumps(plans))


if __name__ == "__main__":
    main()
