"""One of the processes that share a model's layers; saves what it saw for the tests to compare.

Run by torchrun: split_worker.py MODELS OUTPUT, where MODELS holds saved models and `cases.json`,
case -> [directory, dtype, plan or null].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from families import IDS
from same_run import profile_and_gates
from torch import distributed

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models.parallel import least, parallel_size
from lapefast.models.taps import watching_products

BATCH = 20
GENERATION = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def load(path: Path, dtype: str, plan: dict[str, str] | None):
    """As `lapefast profile --tensor-parallel` loads it, but for a plan of one's own."""
    from lapefast.engines.transformers import Checkpoint, load_model

    if plan is None:
        return load_model(Checkpoint(str(path)), dtype, tensor_parallel=True)
    config = transformers.distributed.DistributedConfig(tp_plan=plan)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), distributed_config=config
    ).eval()


def edit_of(site, width):
    """An edit of neurons at the ends of what two processes compute."""
    return lf.activate({site: [0, width // 2 - 1, width // 2, width - 1]}, 500.0)


@torch.no_grad()
def spoil(model):
    """Make one neuron of the last FFN NaN, in one of the processes alone."""
    if distributed.get_rank() == 1:
        owner = models.bare_model(model).get_submodule(models.find_sites(model)[-1].name)
        first = next(iter(owner.children()))
        getattr(first.weight, "to_local", lambda: first.weight)()[0] = torch.nan


def refused(run) -> str:
    try:
        run()
    except InputError as error:
        return str(error)
    return ""


def stopped_and_gone_on(model, corpora, state):
    """The profile of a run that broke in a forward pass, in all processes alike, and went on."""
    options = {"batch_size": BATCH, "progress": False, "resume": state, "save_every": 0}
    calls = []

    def stop(module, given):
        calls.append(module)
        if len(calls) == 4:
            raise ValueError("stopped")

    hook = models.bare_model(model).layers[-1].register_forward_pre_hook(stop)
    try:
        lf.profile(model, corpora, **options)
    except ValueError:
        hook.remove()
    return lf.profile(model, corpora, **options)


def look(found, path, dtype, plan, corpora, state):
    model = load(path, dtype, plan)
    counted, gate = profile_and_gates(model, corpora, BATCH)
    found["profile"], found["gate"] = counted, gate
    found["gone on"] = stopped_and_gone_on(model, corpora, state)
    found["sizes"] = parallel_size(model), parallel_size(model.model)
    found["least"] = least(model, 3 + distributed.get_rank())
    site, width = counted.sites[0], counted.site_info[0].width
    edit = edit_of(site, width)
    with torch.no_grad(), lf.record(model, ["a", "b"]) as recorder:
        recorder.set(label="b")
        found["recorded"] = model(IDS).logits
        found["drained"] = recorder.drain()
        found["after"] = recorder.drain()
    with torch.no_grad(), lf.steer(model, edit):
        found["steered"] = model(IDS).logits
    with torch.no_grad(), lf.steer(model, [None, lf.deactivate({site: list(range(width))}), edit]):
        found["listed"] = model(IDS).logits
        found["generated"] = model.generate(IDS, **GENERATION)
    with lf.steer(model, edit):
        found["edited"] = lf.profile(
            model, {"en": corpora["en"][:2]}, batch_size=BATCH, progress=False
        ).counts[site]
    found["refused"] = [
        refused(lambda: lf.fold(model, edit)),
        refused(lambda: models.find_linears(model)),
        refused(lambda: watching_products(model, None).__enter__()),
        refused(lambda: lf.steer(model, lf.deactivate({"layers.0.self_attn.o_proj": [0]}))),
    ]
    world = distributed.group.WORLD
    found["text too"] = refused(lambda: lf.profile(model, corpora, process_group=world))
    if gate[site][0].shape[1] < width:  # else both processes would have to be spoilt
        spoil(model)
        found["not finite"] = refused(lambda: lf.profile(model, corpora, progress=False))


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    directory, output = map(Path, sys.argv[1:])
    corpora = torch.load(directory / "corpora.pt")
    results = {}
    for case, given in json.loads((directory / "cases.json").read_text()).items():
        found = results[case] = {}
        try:
            look(found, directory / given[0], *given[1:], corpora, output / f"state of {case}")
        except InputError as error:
            found["error"] = str(error)
    torch.save(results, output / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
