from __future__ import annotations

import weakref

import plain
import pytest
import torch
from families import VOCABULARY, by_name, shared
from torch import nn

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models import placed
from lapefast.models.inputs import forward_inputs

ROWS = torch.arange(7 * 12).reshape(7, 12) * 29 % (VOCABULARY - 10) + 5
OTHER = ROWS.flip(0)[:3] + 1
CORPORA = {"en": ROWS, "zh": OTHER}


@pytest.fixture(params=["llama", "phi3", "gpt2", "opt", "bert", "t5", "t5-v1.1", "bart", "zamba2",
                        "gemma3n"])  # fmt: skip
def family(request):
    return by_name(request.param)


@pytest.fixture
def llama():
    return shared("llama")


def profiled(model, corpora=CORPORA, **options):
    return lf.profile(model, corpora, progress=False, **options)


@torch.no_grad()
def by_hooks(family, model, corpora, batch_size):
    """Site -> counts of plain hooks, on the same batches that the pass makes."""
    bare = family.bare_of(model)
    total = {}
    for index, rows in enumerate(corpora.values()):
        for batch in rows.split(batch_size):
            with plain.hooked(family.activations(model)) as seen:
                bare(**forward_inputs(bare, batch))
            groups = torch.full_like(batch, index)
            for site, calls in seen.items():
                total[site] = total.get(site, 0) + plain.counts(calls, groups, len(corpora))
    return total


def assert_counts(profile, expected):
    assert profile.counts.keys() == expected.keys()
    for site, counted in expected.items():
        assert torch.equal(profile.counts[site], counted), site


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_pass_counts_what_plain_hooks_count_on_the_same_batches(family, dtype, batch_size):
    model = shared(family.name, dtype)
    before = plain.attributes(model)
    profile = profiled(model, batch_size=batch_size)
    assert profile.labels == ["en", "zh"]
    assert profile.tokens.tolist() == [ROWS.numel(), OTHER.numel()]
    assert_counts(profile, by_hooks(family, model, CORPORA, batch_size))
    plain.assert_untouched(before, model)


@torch.no_grad()
def test_the_pass_equals_a_recorder_in_ones_own_loop(family):
    model = shared(family.name, torch.bfloat16)
    statistics = ("counts", "sums")
    profile = profiled(model, batch_size=4, statistics=statistics)
    bare = family.bare_of(model)
    with lf.record(model, list(CORPORA), statistics=statistics) as recorder:
        for label, rows in CORPORA.items():
            for batch in rows.split(4):
                recorder.set(label=label)
                bare(**forward_inputs(bare, batch))
    own = recorder.profile()
    assert own.sites == profile.sites
    assert own.stack_tokens.keys() == profile.stack_tokens.keys()
    for stack, tokens in own.stack_tokens.items():
        assert torch.equal(tokens, profile.stack_tokens[stack])
    for site in own.sites:
        assert torch.equal(own.counts[site], profile.counts[site])
        assert torch.equal(own.sums[site], profile.sums[site])


def test_the_decoder_reads_the_row_shifted_right():
    family, model = by_name("t5"), shared("t5")
    seen = []
    hook = model.decoder.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    try:
        profiled(model, {"en": ROWS[:2]}, batch_size=2)
    finally:
        hook.remove()
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    assert torch.equal(seen[-1], torch.cat([start, ROWS[:2, :-1]], dim=1))
    assert family.sites


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_last_ffn_ends_early_only_where_nothing_is_lost(name, monkeypatch):
    family, model = by_name(name), shared(name, torch.bfloat16)
    last = list(family.sites)[-1]
    owner = models.bare_model(model).get_submodule(last)
    down = getattr(owner, "down_proj", None) or owner.c_proj
    ran = []
    hook = down.register_forward_hook(lambda *_: ran.append(1))
    try:
        expected = by_hooks(family, model, CORPORA, 4)
        for statistics in (("counts",), ("counts", "sums"), ("counts", "square_sums")):
            ran.clear()
            profile = profiled(model, batch_size=4, statistics=statistics)
            assert_counts(profile, expected)
            # Two batches of one label and one of the other, besides the proof.
            assert (len(ran) < 3) == family.replaced
    finally:
        hook.remove()


def test_the_last_ffn_in_the_definition_need_not_be_the_last_that_runs():
    model = by_name("llama").build(torch.bfloat16)
    first, second = model.model.layers
    model.model.layers = nn.ModuleDict({"0": first, "1": second})
    backwards = type("Backwards", (nn.ModuleDict,), {
        "__iter__": lambda self: iter([self["1"], self["0"]]),
        "__getitem__": lambda self, key: [second, first][key] if isinstance(key, slice)
        else nn.ModuleDict.__getitem__(self, key),
    })  # fmt: skip
    model.model.layers.__class__ = backwards
    family = by_name("llama")
    profile = profiled(model, batch_size=4)
    assert_counts(profile, by_hooks(family, model, CORPORA, 4))


def test_rows_keep_their_length_and_a_stream_of_ids_is_cut(llama):
    stream = ROWS.reshape(-1)[:50]
    profile = profiled(llama, {"rows": ROWS, "stream": stream}, seq_len=12)
    assert profile.tokens.tolist() == [84, 48]
    report = profile.metadata["corpora"][1]
    assert (report["tokens"], report["dropped"]) == (48, 2)
    assert profile.metadata["seq_len"] == 12
    both = profiled(llama, {"stream": ROWS.reshape(-1)[:48]}, seq_len=12)
    for site, counted in both.counts.items():
        assert torch.equal(counted[0], profile.counts[site][1])


def test_labels_may_have_rows_of_different_lengths(llama):
    profile = profiled(llama, {"short": ROWS[:, :5], "long": ROWS}, batch_size=3)
    assert profile.tokens.tolist() == [35, 84]
    alone = profiled(llama, {"short": ROWS[:, :5]}, batch_size=3)
    for site, counted in alone.counts.items():
        assert torch.equal(counted[0], profile.counts[site][0])
    assert alone.metadata["seq_len"] == 5


def test_max_tokens_limits_each_label(llama):
    profile = profiled(llama, max_tokens=30, batch_size=4)
    assert profile.tokens.tolist() == [24, 24]
    expected = profiled(llama, {"en": ROWS[:2], "zh": OTHER[:2]}, batch_size=4)
    assert_counts(profile, expected.counts)


def test_one_label_is_enough(llama):
    assert profiled(llama, {"en": ROWS}).labels == ["en"]


def test_the_batch_is_chosen_once_and_recorded(llama):
    assert profiled(llama, batch_size=3).metadata["batch_size"] == 3
    chosen = profiled(llama).metadata["batch_size"]
    assert isinstance(chosen, int)
    assert chosen >= 1


def test_text_is_tokenised(llama):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    texts = [" ".join(f"w{index}" for index in row) for row in ROWS.tolist()]
    profile = profiled(llama, {"en": texts}, tokenizer=tokenizer, seq_len=12, batch_size=4)
    expected = profiled(llama, {"en": ROWS}, batch_size=4)
    assert_counts(profile, expected.counts)


def test_training_flags_gradients_and_caches_are_as_before():
    model = by_name("gpt2").build()
    model.train()
    model.transformer.h[1].eval()
    model.transformer.h[1].mlp.dropout.train()
    before = plain.attributes(model)
    used = []
    hook = model.transformer.register_forward_hook(
        lambda module, args, output: used.append((output.past_key_values, module.training))
    )
    before = plain.attributes(model)
    profile = profiled(model)
    hook.remove()
    evaluated = profiled(shared("gpt2"))
    assert_counts(profile, evaluated.counts)
    assert used
    assert all(cache is None and not training for cache, training in used)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = plain.attributes(model)
    assert {path: values["training"] for path, values in before.items()} == {
        path: values["training"] for path, values in after.items()
    }


@pytest.mark.parametrize("name", ["llama", "t5", "mt5", "bart", "bert"])
def test_no_head_runs_in_the_pass(name):
    model = shared(name)
    before = plain.attributes(model)
    ran = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: ran.append(output.shape)
    )
    try:
        profiled(model, {"en": ROWS})
    finally:
        hook.remove()
    # The probe's three rows of eight tokens go through all of what is called.
    assert set(ran) <= {torch.Size([3, 8, VOCABULARY])}
    plain.assert_untouched(before, model)


def test_the_kernels_run_once_per_site_and_batch(monkeypatch):
    model = shared("llama", torch.bfloat16)
    called = []
    for name in ("profile", "profile_", "observe"):
        op = getattr(placed.ops, name)
        monkeypatch.setattr(
            placed.ops, name,
            lambda *given, op=op, name=name, **options: (called.append(name),
                                                         op(*given, **options))[1],
        )  # fmt: skip
    profiled(model, {"en": ROWS}, batch_size=7)
    # The proof and the one batch; the last FFN makes no product in it.
    assert sorted(called) == ["observe", "profile_", "profile_", "profile_"]


def test_statistics_may_be_chosen(llama):
    profile = profiled(llama, statistics=("counts", "sums", "square_sums", "up_abs_sums"))
    assert set(profile.statistics) == {"counts", "sums", "square_sums", "up_abs_sums"}
    assert set(profiled(llama).statistics) == {"counts", "sums"}
    assert set(profiled(llama, statistics=("counts",)).statistics) == {"counts"}


def test_a_steered_model_is_profiled_as_edited(llama):
    with lf.steer(llama, lf.activate({"layers.0.mlp": [3]}, 2.0)):
        profile = profiled(llama)
    assert profile.counts["layers.0.mlp"][:, 3].tolist() == profile.tokens.tolist()
    assert profile.metadata["edited"] is True
    assert profiled(llama).metadata["edited"] is False


def test_of_a_text_no_more_is_held_than_is_read_ahead(llama):
    """(What a process takes over 10^8 tokens: benchmarks/bench_corpus.py.)"""
    given, held = [], []

    def text():
        for number in range(5000):
            row = ROWS[number % len(ROWS)].numpy().copy()
            given.append(weakref.ref(row))
            if number % 100 == 0:
                held.append(sum(one() is not None for one in given))
            yield row

    profiled(llama, {"en": text()}, seq_len=12, batch_size=50)
    # The first 4,096 tokens of an iterator, by which it is known, are kept until they are used.
    assert max(held) < 2 * 4096 // 12


@pytest.mark.parametrize(
    ("corpora", "options", "message"),
    [
        (CORPORA, {"seq_len": 65}, "seq_len 65 is over the model's limit of 64"),
        (CORPORA, {"seq_len": 0}, "seq_len must be at least 1"),
        (CORPORA, {"seq_len": 6}, "12"),
        (CORPORA, {"batch_size": 0}, "batch_size must be at least 1"),
        (CORPORA, {"seq_len": 12.0}, "seq_len must be an integer, got 12.0"),
        (CORPORA, {"batch_size": "2"}, "batch_size must be an integer, got '2'"),
        (CORPORA, {"max_tokens": 1e6}, "max_tokens must be an integer, got 1000000.0"),
        (CORPORA, {"max_tokens": 3}, "max_tokens|row"),
        (CORPORA, {"resume": "/nowhere/at/all"}, "No such file or directory; give a directory"),
        (CORPORA, {"save_every": -1}, "save_every must be 0 seconds or more, got -1"),
        (CORPORA, {"statistics": ("means",)}, "statistics must be some of"),
        ({}, {}, "corpora"),
        ({"en": ROWS + VOCABULARY}, {}, "vocabulary|outside|token id"),
        ({"en": -ROWS}, {}, "negative|outside|token id"),
        ({"en": torch.zeros(1, 65, dtype=torch.int64)}, {}, "over the model's limit of 64"),
        ({"en": ROWS.reshape(-1)[:11]}, {"seq_len": 12}, "row"),
        ({"en": ["some text"]}, {}, "tokenizer"),
        ({"en": "/nowhere/at/all.txt"}, {}, "/nowhere/at/all.txt"),
        ({"en": ROWS.float()}, {}, "integer"),
    ],
)
def test_bad_input_is_one_sentence_and_the_model_is_kept(llama, corpora, options, message):
    before = plain.attributes(llama)
    with pytest.raises(InputError, match=message) as caught:
        profiled(llama, corpora, **options)
    assert "\n" not in str(caught.value)
    plain.assert_untouched(before, llama)


def test_the_name_of_a_model_is_no_model():
    with pytest.raises(InputError, match="must be a torch.nn.Module, got str; load it first"):
        profiled("gpt2")


def test_a_model_whose_activations_are_not_finite_is_named_by_site():
    model = by_name("gpt2").build()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    before = plain.attributes(model)
    with pytest.raises(InputError, match="h.1.mlp: .* not finite"):
        profiled(model)
    plain.assert_untouched(before, model)


def test_a_recorded_model_is_refused(llama):
    with lf.record(llama, ["a"]), pytest.raises(InputError, match="already placed"):
        profiled(llama)


def test_an_interruption_gives_the_model_back(llama):
    llama.train()
    try:
        before = plain.attributes(llama)

        def rows():
            yield ROWS[0].tolist()
            raise KeyboardInterrupt

        with pytest.raises((KeyboardInterrupt, InputError)):
            profiled(llama, {"en": rows()}, seq_len=12)
        plain.assert_untouched(before, llama)
    finally:
        llama.eval()
