"""The commands of docs/serving.md, run as they stand there, and real clients of the servers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lapefast as lf
from lapefast.models import find_sites
from lapefast.neurons import Layout, load_edits

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
PLUGIN, PROFILING, ADAPTERS = "## The plugin", "## Profiling", "## Adapters"
PROMPTS = tiny.prompts(4, 30, seed=20)


def blocks(section: str, language: str) -> list[str]:
    text = DOCUMENT.read_text("utf-8").partition(section)[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


class Site:
    """A directory as the document takes it for given, and its commands run there."""

    def __init__(self, path: Path) -> None:
        self.path, self.made = path, tiny.llama(path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "VLLM_CACHE_ROOT": str(path / "cache"),
            # As a server has it; the tests around this one keep engines in their process.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "LAPEFAST_EDITS": "",
        }
        _tokenizer().save_pretrained(self.made.path)
        self._profile_and_neurons()

    def python(self, code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", self._own(code)],
            cwd=self.path,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def server(self, command: str):
        """The server that a command starts; a client of it."""
        log = self.path / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["sh", "-ec", self._own(command)],
                cwd=self.path,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                self._wait(process, log)
                yield openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)

    def _own(self, text: str) -> str:
        return text.replace("8000", str(self.port))

    def _wait(self, process: subprocess.Popen, log: Path) -> None:
        for _ in range(240):
            time.sleep(0.5)
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                continue
        raise AssertionError(log.read_text())

    def _profile_and_neurons(self) -> None:
        model = self.made.model
        texts = {
            name: torch.tensor(tiny.prompts(4, 60, seed)) for seed, name in enumerate(("en", "zh"))
        }
        lf.profile(model, texts, progress=False).save(self.path / "model.profile.safetensors")
        sites = find_sites(model)
        generator = torch.Generator().manual_seed(3)
        neurons = {
            label: {
                site.name: torch.randperm(site.width, generator=generator)[:size]
                for site, size in zip(sites, sizes, strict=True)
            }
            for label, sizes in (("en", (60, 13, 50)), ("zh", (64, 20, 7)))
        }
        layout = Layout(
            tuple(site.name for site in sites),
            {site.name: site.width for site in sites},
            None,
            None,
        )
        lf.NeuronSets(neurons, layout).save(self.path / "model.neurons.json")


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte."""
    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ask(client: openai.OpenAI, prompt: list[int], model: str = "model", name: str | None = None):
    """The tokens that a server answers with."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    if name is not None:
        extra["vllm_xargs"] = {"lapefast_edit": name}
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=tiny.NEW_TOKENS, temperature=0, extra_body=extra
    )
    return answer.choices[0].token_ids


def together(asks):
    """Answers to questions that are all on their way at the same time."""
    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(lambda one: ask(*one), asks))


def printed(output: str) -> dict[str, str]:
    """What a client of the document prints: name -> text."""
    return dict(line.split(" ", 1) for line in output.splitlines() if line)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))


@pytest.mark.timeout(400)
def test_the_plugin_served_as_the_document_says(site):
    write, client_code, offline = blocks(PLUGIN, "python")
    (command,) = blocks(PLUGIN, "sh")
    site.python(write)
    edits = load_edits(site.path / "edits.json").edits

    def expected(prompt, name):
        return tiny.hooked(site.made.model, prompt, edits.get(name), tiny.NEW_TOKENS)

    names = [None, "none", "no-en", "to-zh"]
    with site.server(command) as client:
        asks = [(client, prompt, "model", name) for prompt in PROMPTS for name in names]
        right = [expected(prompt, name) for _, prompt, _, name in asks]
        assert len({tuple(tokens) for tokens in right}) == 3 * len(PROMPTS)
        assert together(asks) == right
        assert [ask(*one) for one in asks] == right
        for name in ("nobody", 3):
            with pytest.raises(openai.BadRequestError, match="lapefast_edit must name an edit"):
                ask(client, PROMPTS[0], "model", name)
        with pytest.raises(openai.BadRequestError, match="beam search"):
            client.completions.create(
                model="model",
                prompt="a",
                max_tokens=2,
                extra_body={"use_beam_search": True, "vllm_xargs": {"lapefast_edit": "no-en"}},
            )
        # It is still there.
        assert ask(client, PROMPTS[0], "model", "to-zh") == expected(PROMPTS[0], "to-zh")
        texts = printed(site.python(client_code))
    assert len(set(texts.values())) == 3
    environment = {"LAPEFAST_EDITS": "edits.json", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    assert repr(site.python(offline, **environment).splitlines()[-1]) == texts["to-zh"]


@pytest.mark.timeout(700)
def test_profiles_made_as_the_document_says(site):
    (command,), (code,) = blocks(PROFILING, "sh"), blocks(PROFILING, "python")
    first, second = sorted(os.sched_getaffinity(0))[:2]
    texts = {"en": "It is not as warm as it was in the morning.", "zh": "今天早上比现在暖和。"}
    for label, text in texts.items():
        (site.path / f"{label}.txt").write_text("\n".join(f"{n}. {text}" for n in range(30)))
    done = subprocess.run(
        ["sh", "-ec", command.replace("0|1", f"{first}|{second}")],
        cwd=site.path, env=site.environment, capture_output=True, text=True, timeout=450,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vLLM adds up in another order than transformers does" in done.stderr
    counted = lf.Profile.load(site.path / "model.vllm.profile.safetensors")
    files = {label: str(site.path / f"{label}.txt") for label in texts}
    model, tokenizer = site.made.model, AutoTokenizer.from_pretrained(site.made.path)
    # Rows are as long as the model allows.
    expected = lf.profile(model, files, tokenizer, seq_len=512, progress=False)
    assert counted.metadata["seq_len"] == 512
    assert counted.metadata["engine"]["tensor_parallel_size"] == 2
    assert counted.tokens.tolist() == expected.tokens.tolist()
    assert counted.fingerprint == expected.fingerprint
    differences = sum(
        int((counted.counts[name] - expected.counts[name]).abs().sum()) for name in expected.sites
    )
    # One in a million is of ordinary weights; these are six times as large, in three layers.
    assert differences <= 1e-5 * int(expected.tokens.sum()) * 3 * 192
    again = site.python(code, VLLM_ENABLE_V1_MULTIPROCESSING="0").splitlines()[-1]
    assert again == repr(lf.profile(model, files, tokenizer, seq_len=256, progress=False))


@pytest.mark.timeout(400)
def test_adapters_served_as_the_document_says(site):
    write, client_code = blocks(ADAPTERS, "python")
    (command,) = blocks(ADAPTERS, "sh")
    site.python(write)
    neurons = lf.NeuronSets.load(site.path / "model.neurons.json")
    edits = {"no-en": lf.deactivate(neurons["en"]), "more-zh": lf.scale(neurons["zh"], 2.0)}
    edits = {name: edit.bind(site.made.model) for name, edit in edits.items()}
    with site.server(command) as client:
        asks = [(client, prompt, name) for prompt in PROMPTS for name in ("model", *edits)]
        right = [
            tiny.hooked(site.made.model, prompt, edits.get(name), tiny.NEW_TOKENS)
            for _, prompt, name in asks
        ]
        assert len({tuple(tokens) for tokens in right}) == len(asks)
        assert together(asks) == right
        assert [ask(*one) for one in asks] == right
        texts = printed(site.python(client_code))
    assert len(set(texts.values())) == 3
