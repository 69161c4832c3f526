"""Bad input: one sentence, exit status 2, and nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import lapefast as lf


def refused(result, *said: str) -> None:
    """One sentence stands on standard error, after the bars of what was still done."""
    assert result.code == 2
    *bars, message = result.err.splitlines()
    assert message.startswith("error: ")
    assert all("%|" in bar or not bar for bar in bars)
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
        (["--device", "cpu", "--device-map", "auto"], "not both"),
    ],
)
def test_an_option_that_cannot_be_met(lapefast, made, tmp_path, options, said):
    corpus = f"en={made.train['en']}"
    output = tmp_path / "p.safetensors"
    result = lapefast("profile", made.directory, "--corpus", corpus, *options, "-o", output)
    refused(result, said)
    assert not output.exists()


def test_quantisation_without_its_library(lapefast, made, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = lapefast(
        *("profile", made.directory, "--corpus", f"en={made.train['en']}"),
        *("--quantization", "4bit", "-o", tmp_path / "p.safetensors"),
    )
    refused(result, "bitsandbytes")


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


@pytest.mark.parametrize("target", ["nowhere/p.safetensors", "."])
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


def test_a_file_that_is_nothing_of_lapefasts(lapefast, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a profile")
    refused(lapefast("info", path), "notes.txt")
    refused(lapefast("info", tmp_path / "missing"), "missing")


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
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
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
