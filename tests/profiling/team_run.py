"""What processes that share a pass must do, each as a function; run by torchrun.

    torchrun --nproc-per-node N team_run.py DIRECTORY

Every process raises where something is not as it must be.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import run_inputs
import torch
import torch.distributed as dist
from test_enough import Enough
from test_survival import Breaks, Broken, profiled

import lapefast as lf
from lapefast.errors import InputError, RunFailed, RunStopped

ROWS = 23


def expect(kind: type[BaseException], text: str, call) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()


def same_counts(profile: lf.Profile, expected: lf.Profile) -> None:
    assert profile.labels == expected.labels
    assert torch.equal(profile.tokens, expected.tokens)
    for site, values in expected.counts.items():
        assert torch.equal(profile.counts[site], values), site
        torch.testing.assert_close(profile.sums[site], expected.sums[site], rtol=1e-12, atol=1e-12)


def counts_are_those_of_one_process(directory: Path, group) -> None:
    for batch_size in (1, 2, 5, 64):
        alone = profiled(run_inputs.model(), ROWS, batch_size=batch_size)
        shared = profiled(
            run_inputs.model(), ROWS, batch_size=batch_size, process_group=group, save_every=300
        )
        same_counts(shared, alone)
        assert shared.metadata["processes"] == dist.get_world_size()
        differing = {name for name, of in alone.metadata.items() if shared.metadata[name] != of}
        assert differing == {"processes"}


def a_run_goes_on_with_another_number_of_processes(directory: Path, group) -> None:
    alone = profiled(run_inputs.model(), ROWS)
    run = directory / "other-number"
    model = run_inputs.model()
    with Breaks(model, 4, Broken("broken")):
        expect(Broken, "broken", lambda: profiled(model, ROWS, resume=run, process_group=group))
    if dist.get_rank() == 0:  # one process alone goes on for a while
        with Breaks(model, 3, Broken("broken")):
            expect(Broken, "broken", lambda: profiled(model, ROWS, resume=run))
    dist.barrier()
    same_counts(profiled(model, ROWS, resume=run, process_group=group), alone)
    again = profiled(model, ROWS, resume=run, process_group=group)
    same_counts(again, alone)


def a_problem_of_one_ends_all_in_a_saved_state(directory: Path, group) -> None:
    run = directory / "one-fails"
    model = run_inputs.model()
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        with Breaks(model, 4, Broken("broken")):
            expect(Broken, "broken", lambda: profiled(model, ROWS, resume=run, process_group=group))
    else:
        expect(
            RunFailed,
            f"another process of this run has failed, and says why; {12 * 2 * 2 * (last + 1)} "
            "tokens are counted and saved",
            lambda: profiled(model, ROWS, resume=run, process_group=group),
        )
    same_counts(
        profiled(model, ROWS, resume=run, process_group=group), profiled(run_inputs.model(), ROWS)
    )


def a_signal_that_one_hears_stops_all(directory: Path, group) -> None:
    run = directory / "one-stops"
    model = run_inputs.model()
    last = dist.get_world_size() - 1
    heard = RunStopped(signal.SIGTERM) if dist.get_rank() == last else None
    with Breaks(model, 4, heard) if heard else nullcontext():
        expect(
            RunStopped,
            f"stopped by SIGTERM; {12 * 2 * 2 * (last + 1)} tokens are counted and saved",
            lambda: profiled(model, ROWS, resume=run, process_group=group),
        )
    same_counts(
        profiled(model, ROWS, resume=run, process_group=group), profiled(run_inputs.model(), ROWS)
    )


def one_that_runs_out_of_memory_halves_its_rows(directory: Path, group) -> None:
    model = run_inputs.model()
    if dist.get_rank() == 0:
        with Breaks(model, 3, MemoryError()):
            profile = profiled(model, ROWS, batch_size=4, process_group=group)
    else:
        profile = profiled(model, ROWS, batch_size=4, process_group=group)
    assert profile.metadata["rows_at_once"] == 2
    alone = profiled(run_inputs.model(), ROWS, batch_size=2)
    for site, values in alone.counts.items():
        assert torch.equal(profile.counts[site], values), site


def what_the_first_refuses_all_refuse(directory: Path, group) -> None:
    model = run_inputs.model()
    call = lambda: profiled(model, resume="/nowhere/at/all", process_group=group)  # noqa: E731
    expect(InputError, "give a directory", call)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    expect(InputError, "not finite", lambda: profiled(model, process_group=group))


def the_first_fills_the_token_cache_for_all(directory: Path, group) -> None:
    tokens = directory / "tokens"
    text = directory / "ids.jsonl"
    rows = run_inputs.corpora(ROWS)["en"]
    if dist.get_rank() == 0:
        text.write_text("\n".join(f'{{"input_ids": {row}}}' for row in rows.tolist()))
    dist.barrier()
    options = {"corpora": {"en": str(text)}, "seq_len": 12, "token_cache": tokens}
    shared = profiled(run_inputs.model(), process_group=group, **options)
    assert sorted(one.suffix for one in tokens.iterdir()) == [".ids", ".json", ".npy"]
    same_counts(shared, profiled(run_inputs.model(), corpora={"en": rows}))
    dist.barrier()


def it_is_asked_at_the_same_places_however_many_they_are(directory: Path, group) -> None:
    for tokens in (24 * 2, 24 * 8):
        alone = profiled(run_inputs.model(), ROWS, until=Enough(tokens))
        shared = profiled(run_inputs.model(), ROWS, until=Enough(tokens), process_group=group)
        same_counts(shared, alone)
        assert shared.metadata["asked"] == alone.metadata["asked"]


def a_signal_while_it_is_asked_ends_all_with_what_is_saved(directory: Path, group) -> None:
    def signalled(profile) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    signalled.settings = Enough.settings
    run, model = directory / "asked", run_inputs.model()
    call = lambda until: profiled(  # noqa: E731
        model, ROWS, resume=run, process_group=group, until=until
    )
    expect(RunStopped, "stopped by SIGTERM; 48 tokens are counted", lambda: call(signalled))
    same_counts(call(Enough(24)), profiled(run_inputs.model(), ROWS, until=Enough(24)))


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group()
    for check in (
        counts_are_those_of_one_process,
        a_run_goes_on_with_another_number_of_processes,
        a_problem_of_one_ends_all_in_a_saved_state,
        a_signal_that_one_hears_stops_all,
        one_that_runs_out_of_memory_halves_its_rows,
        what_the_first_refuses_all_refuse,
        the_first_fills_the_token_cache_for_all,
        it_is_asked_at_the_same_places_however_many_they_are,
        a_signal_while_it_is_asked_ends_all_with_what_is_saved,
    ):
        check(directory, dist.group.WORLD)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
