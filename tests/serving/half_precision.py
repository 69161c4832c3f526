"""How close served bfloat16 is to transformers' bfloat16, with edits and without.

    python tests/serving/half_precision.py

Prints, per edit, mean and greatest absolute difference between log-probabilities of the tokens of 8
prompts of 60: of vLLM and transformers, both in bfloat16, and of transformers in bfloat16 and
float32, which is what the dtype itself costs.
"""

from __future__ import annotations

import copy
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import tiny
import torch


def differences(made: tiny.Tiny) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Edit's name -> differences [prompts, 59]: vLLM's from bfloat16, float32 from bfloat16."""
    from engines import asking, engine

    texts = tiny.prompts(8, 60, seed=12)
    rounded = copy.deepcopy(made.model).bfloat16()
    found = {}
    with engine(made.path, dtype="bfloat16") as llm:
        for name in tiny.NAMES:
            outputs = llm.generate(
                [{"prompt_token_ids": text} for text in texts],
                asking(name, 1, prompt_logprobs=0),
                use_tqdm=False,
            )
            served = torch.tensor(
                [
                    [position[token].logprob for position, token in zip(*pair, strict=True)]
                    for pair in (
                        (output.prompt_logprobs[1:], output.prompt_token_ids[1:])
                        for output in outputs
                    )
                ]
            )
            edit = made.edits.get(name)
            half, single = (_scores(model, texts, edit) for model in (rounded, made.model))
            found[str(name)] = (served - half).abs(), (single - half).abs()
    return found


@torch.no_grad()
def _scores(model, texts, edit):
    with ExitStack() as stack:
        tiny.place(stack, model, edit)
        ids = torch.tensor(texts)
        scores = model(ids).logits.float().log_softmax(-1)
    return scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def main() -> None:
    import conftest  # noqa: F401  vLLM's environment

    with tempfile.TemporaryDirectory() as directory:
        made = tiny.llama(Path(directory))
        os.environ["LAPEFAST_EDITS"] = str(made.edit_file)
        found = differences(made)
    print(f"{'edit':12} {'vLLM, mean':>12} {'greatest':>9} {'float32, mean':>14} {'greatest':>9}")
    for name, (served, single) in found.items():
        print(
            f"{name:12} {served.mean():12.4f} {served.max():9.4f} "
            f"{single.mean():14.4f} {single.max():9.4f}"
        )


if __name__ == "__main__":
    main()
