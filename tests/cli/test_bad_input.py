"""Bad input: one sentence, exit status 2, and nothing half-written."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

import lapefast as lf


def refused(result, *said: str) -> None:
    """One sentence stands on standard error, after the bars of what was still done."""
    assert result.code == 2
    *bars, message = result.err.splitlines()
    assert message.startswith("error: ")
    assert all("%|" in bar or "tok/s]" in bar or not bar for bar in bars)
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ("en=missing.txt", "missing.txt"),
        ("en=empty.txt", "empty"),
        ("en=short.txt", "32"),
        ("en=binary.txt", "binary.txt"),
        ("missing.txt", "label=source"),
        ("en=", "no source"),
    ],
)
def test_a_corpus_that_cannot_be_used(lapefast, made, tmp_path, monkeypatch, corpus, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("word\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    output = tmp_path / "p.safetensors"
    result = lapefast("profile", made.directory, "--corpus", corpus, "--seq-len", 32, "-o", output)
    refused(result, said)
    assert not output.exists()


def test_a_label_given_twice(lapefast, made, tmp_path):
    corpus = f"en={made.train['en']}"
    result = lapefast(
        *("profile", made.directory, "--corpus", corpus, "--corpus", corpus),
        *("-o", tmp_path / "p.safetensors"),
    )
    refused(result, "twice")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seq-len", 4096], "limit"),
        (["--statistics", "counts,means"], "means"),
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "meta"),
        (["--device", "cpu", "--device-map", "auto"], "not both"),
    ],
)
def test_an_option_that_cannot_be_met(lapefast, made, tmp_path, options, said):
    corpus = f"en={made.train['en']}"
    output = tmp_path / "p.safetensors"
    result = lapefast("profile", made.directory, "--corpus", corpus, *options, "-o", output)
    refused(result, said)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tensor-parallel-size", "2"), "--tensor-parallel-size is an option of another engine"),
        (("--engine", "vllm", "--device", "cpu"), "--device is an option of another engine"),
        (("--engine", "vllm", "--threads", "1"), "--threads is an option of another engine"),
        (("--engine", "vllm", "--backend", "cpu"), "--backend is an option of another engine"),
        (("--engine", "vllm", "--no-exact"), "--no-exact is an option of another engine"),
        (("--engine", "vllm", "--save-every", "9"), "--save-every is an option of another engine"),
        (("--save-every", "9"), "--save-every says how often --resume saves; give --resume DIR"),
        (("--engine", "vllm", "--statistics", "count"), "statistics must be some of"),
        (("--engine", "vllm", "--seq-len", "65"), "over the model's limit of 64"),
        (("--engine", "vllm"), "vLLM is not installed in this environment"),
    ],
)
def test_an_engines_options(lapefast, made, tmp_path, monkeypatch, options, said):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "vllm" else find(n))
    output = tmp_path / "p.safetensors"
    corpus = f"en={made.train['en']}"
    result = lapefast("profile", made.directory, "--corpus", corpus, "-o", output, *options)
    refused(result, said)
    assert not output.exists()


def test_vllm_in_processes_of_torchruns(lapefast, made, tmp_path, monkeypatch):
    profile = importlib.import_module("lapefast.cli.profile")
    monkeypatch.setattr(profile, "process_group", lambda: nullcontext("two processes"))
    output = tmp_path / "p.safetensors"
    corpus = f"en={made.train['en']}"
    options = ("--engine", "vllm", "-o", output)
    result = lapefast("profile", made.directory, "--corpus", corpus, *options)
    refused(result, "vLLM starts its own processes: run the command without torchrun")
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "library"),
    [(("--quantization", "4bit"), "bitsandbytes"), (("--device-map", "auto"), "accelerate")],
)
def test_an_option_without_its_library(lapefast, made, tmp_path, monkeypatch, options, library):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = lapefast(
        *("profile", made.directory, "--corpus", f"en={made.train['en']}"),
        *(*options, "-o", tmp_path / "p.safetensors"),
    )
    refused(result, f"pip install {library}")


@pytest.mark.parametrize("kind", ["missing", "file", "directory", "broken"])
def test_a_model_that_is_none(lapefast, made, tmp_path, kind):
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("x")
    elif kind != "missing":
        path.mkdir()
    if kind == "broken":
        (path / "config.json").write_text('{"model_type": "llama"}')
    corpus = f"en={made.train['en']}"
    result = lapefast("profile", path, "--corpus", corpus, "-o", tmp_path / "p.safetensors")
    refused(result, "model")


# Nobody, root included, makes a file in /proc.
@pytest.mark.parametrize("target", ["nowhere/p.safetensors", ".", "-", "/proc/p.safetensors"])
def test_an_output_that_cannot_be_written_is_refused_before_work(
    lapefast, made, tmp_path, monkeypatch, target
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lapefast.engines.transformers.load_model", None)
    result = lapefast("profile", made.directory, "--corpus", f"en={made.train['en']}", "-o", target)
    refused(result, "cannot write")


def test_one_label_only(lapefast, made, tmp_path):
    path = tmp_path / "p.safetensors"
    corpus = f"en={made.train['en']}"
    options = ["--max-tokens", 512, "--threads", 1]
    assert lapefast("profile", made.directory, "--corpus", corpus, *options, "-o", path).code == 0
    refused(lapefast("identify", path, "-o", tmp_path / "n.json"), "two")
    refused(lapefast("merge", path, "-o", tmp_path / "m.safetensors"), "two")
    refused(lapefast("merge", path, path, "-o", tmp_path / "m.safetensors"), "en")
    path.write_bytes(path.read_bytes()[:-100])
    refused(lapefast("info", path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.safetensors"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"not a profile", "not one of lapefast's files"),
        (b'{"format": "lapefast perplexity matrix", "version": 9}', "version 9"),
        (b'{"some": "json"}', "not a neuron file"),
        (b"PK\x03\x04 and no more", "torch-saved"),
        (b"12345678{ and no more", "not a profile"),
    ],
)
def test_a_file_that_is_nothing_of_lapefasts(lapefast, tmp_path, content, said):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    refused(lapefast("info", path), "notes.txt", said)


def test_a_file_that_is_missing(lapefast, tmp_path):
    for command in (["info"], ["identify", "-o", tmp_path / "n.json"]):
        result = lapefast(*command, tmp_path / "absent")
        refused(result, "absent: no such file")
        assert result.err.count("absent") == 1


class RunsCode:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_file_that_would_run_code(lapefast, made, tmp_path, zipped):
    path = tmp_path / "x.neuron.pth"
    torch.save(RunsCode(tmp_path / "made"), path, _use_new_zipfile_serialization=zipped)
    refused(lapefast("info", path), "tensors, lists, dicts and numbers alone")
    corpus = f"en={made.valid['en']}"
    output = ["-o", tmp_path / "m.json"]
    result = lapefast("evaluate", made.directory, "--neurons", path, "--corpus", corpus, *output)
    refused(result, "tensors, lists, dicts and numbers alone")
    assert [file.name for file in tmp_path.iterdir()] == ["x.neuron.pth"]


@pytest.mark.parametrize(
    ("layers", "index", "said"),
    [(3, 0, "lie in 3 sites, but the model has 2"), (2, 64, "below its width 64, got 64")],
)
def test_neurons_that_do_not_fit_the_model(lapefast, made, tmp_path, layers, index, said):
    path, output = tmp_path / "x.neuron.pth", tmp_path / "m.json"
    torch.save([[torch.tensor([index])] * layers] * 2, path)
    result = lapefast(
        *("evaluate", made.directory, "--neurons", path, "--seq-len", 32, "-o", output),
        *("--labels", "en,zh", "--corpus", f"en={made.valid['en']}"),
    )
    refused(result, said)
    assert not output.exists()


def test_token_ids_outside_the_vocabulary(lapefast, made, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(400))
    output = tmp_path / "p.safetensors"
    corpus = f"en={tmp_path / 'ids.npy'}"
    result = lapefast("profile", made.directory, "--corpus", corpus, "--seq-len", 32, "-o", output)
    refused(result, "token id 300 (token 300) is outside the vocabulary of 300")
    assert not output.exists()


def saved(made, model, directory):
    """A model's directory, with a tokenizer."""
    model.save_pretrained(directory)
    made.tokenizer.save_pretrained(directory)
    return directory


def test_a_model_without_ffns(lapefast, made, tmp_path):
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    model = saved(made, transformers.MambaForCausalLM(config), tmp_path / "mamba")
    output = tmp_path / "p.safetensors"
    options = ["--corpus", f"en={made.train['en']}", "--seq-len", 32, "-o", output]
    refused(lapefast("profile", model, *options), "MambaForCausalLM has no feed-forward block")
    assert not output.exists()


@pytest.mark.parametrize("command", ["profile", "evaluate"])
def test_activations_that_are_not_finite_are_named_by_site(lapefast, made, tmp_path, command):
    model = transformers.LlamaForCausalLM.from_pretrained(made.directory)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[5] = float("nan")
    path, output = tmp_path / "x.neuron.pth", tmp_path / "output"
    torch.save([[torch.tensor([0])] * 2] * 2, path)
    neurons = ["--neurons", path, "--labels", "en,zh"] if command == "evaluate" else []
    result = lapefast(
        *(command, saved(made, model, tmp_path / "model"), *neurons, "-o", output),
        *("--corpus", f"en={made.valid['en']}", "--seq-len", 32, "--max-tokens", 256),
    )
    refused(result, "layers.1.mlp: ", "not finite")
    assert not output.exists()


def test_profiles_that_cannot_be_merged(lapefast, made, tmp_path):
    config = transformers.LlamaConfig(
        **{**made.model.config.to_dict(), "num_hidden_layers": 1, "architectures": None}
    )
    other = saved(made, transformers.LlamaForCausalLM(config), tmp_path / "other")
    text = ["--seq-len", 32, "--max-tokens", 256, "--threads", 1]
    for model, label in ((made.directory, "en"), (other, "zh")):
        corpus = f"{label}={made.train[label]}"
        result = lapefast("profile", model, "--corpus", corpus, *text, "-o", tmp_path / label)
        assert result.code == 0
    with safetensors.safe_open(tmp_path / "en", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = {**file.metadata(), "version": "2"}
    safetensors.torch.save_file(tensors, tmp_path / "later", metadata)
    (tmp_path / "cut").write_bytes((tmp_path / "zh").read_bytes()[:-1])
    for part, said in [
        ("zh", "models that differ"),
        ("en", "counted twice for label 'en'"),
        ("later", "format version 2"),
        ("cut", "cut short"),
    ]:
        result = lapefast("merge", tmp_path / "en", tmp_path / part, "-o", tmp_path / "merged")
        refused(result, said)
    assert not (tmp_path / "merged").exists()


def test_a_full_disk(lapefast, made, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = lapefast(
        *("profile", made.directory, "--corpus", f"en={made.train['en']}"),
        *("--seq-len", 32, "--max-tokens", 256, "-o", tmp_path / "p.safetensors"),
    )
    refused(result, "no space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_level_of_messages_that_there_is_not(lapefast, monkeypatch):
    monkeypatch.setenv("LAPEFAST_LOG", "loud")
    refused(lapefast("doctor"), "LAPEFAST_LOG must be one of DEBUG, INFO, WARNING, ERROR")


def test_a_backend_that_there_is_not(lapefast, monkeypatch):
    monkeypatch.setenv("LAPEFAST_BACKEND", "abacus")
    refused(
        lapefast("doctor"),
        "backend must be one of auto, cpu, cuda, triton, reference, got 'abacus'",
    )


def test_a_label_that_the_terminal_cannot_write_is_escaped(lapefast, made, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    result = lapefast(
        *("profile", made.directory, "--corpus", f"中文={made.train['zh']}"),
        *("--seq-len", 32, "--max-tokens", 256, "-o", tmp_path / "p.safetensors"),
    )
    stream.flush()
    assert result.code == 0
    assert b"\\u4e2d\\u6587" in stream.buffer.getvalue()


def test_a_demo_cannot_be_written_over_a_file(lapefast, tmp_path):
    (tmp_path / "file").write_text("")
    refused(lapefast("demo", "-o", tmp_path / "file"), "file")


def test_an_unknown_command_or_option_is_a_usage_error(lapefast):
    assert lapefast("profil").code == 2
    assert lapefast("info", "--nothing").code == 2


def test_an_unexpected_error_is_one_sentence(lapefast, monkeypatch, tmp_path):
    (tmp_path / "p").write_bytes(b"12345678{")

    def fail(_):
        raise RuntimeError("some\nthing")

    monkeypatch.setattr(lf.Profile, "load", fail)
    monkeypatch.delenv("LAPEFAST_DEBUG", raising=False)
    result = lapefast("info", tmp_path / "p")
    assert result.code == 1
    assert result.err.startswith("error: unexpected RuntimeError: some thing")


def test_an_interrupt_exits_cleanly(made, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(made.train["en"].read_text() * 500)
    output = tmp_path / "p.safetensors"
    command = [sys.executable, "-m", "lapefast", "profile", made.directory]
    command += [f"--corpus=en={text}", "--threads=1", "-o", output]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Whoever runs the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Its bar shows that the pass has begun.
    seen = b""
    deadline = time.monotonic() + 120
    while b"tok/s" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read1()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in seen + rest
    assert b"interrupted" in rest
    assert not output.exists()
