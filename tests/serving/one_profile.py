"""One pass of vLLM in processes of their own: `python one_profile.py TASK`, with a task as JSON.

A task: `model`, `corpora` label -> file, `options` of the pass, `output`: the profile's file. The
workers are those of `eager_counts.py`.
"""

from __future__ import annotations

import json
import sys

from lapefast.engines.vllm import engine
from lapefast.profiling.vllm import profile


def main() -> None:
    task = json.loads(sys.argv[1])
    engine._FIXED["worker_cls"] = "eager_counts.Worker"
    profile(task["model"], task["corpora"], progress=False, **task["options"]).save(task["output"])


if __name__ == "__main__":
    main()
