"""vLLM counts: every prompt token once, exactly what it computed, close to what transformers does.

Two oracles. The eager expression on the gate tensors of the very run (`eager_counts.py`), which
counts must equal; and `lapefast.profile` of the same rows in float32, which differs where another
order of additions takes a value near 0 to its other side.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import eager_counts
import numpy as np
import pytest
import tiny
import torch
import transformers
from test_families import COMMON, FAMILIES, GATED

import lapefast as lf
from lapefast.detect.lape import criteria
from lapefast.engines.vllm import engine as engines
from lapefast.engines.vllm.counting import Counting
from lapefast.errors import InputError
from lapefast.models import find_sites
from lapefast.neurons import Layout
from lapefast.profiling.vllm import profile

SCRIPT = Path(__file__).with_name("one_profile.py")
ALL = ("counts", "sums", "square_sums", "up_abs_sums")


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """A Llama whose weights are of an ordinary size."""
    return tiny.llama(tmp_path_factory.mktemp("counted"), initializer_range=0.05)


@pytest.fixture(autouse=True)
def unedited(llama, monkeypatch):
    """No edits are served where neurons are counted."""
    monkeypatch.delenv("LAPEFAST_EDITS")


@pytest.fixture
def eager(tmp_path, monkeypatch):
    """Workers count by the eager expression too; what they found."""
    monkeypatch.setenv(eager_counts.ENVIRONMENT, str(tmp_path))
    monkeypatch.setitem(engines._FIXED, "worker_cls", "eager_counts.Worker")
    return lambda: eager_counts.gathered(tmp_path)


def texts(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of two labels that share half of the vocabulary; some rows come twice."""
    generator = torch.Generator().manual_seed(0)
    en, zh = (torch.randint(low, low + 160, (rows, length), generator=generator) for low in (3, 83))
    en[1], zh[-1] = en[0], zh[0]
    return {"en": en, "zh": zh}


@contextmanager
def one_engine():
    """Room for the next engine in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        yield
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


# Small steps and blocks, so that rows come in parts.
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_num_batched_tokens": 64,
}


def counted(path, corpora, batch_size=8, **options):
    """A pass of vLLM in this process."""
    options = {"progress": False, "batch_size": batch_size, **SMALL, **options}
    with one_engine():
        return profile(str(path), corpora, **options)


def assert_equals_eager(counted, found):
    assert list(found) == counted.sites
    for site, (counts, sums) in found.items():
        assert torch.equal(counted.counts[site], counts), site
        for name in counted.statistics.keys() - {"counts"}:
            total, absolute = sums[name]
            # Float32 over at most 64 rows; a product's square is rounded up to three times before.
            error = (counted.statistics[name][site] - total).abs()
            assert (error <= (64 + 3) * 2**-24 * absolute).all(), (site, name)


def assert_close(counted, expected):
    """As near to transformers' profile as another order of float32 additions allows."""
    assert counted.labels == expected.labels
    assert counted.site_info == expected.site_info
    assert counted.fingerprint == expected.fingerprint
    assert counted.tokens.tolist() == expected.tokens.tolist()
    differences = sum(
        int((counted.counts[site] - expected.counts[site]).abs().sum()) for site in expected.sites
    )
    width = sum(site.width for site in expected.site_info)
    comparisons = int(expected.tokens.sum()) * width
    # One is the least that there can be, in runs of fewer than a million.
    assert differences <= max(1, 1e-6 * comparisons)
    for name, of in expected.statistics.items():
        if name != "counts":
            for site in expected.sites:
                error = (counted.statistics[name][site] - of[site]).abs()
                # Of a mean, ten times the largest seen (9e-8).
                assert (error <= 1e-6 * expected.tokens[:, None]).all(), (site, name)


# Random weights have few neurons of one label, so more of them are taken.
RATES = {"top_rate": 0.1, "filter_rate": 0.5, "activation_bar_ratio": 0.5}


def assert_same_selection(counted, expected):
    """LAPE's neurons, but for those within 1e-6 of a cut."""
    chosen = [lf.detect.lape(one, **RATES) for one in (counted, expected)]
    cuts = [criteria(one, **RATES) for one in (counted, expected)]
    ends = np.cumsum([0, *(site.width for site in expected.site_info)])
    for label in expected.labels:
        mine, theirs = (
            {
                int(start + neuron)
                for start, site in zip(ends, expected.sites, strict=False)
                for neuron in one[label][site]
            }
            for one in chosen
        )
        assert len(mine | theirs) > 10
        for neuron in mine ^ theirs:
            assert any(
                abs(cut.entropy[neuron] - cut.cut) <= 1e-6
                or np.abs(cut.probabilities[:, neuron] - cut.bar).min() <= 1e-6
                or np.abs(cut.probabilities[:, neuron] - cut.least).min() <= 1e-6
                for cut in cuts
            ), neuron


def test_rows_in_parts_count_as_computed_and_as_transformers_counts(made, eager, monkeypatch):
    steps = []

    def spy(self, runner):
        groups = original(self, runner)
        lengths = np.diff(runner.query_start_loc.np[: len(runner.input_batch.req_ids) + 1])
        steps.append((groups, lengths))
        return groups

    original = Counting.index
    monkeypatch.setattr(Counting, "index", spy)
    corpora = texts(40, 100)
    got = counted(made.path, corpora, statistics=ALL)
    assert_equals_eager(got, eager())
    expected = lf.profile(made.model, corpora, statistics=ALL, progress=False)
    assert_close(got, expected)
    assert_same_selection(got, expected)
    # Rows of 100 in steps of 64: parts, of two requests and of both labels in one step.
    assert all(len(groups) <= 64 for groups, _ in steps)
    assert any(len(lengths) > 1 for _, lengths in steps)
    assert any(set(groups.tolist()) == {0, 1} for groups, _ in steps)
    assert got.metadata["engine"] == {
        "name": "vllm",
        "tensor_parallel_size": 1,
        "max_num_batched_tokens": 64,
    }
    assert got.metadata["edited"] is False
    assert got.metadata["batch_size"] == 8
    assert got.metadata["corpora"] == expected.metadata["corpora"]
    # Neurons found in it are the model's.
    neurons = lf.detect.lape(got, **RATES)
    assert neurons.bind(made.model).layout.fingerprint == expected.fingerprint


def test_half_precision_and_another_threshold_count_as_computed(made, eager):
    """Here the kernel computes SiLU itself."""
    corpora = texts(8, 60)
    got = counted(made.path, corpora, dtype="bfloat16", threshold=0.1)
    assert got.metadata["dtype"] == "bfloat16"
    assert got.metadata["threshold"] == 0.1
    assert_equals_eager(got, eager())


@pytest.fixture
def preempted(monkeypatch):
    """How much of each request was computed when it lost its place, and of how long a prompt."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen = []
    original = Scheduler._preempt_request

    def spy(self, request, *args, **kwargs):
        seen.append((request.num_computed_tokens, request.num_prompt_tokens))
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", spy)
    return seen


def tight(at_once: int):
    """Too few blocks of 32 for eight rows of 100, of which each gets so many tokens in a step."""
    return {"num_gpu_blocks_override": 14, "long_prefill_token_threshold": at_once}


def test_generated_tokens_and_those_computed_anew_do_not_count(made, eager, preempted):
    """Requests that generate join and leave, and lose their place in prompts and after them."""
    from vllm import SamplingParams

    corpora = texts(10, 100)
    sites = find_sites(made.model)
    layout = Layout(tuple(site.name for site in sites), {site.name: site.width for site in sites})
    with (
        one_engine(),
        engines.CountingEngine(
            str(made.path), layout, list(corpora), ("counts", "sums"), 0.0, 200,
            max_num_seqs=8, **SMALL, **tight(30),
        ) as engine,
    ):  # fmt: skip
        for label, rows in corpora.items():
            for number, row in enumerate(rows):
                params = SamplingParams(
                    max_tokens=1 + 30 * (number % 4),
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"lapefast_label": label},
                )
                engine._params[label] = params
                engine.read(label, row[None])
        found = engine.finish()
    assert any(0 < computed < prompt for computed, prompt in preempted), preempted
    assert any(computed > prompt for computed, prompt in preempted), preempted
    got = lf.Profile(list(corpora), sites, {"decoder": found.tokens}, found.statistics)
    assert_equals_eager(got, eager())
    got.metadata["fingerprint"] = lf.models.fingerprint(made.model)
    assert_close(got, lf.profile(made.model, corpora, progress=False))


def test_tokens_that_are_counted_twice_are_noticed(made, preempted, monkeypatch):
    """A control: without memory of how far each request was counted, the pass ends in an error."""
    original = Counting.index

    def forgetful(self, runner):
        self._done.clear()
        return original(self, runner)

    monkeypatch.setattr(Counting, "index", forgetful)
    with pytest.raises(InputError, match=r"vLLM computed .* tokens of en, zh, where the text has"):
        counted(made.path, texts(10, 100), **tight(16))
    assert preempted


@pytest.mark.timeout(500)
def test_two_ranks_compiled_count_as_computed_and_as_transformers_counts(made, tmp_path):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    corpora = texts(40, 100)
    files = {label: str(tmp_path / f"{label}.pt") for label in corpora}
    for label, path in files.items():
        torch.save(corpora[label], path)
    (tmp_path / "eager").mkdir()
    options = {**SMALL, "enforce_eager": False, "tensor_parallel_size": 2, "statistics": ALL}
    task = {
        "model": str(made.path),
        "corpora": files,
        "options": options,
        "output": str(tmp_path / "profile"),
    }
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}",
        eager_counts.ENVIRONMENT: str(tmp_path / "eager"),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(task)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=450,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "vLLM adds up in another order than transformers does" in done.stdout
    got = lf.Profile.load(tmp_path / "profile")
    ranks = [torch.load(path) for path in sorted((tmp_path / "eager").glob("*.pt"))]
    assert [rank["layers.0.mlp"][0] for rank in ranks] == [0, 96]
    assert_equals_eager(got, eager_counts.gathered(tmp_path / "eager"))
    expected = lf.profile(made.model, corpora, statistics=ALL, progress=False)
    assert_close(got, expected)
    assert_same_selection(got, expected)
    assert got.metadata["engine"]["tensor_parallel_size"] == 2


QWEN3 = transformers.Qwen3Config(**GATED, head_dim=32, initializer_range=0.1)


@pytest.mark.parametrize("family", ["gemma", "qwen3", "gpt2", "opt"])
def test_a_family(family, tmp_path):
    config = copy.deepcopy({**FAMILIES, "qwen3": QWEN3}[family])
    # Of an ordinary size: larger ones make more of the last bits.
    config.initializer_range = config.init_std = 0.05
    model = tiny.make(tmp_path, config)
    corpora = texts(8, 60)
    got = counted(model.path, corpora)
    assert_close(got, lf.profile(model.model, corpora, progress=False))


def test_what_needs_the_product_is_refused_where_vllm_multiplies_elsewhere(tmp_path):
    model = tiny.make(tmp_path, FAMILIES["opt"])
    with pytest.raises(InputError, match=r"square_sums can't be counted at decoder\.layers\.0: .*"):
        counted(model.path, texts(2, 20), statistics=("counts", "square_sums"))


def test_an_activation_that_is_not_finite_is_an_error_that_names_its_site(made, tmp_path):
    broken = transformers.LlamaForCausalLM.from_pretrained(made.path)
    with torch.no_grad():
        broken.model.layers[1].mlp.gate_proj.weight[5] = torch.inf
    broken.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layers\.1\.mlp: \d+ activations are not finite"):
        counted(tmp_path, texts(2, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching must be False"),
        ({"worker_cls": "auto"}, "worker_cls must be"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1"),
        ({"max_model_len": 100}, "max_model_len can't be given"),
        ({"no_such_option": 1}, "does not take these options: .*no_such_option"),
        ({"statistics": ("count",)}, "statistics must be some of"),
        ({"seq_len": 513}, "over the model's limit of 512"),
    ],
)
def test_options_that_do_not_go_with_counting_are_refused(made, options, message):
    corpora = {"en": texts(2, 20)["en"].flatten()}
    with pytest.raises(InputError, match=message):
        counted(made.path, corpora, **{"seq_len": 20, **options})


def test_a_process_that_serves_edits_does_not_count(made, monkeypatch):
    monkeypatch.setenv("LAPEFAST_EDITS", str(made.edit_file))
    with pytest.raises(InputError, match="LAPEFAST_EDITS is set"):
        counted(made.path, texts(2, 20))


def test_models_that_cannot_be_counted_are_refused_by_name(made, tmp_path):
    with pytest.raises(InputError, match="vLLM loads the model itself: .* got LlamaForCausalLM"):
        profile(made.model, texts(2, 20))
    with pytest.raises(InputError, match="transformers makes no causal model of .*nowhere"):
        counted(tmp_path / "nowhere", texts(2, 20))
    experts = transformers.MixtralConfig(**GATED, num_local_experts=2)
    experts.save_pretrained(tmp_path / "experts")
    with pytest.raises(InputError, match="mixture of experts"):
        counted(tmp_path / "experts", texts(2, 20))
    translator = transformers.BartConfig(**COMMON, d_model=32, encoder_layers=1, decoder_layers=1)
    translator.save_pretrained(tmp_path / "bart")
    with pytest.raises(InputError, match=r"bart is an encoder-decoder"):
        counted(tmp_path / "bart", texts(2, 20))
