"""What a full corpus asks of a pass: text that is ready in time, flat memory, more processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
from processes import run_alone

import lapefast as lf
from lapefast import demo
from lapefast.corpus import Corpus
from lapefast.demo.text import compose
from lapefast.profiling import run as profiling
from lapefast.profiling.batches import CorpusPass

_HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    return demo.load(progress=False).tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory, quick) -> Path:
    path = tmp_path_factory.mktemp("text") / "en.txt"
    path.write_text("\n".join(compose("en", 200 if quick else 40_000, seed=1)))
    return path


def test_waiting_for_text(benchmark, report, monkeypatch, llama, text, tokenizer, quick):
    """The share of a pass, tokenised as it goes, in which the model has nothing to read."""
    passes: list[CorpusPass] = []

    class Kept(CorpusPass):
        def __init__(self, *given, **options) -> None:
            super().__init__(*given, **options)
            passes.append(self)

    monkeypatch.setattr(profiling, "CorpusPass", Kept)
    shape, shares = llama.shape, []

    def one_pass() -> None:
        begin = perf_counter()
        lf.profile(
            llama.model,
            {"en": str(text)},
            tokenizer,
            seq_len=shape.length,
            batch_size=shape.rows,
            max_tokens=(2 if quick else 4) * llama.tokens,
            progress=False,
        )
        shares.append(100 * passes[-1].waited / (perf_counter() - begin))

    benchmark.pedantic(one_pass, rounds=1 if quick else 3)
    report.row(f"{llama.what}, text tokenised as it goes: waiting for it", shares, "%", at_most=5)


def test_rate_of_the_text(benchmark, report, text, tokenizer, tmp_path, quick):
    """How fast text becomes rows on one thread beside the model's: read, tokenised and packed."""
    cache = tmp_path / "tokens"
    rates: dict[str, list[float]] = {"tokenised": [], "from the token cache": []}

    def read(cached: bool) -> float:
        corpus = Corpus("en", str(text), tokenizer, token_cache=cache if cached else None)
        begin = perf_counter()
        with corpus.rows(512) as rows:
            tokens = sum(one.numel() for one in rows)
        return tokens / (perf_counter() - begin)

    def both() -> None:
        rates["tokenised"].append(read(False))
        rates["from the token cache"].append(read(True))

    read(True)
    benchmark.pedantic(both, rounds=1 if quick else 5)
    for how, measured in rates.items():
        report.row(f"text to rows of 512: {how}", measured, " tokens/s")


_STREAM = """
import sys, time, numpy as np, torch, lapefast as lf
from torch import nn
torch.set_num_threads(1)
class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mlp = nn.Embedding(64, 8), FFN()
    def get_input_embeddings(self):
        return self.embedding
    def forward(self, input_ids):
        return self.mlp(self.embedding(input_ids))
class Stream:
    def __iter__(self):
        generator = np.random.default_rng(0)
        for _ in range(int(sys.argv[1]) >> 16):
            yield generator.integers(64, size=1 << 16)
torch.manual_seed(0)
begin = time.perf_counter()
profile = lf.profile(Model(), {"en": Stream()}, seq_len=2048, batch_size=32, progress=False)
counts = profile.counts["mlp"]
assert counts.dtype == torch.int64 and int(profile.tokens) == int(sys.argv[1])
assert 0 < int(counts.max()) <= int(profile.tokens)
print(time.perf_counter() - begin)
"""


@pytest.mark.only_on("cpu", reason="the memory of a process, which `make bench` measures")
def test_memory_over_a_long_stream(benchmark, report, quick):
    many = 1 << (22 if quick else 27)  # 134,217,728 tokens
    measured = []

    def measure() -> None:
        _, few = run_alone(_STREAM, many >> 6)
        (seconds,), peak = run_alone(_STREAM, many)
        measured.append((seconds, peak / few))

    benchmark.pedantic(measure, rounds=1)
    seconds, growth = zip(*measured, strict=True)
    what = f"synthetic stream of {many:,} tokens"
    report.row(f"{what}: time", seconds, "s")
    report.row(f"{what}: peak memory over that of 1/64 of it", growth, "x", at_most=1.03)


@pytest.mark.only_on("cpu", reason="one process per core; GPUs take one each")
def test_weak_scaling(benchmark, report, quick):
    """Two processes on twice the text, beside one on its own, a thread each, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}

    def in_turn() -> None:
        for processes in rates:
            rates[processes].append(_tokens_per_second(processes, quick))

    benchmark.pedantic(in_turn, rounds=1 if quick else 3)
    for processes, measured in rates.items():
        report.row(f"{processes} processes of one thread: together", measured, " tokens/s")
    shares = [100 * two / (2 * one) for one, two in zip(rates[1], rates[2], strict=True)]
    report.row("2 processes of one thread: of twice one process's rate", shares, "%")


def _tokens_per_second(processes: int, quick: bool) -> float:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    arguments = ("--nproc-per-node", str(processes), str(_HERE / "weak_scaling.py"))
    command = [*launch, *arguments, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
