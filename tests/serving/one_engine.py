"""One engine in a process of its own: `python one_engine.py TASK`, with a task as JSON.

A task: `model`, `options` of the engine, `asks` [[prompt, name], ...], and
`load_compiled`: let this vLLM load what it compiled before. It saves that, but on a CPU it fails to
load it, for want of a method on the loaded function, and compiles anew.
`one_compile_cache`: leave out what keeps code compiled with edits apart.
Prints a line of the answers, as JSON after `ANSWERS`.
"""

from __future__ import annotations

import json
import sys

import torch
from engines import answers, engine


def main() -> None:
    task = json.loads(sys.argv[1])
    if task.get("load_compiled"):
        load = torch.compiler.load_compiled_function

        def load_and_say(*args, **kwargs):
            loaded = load(*args, **kwargs)
            loaded._artifacts.compiled_fn.finalize_loading = lambda config: None
            print("compiled code was loaded", flush=True)
            return loaded

        torch.compiler.load_compiled_function = load_and_say
    if task.get("one_compile_cache"):
        from lapefast.engines.vllm import runner

        runner._separate_compile_cache = lambda *args: None
    with engine(task["model"], **task["options"]) as llm:
        got = answers(llm, [tuple(ask) for ask in task["asks"]])
    print("\nANSWERS", json.dumps(got), flush=True)


if __name__ == "__main__":
    main()
