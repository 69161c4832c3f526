"""Runs that are stopped, killed or hindered, and what becomes of them."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import run_inputs
import torch

import lapefast as lf
from lapefast.errors import InputError, RunStopped
from lapefast.evaluate import UntilStable
from lapefast.models import bare_model
from lapefast.profiling.signals import Signals
from lapefast.profiling.state import RunDirectory

HERE = Path(__file__).parent
ROWS = 24
TOKENS = (ROWS + ROWS // 3) * 12


@pytest.fixture
def model():
    return run_inputs.model()


def profiled(model, rows=ROWS, corpora=None, **options):
    options = {"batch_size": 2, "save_every": 0, **options}
    given = run_inputs.corpora(rows) if corpora is None else corpora
    return lf.profile(model, given, progress=False, **options)


def script(name, *arguments) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, HERE / name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def assert_equal(profile, expected):
    assert profile.labels == expected.labels
    assert torch.equal(profile.tokens, expected.tokens)
    for name, sites in expected.statistics.items():
        for site, values in sites.items():
            assert torch.equal(profile.statistics[name][site], values), (name, site)


class Broken(Exception):
    """What nobody foresaw."""


class Breaks:
    """Makes an FFN of the model fail at its n-th call, so that others before it have counted."""

    def __init__(self, model, call, error, layer=-1):
        self.calls, self.call, self.error = 0, call, error
        ffn = bare_model(model).layers[layer].mlp
        self.hook = ffn.register_forward_pre_hook(self.before)

    def before(self, module, given):
        self.calls += 1
        if self.calls == self.call:
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.hook.remove()


def test_a_run_killed_at_random_moments_counts_what_an_undisturbed_one_counts(model, tmp_path):
    rows = 240
    run = script("killed_run.py", tmp_path, rows, 1)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert int(out) >= 20
    killed = tmp_path / "profile.safetensors"
    profiled(model, rows, resume=tmp_path / "undisturbed").save(tmp_path / "expected.safetensors")
    # Sums and what is said of the run included.
    assert killed.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_the_same_call_goes_on(model, tmp_path, number):
    run = script("signalled_run.py", tmp_path)
    for _ in range(3):
        assert run.stdout.readline() == "saved\n"
    run.send_signal(number)
    *_, last = run.communicate(timeout=30)[0].splitlines()
    assert run.returncode == 128 + number
    assert last.startswith(f"stopped by {number.name}; ")
    assert last.endswith(f"saved in {tmp_path / 'run'}, and the same command goes on")
    again = script("signalled_run.py", tmp_path)
    out, err = again.communicate()
    assert again.returncode == 0, err
    # The first of those was the start's; two batches and more were not counted again.
    assert out.count("saved") < 40 + 1 - 2 + 1
    assert_equal(lf.Profile.load(tmp_path / "profile.safetensors"), profiled(model, 60))


def test_signals_are_heard_where_that_does_no_harm_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with pytest.raises(RunStopped) as caught, signals.heard():
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.signal == signal.SIGTERM
        with pytest.raises(RunStopped), signals.heard():
            pytest.fail("a signal that came before is heard on entering")
        with pytest.raises(RunStopped, match="stopped at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_signals_are_left_alone(model, tmp_path):
    found = []

    def run():
        profiled(model, resume=tmp_path / "run")
        found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("call", [1, 2, 9])
@pytest.mark.parametrize("layer", [0, -1])
def test_a_batch_that_fails_is_counted_not_at_all_and_the_run_goes_on_after_it(
    model, tmp_path, call, layer
):
    expected = profiled(model)
    # The first call is the proof's.
    with Breaks(model, 1 + call, Broken("broken"), layer), pytest.raises(Broken):
        profiled(model, resume=tmp_path / "run")
    assert_equal(profiled(model, resume=tmp_path / "run"), expected)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_rows_and_counts_every_token_once(model, caplog, error):
    with Breaks(model, 3, error):
        profile = profiled(model, batch_size=8)
    assert profile.metadata["batch_size"] == 8
    assert profile.metadata["rows_at_once"] == 4
    assert "halved to 4" in caplog.text
    halves = profiled(model, batch_size=4)
    assert torch.equal(profile.tokens, halves.tokens)
    # The second batch on was run in halves; the model in float32 counts the same.
    assert_equal_counts(profile, halves)


def assert_equal_counts(profile, expected):
    for site, values in expected.counts.items():
        assert torch.equal(profile.counts[site], values), site


def test_halved_rows_stay_halved_after_a_stop(model, tmp_path):
    with (
        Breaks(model, 3, MemoryError()),
        Breaks(model, 6, KeyboardInterrupt()),
        pytest.raises(KeyboardInterrupt),
    ):
        profiled(model, batch_size=8, resume=tmp_path / "run")
    profile = profiled(model, batch_size=None, resume=tmp_path / "run")
    assert profile.metadata["rows_at_once"] == 4
    assert profile.metadata["batch_size"] == 8
    assert_equal_counts(profile, profiled(model, batch_size=4))


def test_one_row_that_does_not_fit_ends_in_a_saved_state(model, tmp_path):
    class Never(Breaks):
        def before(self, module, given):
            self.calls += 1
            if self.calls > 4:
                raise MemoryError

    with Never(model, 0, None), pytest.raises(InputError) as caught:
        profiled(model, resume=tmp_path / "run")
    assert str(caught.value).startswith("out of memory on one row of 12 tokens")
    assert f"are counted and saved in {tmp_path / 'run'}" in str(caught.value)
    assert_equal_counts(profiled(model, resume=tmp_path / "run"), profiled(model))


def test_a_text_that_cannot_be_read_on_ends_in_a_saved_state(model, tmp_path):
    file = tmp_path / "ids.jsonl"
    rows = run_inputs.corpora(400)["en"].tolist()
    lines = [json.dumps({"input_ids": row}) for row in rows]
    whole = "\n".join(lines)
    # Behind the start of the text, which is looked at before the run.
    file.write_text("\n".join([*lines[:390], "broken", *lines[390:]]))
    options = {"seq_len": 12, "resume": tmp_path / "run", "save_every": 300}
    with pytest.raises(InputError, match="ids.jsonl, line 391: not JSON") as caught:
        profiled(model, corpora={"en": str(file)}, **options)
    # Whole batches of two rows.
    assert (
        f"4,680 tokens are counted and saved in {tmp_path / 'run'}, and the same command goes on "
        "once it is mended" in str(caught.value)
    )
    file.write_text(whole)
    profile = profiled(model, corpora={"en": str(file)}, **options)
    assert_equal(profile, profiled(model, corpora={"en": torch.tensor(rows)}))


def test_a_full_disk_leaves_the_state_saved_before(model, tmp_path, monkeypatch):
    replace, saves = os.replace, []

    def full(*given):
        saves.append(given)
        if len(saves) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*given)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*: no space left on device") as caught:
        profiled(model, resume=tmp_path / "run")
    monkeypatch.undo()
    assert f"what was counted before stands in {tmp_path / 'run'}" in str(caught.value)
    assert sorted(one.name for one in (tmp_path / "run").iterdir()) == [
        "lock",
        "state-0.safetensors",
        "state-1.safetensors",
    ]
    assert_equal(profiled(model, resume=tmp_path / "run"), profiled(model))


def test_a_full_disk_at_the_first_state_promises_none(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="cannot write .*: no space left on device") as caught:
        profiled(model, resume=tmp_path / "run")
    assert "before" not in str(caught.value)
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize("harm", [lambda data: data[:-9], lambda data: b"", bytearray.__len__])
def test_a_damaged_state_falls_back_to_the_one_before_and_two_are_lost(
    model, tmp_path, caplog, harm
):
    run = tmp_path / "run"
    with Breaks(model, 12, Broken()), pytest.raises(Broken):
        profiled(model, resume=run)
    slots = sorted(run.glob("state-?.safetensors"), key=lambda one: one.stat().st_mtime_ns)
    assert len(slots) == 2

    def damage(path):
        data = bytearray(path.read_bytes())
        if harm is bytearray.__len__:
            data[len(data) // 2] ^= 4
        else:
            data = harm(data)
        path.write_bytes(data)

    damage(slots[1])
    profile = profiled(model, resume=run)
    assert "The state saved before it is used instead" in caplog.text
    assert_equal(profile, profiled(model))
    for slot in slots:
        damage(slot)
    with pytest.raises(InputError, match="is lost, so start anew in another directory"):
        profiled(model, resume=run)


def test_what_a_killed_writer_left_is_taken_away(tmp_path):
    (tmp_path / ".state-0.safetensors.abc.tmp").write_bytes(b"half")
    with RunDirectory(tmp_path):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["lock"]


def test_one_run_at_a_time_uses_a_directory(model, tmp_path):
    with RunDirectory(tmp_path), pytest.raises(InputError, match="another run that is still going"):
        profiled(model, resume=tmp_path)
    profiled(model, resume=tmp_path)


def test_a_file_system_without_locks_is_refused(model, tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(InputError, match=r"cannot lock files \(No locks available\)"):
        profiled(model, resume=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.5}, "threshold: 0.0 there, 0.5 here"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 here"),
        ({"max_tokens": 48}, "max_tokens: None there, 48 here"),
        ({"statistics": ("counts",)}, "statistics: counts, sums there, counts here"),
        ({"corpora": {"en": run_inputs.corpora(ROWS)["en"]}}, "labels: en, zh there, en here"),
        (
            {"corpora": dict(zip(("en", "zh"), run_inputs.corpora(9).values(), strict=True))},
            "text of 'en': [0-9a-f]{12} there, [0-9a-f]{12} here; text of 'zh': [0-9a-f]{12} there",
        ),
        ({"exact": False}, "exact: True there, False here"),
        ({"special_tokens": False}, "special_tokens: True there, False here"),
    ],
)
def test_other_arguments_are_refused_and_named(model, tmp_path, change, message):
    with Breaks(model, 7, Broken()), pytest.raises(Broken):
        profiled(model, resume=tmp_path / "run")
    with pytest.raises(InputError, match=message) as caught:
        profiled(model, **{"resume": tmp_path / "run", **change})
    assert str(caught.value).count(" there") == message.count(" there")
    assert_equal(profiled(model, resume=tmp_path / "run"), profiled(model))


def test_another_question_is_refused_and_named(model, tmp_path):
    options = {"statistics": ("counts", "shard_counts"), "resume": tmp_path / "run"}
    with Breaks(model, 7, Broken()), pytest.raises(Broken):
        profiled(model, until=UntilStable(0.99), **options)
    more = UntilStable(0.99, functools.partial(lf.detect.lape, top_rate=0.3))
    for until, here in ((more, "overlap=0.99, select=lape, top_rate=0.3"), (None, "None")):
        with pytest.raises(
            InputError, match=f"until: overlap=0.99, select=lape there, {here} here"
        ):
            profiled(model, until=until, **options)


def test_what_is_wrong_with_a_limit_is_said_before_anything_is_saved(model, tmp_path):
    with pytest.raises(InputError, match="max_tokens=10 is less than one row of 12"):
        profiled(model, max_tokens=10, resume=tmp_path / "run")
    profiled(model, max_tokens=24, resume=tmp_path / "run")


@pytest.mark.parametrize("change", ["dtype", "edits"])
def test_another_arithmetic_is_refused(model, tmp_path, change):
    with Breaks(model, 7, Broken()), pytest.raises(Broken):
        profiled(model, resume=tmp_path / "run")
    if change == "dtype":
        with pytest.raises(InputError, match="dtype: float32 there, bfloat16 here"):
            profiled(model.bfloat16(), resume=tmp_path / "run")
    else:
        edit = lf.deactivate({"layers.0.mlp": [1]})
        with (
            lf.steer(model, edit),
            pytest.raises(InputError, match="edited: False there, True here"),
        ):
            profiled(model, resume=tmp_path / "run")


def test_files_that_changed_are_recorded_and_said(model, tmp_path, caplog):
    file = tmp_path / "ids.jsonl"
    rows = run_inputs.corpora(ROWS)["en"].tolist()
    file.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    options = {"corpora": {"en": str(file)}, "seq_len": 12, "resume": tmp_path / "run"}
    with Breaks(model, 7, Broken()), pytest.raises(Broken):
        profiled(model, **options)
    os.utime(file, ns=(1, 1))
    profile = profiled(model, **options)
    assert "files of 'en': " in caplog.text
    assert list(profile.metadata["changes"][0]) == ["rows", "files of 'en'"]


def test_the_state_is_saved_before_the_first_batch(model, tmp_path):
    with Breaks(model, 2, Broken()), pytest.raises(Broken):
        profiled(model, resume=tmp_path / "run", save_every=300)
    with RunDirectory(tmp_path / "run") as directory:
        about, tensors = directory.load()
    assert about["rows"] == {}
    assert not any(bool(tensor.any()) for tensor in tensors.values())
    assert_equal(profiled(model, resume=tmp_path / "run"), profiled(model))


def test_numbers_of_other_libraries_are_numbers(model, tmp_path):
    options = {"max_tokens": np.int64(120), "batch_size": np.int64(2), "threshold": np.float32(0)}
    profile = profiled(model, resume=tmp_path / "run", **options)
    assert_equal(profile, profiled(model, max_tokens=120))


def test_another_model_is_refused(model, tmp_path):
    profiled(model, resume=tmp_path / "run")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 1
    with pytest.raises(InputError, match="model: [0-9a-f]{12} there, [0-9a-f]{12} here"):
        profiled(model, resume=tmp_path / "run")


def test_another_number_of_threads_is_recorded_and_said(model, tmp_path, caplog):
    with Breaks(model, 7, Broken()), pytest.raises(Broken):
        profiled(model, resume=tmp_path / "run")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        profile = profiled(model, resume=tmp_path / "run")
    finally:
        torch.set_num_threads(before)
    assert f"threads: {before} before the stop and {before + 1} now" in caplog.text
    assert profile.metadata["changes"] == [{"rows": {"en": 10}, "threads": [before, before + 1]}]


def test_a_run_that_has_ended_gives_its_profile_again_without_running(model, tmp_path):
    expected = profiled(model, resume=tmp_path / "run")
    with Breaks(model, 2, AssertionError("only the proof runs")):
        again = profiled(model, resume=tmp_path / "run")
    assert_equal(again, expected)
    assert again.metadata == expected.metadata


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 96])
def test_wherever_a_run_stops_it_says_of_its_text_what_an_undisturbed_one_says(
    model, tmp_path, max_tokens, cached
):
    file = tmp_path / "ids.jsonl"
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 30, (12,), generator=generator).tolist()
    documents = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]
    file.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in documents))
    options = {
        "corpora": {"en": str(file), "zh": run_inputs.corpora(9)["zh"]},
        "seq_len": 12,
        "max_tokens": max_tokens,
        "token_cache": tmp_path / "tokens" if cached else None,
    }
    expected = profiled(model, **options)
    batches = [-(-entry["rows"][1] // 2) for entry in expected.metadata["corpora"]]
    for number in range(sum(batches)):
        run = tmp_path / f"run-{number}"
        with Breaks(model, 2 + number, Broken()), pytest.raises(Broken):
            profiled(model, resume=run, **options)
        profile = profiled(model, resume=run, **options)
        assert_equal(profile, expected)
        assert profile.metadata == expected.metadata


def test_an_iterator_is_given_anew_and_read_past_what_is_counted(model, tmp_path):
    rows = {label: of.tolist() for label, of in run_inputs.corpora(ROWS).items()}

    def once():
        return {label: iter(of) for label, of in rows.items()}

    options = {"seq_len": 12, "resume": tmp_path / "run"}
    with Breaks(model, 9, Broken()), pytest.raises(Broken):
        profiled(model, corpora=once(), **options)
    assert_equal(profiled(model, corpora=once(), **options), profiled(model))
