"""Average precision and the neurons it selects, against loops written from the definition."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal
import tempfile

import numpy as np
import plain
import pytest
import torch
from families import by_name, shared
from torch import nn
from transformers.pytorch_utils import Conv1D

import lapefast as lf
from lapefast import models
from lapefast.demo.model import train_tokenizer
from lapefast.detect.average_precision import (
    AveragePrecisionNeurons,
    average_precision,
    average_precision_scores,
)
from lapefast.detect.average_precision import scores as precision_scores
from lapefast.detect.average_precision.scores import class_precision_scores
from lapefast.errors import InputError
from lapefast.models.bare import bare_model
from lapefast.neurons import NeuronSets

# A mean of at most 3,000 quotients, each rounded once, is off by less than 3,000 * 2^-53.
TOLERANCE = 1e-12


def by_definition(scores, labels):
    """sum_n (R_n - R_{n-1}) P_n over distinct thresholds, one at a time."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    total = recall = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        hits = int((called & labels).sum())
        total += (hits / labels.sum() - recall) * hits / called.sum()
        recall = hits / labels.sum()
    return total


def assert_as_defined(scores, labels, found):
    assert found.dtype == torch.float64
    rows = torch.as_tensor(scores).double().numpy()
    expected = [by_definition(row, labels) for row in rows]
    assert np.abs(found.numpy() - expected).max() <= TOLERANCE


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_published_example():
    scores = np.random.RandomState(1234).rand(10, 6)
    found = average_precision_scores(scores, [1, 1, 0, 1, 0, 0])
    expected = [0.7222, 0.5556, 1, 1, 1, 0.6333, 0.9167, 0.7, 0.8056, 0.7222]
    assert found.numpy().round(4).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_perfect_and_worst_units(dtype):
    labels = np.arange(3000) < 500
    ramp = np.arange(3000)
    scores = np.stack([np.full(3000, -0.3), -ramp, ramp]).astype(dtype)
    constant, perfect, worst = average_precision_scores(scores, labels).tolist()
    assert abs(constant - 500 / 3000) <= TOLERANCE
    assert perfect == 1
    assert round(worst, 7) == 0.0885589


@pytest.mark.parametrize("decimals", [0, 1, 7])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int16", "int64"])
@pytest.mark.parametrize(("units", "texts", "positive"), [(1, 1, 1), (3, 2, 1), (70, 61, 7)])
def test_scores_are_as_defined(units, texts, positive, dtype, decimals, rng):
    values = (3 * rng.standard_normal((units, texts))).round(decimals)
    scores = torch.from_numpy(values).to(getattr(torch, dtype))
    labels = np.zeros(texts, bool)
    labels[rng.permutation(texts)[:positive]] = True
    assert_as_defined(scores, labels, average_precision_scores(scores, torch.from_numpy(labels)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_equals_scikit_learn(dtype, rng):
    from sklearn import metrics

    labels = np.arange(3000) % 6 == 0
    scores = rng.standard_normal((20, 3000)).astype(dtype)
    scores[::2] = scores[::2].round(1)
    expected = [metrics.average_precision_score(labels, row) for row in scores]
    found = average_precision_scores(scores, labels).numpy()
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinities_and_both_zeros_are_ordered_like_numbers(dtype, rng):
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    values = np.array([np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, huge, -huge], dtype)
    scores = rng.choice(values, (50, 40))
    labels = rng.random(40) < 0.4
    assert_as_defined(scores, labels, average_precision_scores(scores, labels))


def test_neighbouring_numbers_are_not_one_group():
    scores = np.array([[1, 1]], np.float32)
    scores[0, 1] = np.nextafter(scores[0, 0], np.float32(2))
    assert average_precision_scores(scores, [1, 0]).tolist() == [0.5]
    assert average_precision_scores(scores, [0, 1]).tolist() == [1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memory_order_pieces_and_threads_change_nothing(dtype, threads, rng, monkeypatch):
    scores = rng.standard_normal((103, 30)).astype(dtype).round(1)
    labels = np.arange(30) < 11
    expected = average_precision_scores(scores, labels)
    assert_as_defined(scores, labels, expected)
    wide = np.zeros((206, 60), dtype)
    wide[::2, ::2] = scores
    monkeypatch.setattr(precision_scores, "_AT_ONCE", 30 * 7)  # seven units at a time
    for same in (scores, scores.T.copy().T, wide[::2, ::2], scores[::-1].copy()[::-1]):
        assert torch.equal(average_precision_scores(same, labels), expected)
        assert torch.equal(
            average_precision_scores(torch.from_numpy(same.copy()), labels), expected
        )


def test_the_order_of_texts_changes_nothing(rng):
    scores = rng.standard_normal((40, 50)).astype(np.float32).round(1)
    labels, order = rng.random(50) < 0.3, rng.permutation(50)
    found = average_precision_scores(scores, labels)
    assert torch.equal(average_precision_scores(scores[:, order], labels[order]), found)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_class_is_the_positive_one_in_turn(dtype, rng):
    scores = rng.standard_normal((30, 60)).astype(dtype).round(1)
    classes = rng.integers(0, 5, 60)
    found = class_precision_scores(scores, classes, 5)
    assert found.shape == (5, 30)
    for label in range(5):
        assert torch.equal(found[label], average_precision_scores(scores, classes == label))


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_memory_map_is_read_and_left_as_it_was(mode, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(precision_scores, "_MAPPED", 1)  # its pages are given back all the time
    monkeypatch.setattr(precision_scores, "_AT_ONCE", 1)
    values = rng.standard_normal((50, 300)).astype(np.float32)
    file = tmp_path / "scores"
    values.T.tofile(file)
    mapped = np.memmap(file, np.float32, mode, shape=(300, 50))
    if mode != "r":
        mapped[7] = values[:, 7] = 2
    labels = np.arange(300) < 50
    assert_as_defined(values, labels, average_precision_scores(mapped.T, labels))
    assert np.array_equal(mapped.T, values)


def test_no_units_have_no_scores():
    assert average_precision_scores(np.zeros((0, 3), np.float32), [1, 0, 0]).shape == (0,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_is_refused_with_its_unit(dtype, sign, monkeypatch):
    monkeypatch.setattr(precision_scores, "_AT_ONCE", 4 * 2)
    scores = np.zeros((9, 4), dtype)
    scores[5, 2] = np.copysign(np.nan, sign)
    with pytest.raises(InputError, match="unit 5 hold a NaN"):
        average_precision_scores(scores, [1, 0, 0, 1])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 3)), [0, 0, 0], "at least one text as positive"),
        (np.zeros((2, 3)), [0, 1, 2], "bool or 0 and 1"),
        (np.zeros((2, 3)), [[0, 1, 1]], "bool or 0 and 1"),
        (np.zeros((2, 3)), [0, 1, float("nan")], "bool or 0 and 1"),
        (np.zeros((2, 3)), [0, 1], r"\[units, 2\], got float64 \[2, 3\]"),
        (np.zeros(3), [0, 1, 1], r"got float64 \[3\]"),
        (np.zeros((2, 3), complex), [0, 1, 1], "real numbers"),
        ([["a", "b"]], [0, 1], "real numbers"),
        ([[1], [1, 2]], [0, 1], r"scores must be an array, .* got \[\[1\], \[1, 2\]\]"),
        (torch.zeros(2, 2).to_sparse(), [0, 1], "dense tensor .* got a torch.sparse_coo tensor"),
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), [0, 1], "tensor of torch.float8_e4m3fn"),
    ],
)
def test_other_scores_and_labels_are_refused(scores, labels, message):
    with pytest.raises(InputError, match=message):
        average_precision_scores(scores, labels)


def test_a_class_without_a_text_is_refused():
    with pytest.raises(InputError, match="class 1 has no text"):
        class_precision_scores(np.zeros((2, 3)), [0, 2, 0], 3)


# Neurons of a model.


def documents(seed, count, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    # Each label has tokens of its own, so that units tell them apart.
    low = 5 + 25 * seed
    return [torch.randint(low, low + 40, (n,), generator=generator).tolist() for n in lengths]


TEXTS = {label: documents(seed, count) for seed, (label, count) in enumerate(
    {"en": 9, "zh": 6, "fr": 7}.items())}  # fmt: skip


def linears(model):
    """Found by their classes, inside the bare model."""
    return {
        path: module
        for path, module in bare_model(model).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not path.endswith("lm_head")
    }


@torch.no_grad()
def means_of(model, ids):
    """Site -> (mean, mean magnitude) of its outputs over the tokens of one text, float64."""
    ids = torch.tensor([ids])
    bare = bare_model(model)
    caught = {path: [] for path in linears(model)}
    hooks = [
        module.register_forward_hook(
            lambda module, given, output, path=path: caught[path].append(
                output.double().reshape(-1, output.shape[-1])
            )
        )
        for path, module in linears(model).items()
    ]
    extra = {}
    if getattr(bare.config, "is_encoder_decoder", False):
        start = torch.full((1, 1), bare.config.decoder_start_token_id)
        extra["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
    bare(input_ids=ids, use_cache=False, **extra)
    for hook in hooks:
        hook.remove()
    outputs = {path: torch.cat(rows) for path, rows in caught.items()}
    return {path: (rows.mean(0), rows.abs().mean(0)) for path, rows in outputs.items()}


def kept(directory):
    """The means that were kept, and label and number of each text."""
    about = json.loads((directory / "texts.json").read_text("utf-8"))
    return np.load(directory / "text_means.npy"), about["texts"], about["sites"]


def find(model, directory=None, texts=TEXTS, top=20, bottom=10, **options):
    return average_precision(
        model, None, texts, top, bottom, progress=False, directory=directory,
        **{"seq_len": 32, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        *((name, 4) for name in ("llama", "phi3", "gpt2", "opt", "bart", "xlm-roberta")),
        # T5's attention is in float32 whatever the model's dtype, so padding changes it a little.
        *((name, 1) for name in ("llama", "gpt2", "t5-v1.1")),
    ],
)
def test_means_are_over_the_tokens_of_each_text(name, batch_size, tmp_path):
    # In float64, in which a batch and its padding change nothing that float32 could hold.
    model = shared(name, torch.float64)
    before = plain.attributes(model)
    find(model, tmp_path / "means", batch_size=batch_size)
    plain.assert_untouched(before, model)
    means, texts, sites = kept(tmp_path / "means")
    assert means.dtype == np.float32
    assert sorted(map(tuple, texts)) == sorted(
        (label, number) for label, of_label in TEXTS.items() for number in range(len(of_label))
    )
    for row, (label, number) in zip(means, texts, strict=True):
        ids = TEXTS[label][number]
        expected = means_of(model, ids)
        assert list(sites) == list(expected)
        mean, magnitude = (torch.cat(parts) for parts in zip(*expected.values(), strict=True))
        # Each output is rounded to float32, and n of them are added in it and divided: fewer than
        # n + 2 roundings of 2^-24 of the magnitudes' sum. For n of them, that is for the mean too.
        slack = (len(ids) + 2) * 2.0**-24 * magnitude
        assert ((torch.from_numpy(row).double() - mean).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-v1.1"])
def test_the_highest_and_lowest_of_the_whole_model_are_a_labels(name, dtype, tmp_path):
    model = shared(name, dtype)
    found = find(model, tmp_path / "means")
    means, texts, sites = kept(tmp_path / "means")
    units = [(site, index) for site, width in sites.items() for index in range(width)]
    assert found.labels == list(TEXTS)
    assert found.sites == list(sites) == list(linears(model))
    assert found.widths == sites
    assert found.fingerprint == models.fingerprint(model)
    for label in TEXTS:
        positive = [own == label for own, _ in texts]
        scores = torch.cat([*found.scores(label).values()])
        assert_as_defined(means.T, positive, scores)
        numbers = list(enumerate(scores.tolist()))
        highest = sorted(numbers, key=lambda one: (-one[1], one[0]))[:20]
        others = [one for one in numbers if one not in highest]
        lowest = sorted(others, key=lambda one: (one[1], one[0]))[:10]
        for sets, chosen in ((found.top, highest), (found.bottom, lowest)):
            assert chosen_units(sets[label]) == sorted(units[i] for i, _ in chosen)
        assert chosen_units(found[label]) == sorted(units[i] for i, _ in highest + lowest)


def chosen_units(neurons):
    return sorted((site, index) for site, found in neurons.items() for index in found.tolist())


def test_ties_go_by_site_and_index_and_no_unit_is_taken_twice():
    model = by_name("llama").build()
    with torch.no_grad():  # all units alike
        for module in linears(model).values():
            module.weight.zero_()
    found = find(model, top=40, bottom=30)
    first, second = list(found.sites)[:2]
    assert set(torch.cat([*found.scores("en").values()]).tolist()) == {9 / 22}
    assert {site: i.tolist() for site, i in found.top["en"].items() if len(i)} == {
        first: list(range(32)),
        second: list(range(8)),
    }
    assert found.bottom["en"][second].tolist() == list(range(8, 16))  # of 16: two key heads of 8
    assert found.bottom["en"].total == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_medians_are_of_the_labels_own_texts(dtype, tmp_path):
    found = find(shared("llama", dtype), tmp_path / "means")
    means, texts, sites = kept(tmp_path / "means")
    offset = 0
    for site, width in sites.items():
        for label, of_label in TEXTS.items():  # 9, 6 and 7 of them
            own = [row for row, (one, _) in zip(means, texts, strict=True) if one == label]
            medians = found.medians(label)[site]
            assert medians.shape == (width,)
            chosen = found[label][site].tolist()
            for index, median in enumerate(medians.tolist()):
                if index in chosen:
                    values = sorted(float(row[offset + index]) for row in own)
                    half = len(of_label) // 2
                    middle = values[half : half + 1] if len(values) % 2 else values[half - 1 :][:2]
                    assert median == sum(middle) / len(middle)
                else:
                    assert np.isnan(median)
        offset += width


def test_medians_make_an_edit_of_the_labels_units_and_of_no_others():
    found = find(shared("llama"))
    edit = lf.activate(found["zh"], found.medians("zh"))
    assert edit.total == 30
    for site, (units, scale, shift) in edit.tables.items():
        assert torch.equal(units, found["zh"][site])
        assert not scale.any()
        assert torch.equal(shift, found.medians("zh")[site][units].float())
    with pytest.raises(InputError, match="finite"):
        lf.activate(found["en"], found.medians("zh"))


def test_longer_texts_are_dropped_and_counted(tmp_path, caplog):
    texts = {label: [[7] * 9, *of_label, [8] * 8] for label, of_label in TEXTS.items()}
    short = {label: [one for one in all_ if len(one) <= 8] for label, all_ in texts.items()}
    with caplog.at_level(logging.WARNING):
        found = find(shared("llama"), tmp_path / "means", texts, seq_len=8)
    kept_texts = kept(tmp_path / "means")[1]
    for entry in found.metadata["corpora"]:
        label = entry["label"]
        dropped = len(texts[label]) - len(short[label])
        assert (entry["documents"], entry["longer"]) == (len(texts[label]), dropped)
        note = f"label {label!r}: {dropped} of {len(texts[label])} texts have over 8 tokens"
        assert any(note in one for one in found.metadata["notes"])
        assert note in caplog.text
        assert sorted(number for own, number in kept_texts if own == label) == [
            number for number, ids in enumerate(texts[label]) if len(ids) <= 8
        ]


def test_so_many_documents_are_read_of_each_label(tmp_path):
    find(shared("llama"), tmp_path / "means", max_documents=4)
    assert len(kept(tmp_path / "means")[1]) == 12


def test_special_tokens_count_unless_turned_off(tmp_path):
    tokenizer = train_tokenizer(["a b c", "d e f"], 300)
    assert len(tokenizer("a").input_ids) == 2
    model = by_name("llama").build()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    texts = {"x": ["a b", "a"], "y": ["d e", "f"]}
    for special in (True, False):
        directory = tmp_path / str(special)
        average_precision(
            model, tokenizer, texts, 2, 2, seq_len=32, batch_size=1, progress=False,
            directory=directory, special_tokens=special,
        )  # fmt: skip
        means, rows, _ = kept(directory)
        for row, (label, number) in zip(means, rows, strict=True):
            ids = tokenizer(texts[label][number], add_special_tokens=special).input_ids
            expected = torch.cat([mean for mean, _ in means_of(model, ids).values()])
            magnitude = torch.cat([size for _, size in means_of(model, ids).values()])
            slack = (len(ids) + 2) * 2.0**-24 * magnitude  # as above
            assert ((torch.from_numpy(row).double() - expected).abs() <= slack).all()


def test_fewer_units_than_asked_for_are_all_taken_with_a_note(caplog):
    model = shared("llama")
    units = sum(module.out_features for module in linears(model).values())
    with caplog.at_level(logging.WARNING):
        found = find(model, top=3 * units, bottom=units)
    (note,) = found.metadata["notes"]
    assert note == f"{4 * units} units were asked for, but the model has only {units}"
    assert note in caplog.text
    assert found.top["en"].total == units * 3 // 4
    assert found["en"].total == units


def test_what_was_done_is_told():
    found = find(shared("llama"), batch_size=3)
    told = found.metadata
    assert told["method"] == "average-precision"
    assert told["parameters"] == {"top": 20, "bottom": 10}
    assert (told["seq_len"], told["longer"], told["batch_size"]) == (32, "drop", 3)
    assert (told["notes"], told["dtype"]) == ([], "float32")
    assert json.loads(json.dumps(told)) == told


def test_nothing_stays_on_disk_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find(shared("llama"))
    assert list(tmp_path.iterdir()) == []
    model = by_name("llama").build()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    for directory in (None, tmp_path / "means"):
        with pytest.raises(InputError, match=r"layers.1.mlp.down_proj: .* label 'en' .* finite"):
            find(model, directory)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_the_pass(monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    model = by_name("llama").build()
    model.model.forward = None  # not reached
    with pytest.raises(InputError, match="GiB free; make room"):
        find(model)


@pytest.mark.parametrize("kept", [True, False])
def test_a_file_that_cannot_grow_is_told(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write the means of texts to .*too large"):
            find(shared("llama"), tmp_path / "means" if kept else None, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    usage, calls = shutil.disk_usage("."), []

    def filling(path):
        calls.append(path)
        return usage if len(calls) < 3 else usage._replace(free=0)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = by_name("t5-v1.1").build().train()
    before = plain.attributes(model)
    with pytest.raises(InputError, match="only 0.0 GiB free") as raised:
        find(model, batch_size=2)
    plain.assert_untouched(before, model)
    assert raised.value.__traceback__ is not None  # it holds on to what it passed through
    assert model.training
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="exists already"):
        find(shared("llama"), tmp_path)


def test_a_file_keeps_everything(tmp_path):
    found = find(shared("llama"))
    path = tmp_path / "found.safetensors"
    found.save(path)
    loaded = AveragePrecisionNeurons.load(path)
    assert (loaded.layout, loaded.metadata) == (found.layout, found.metadata)
    assert loaded.labels == found.labels
    assert [loaded.top.metadata["part"], loaded.bottom.metadata["part"]] == ["top", "bottom"]
    for label in found:
        assert loaded[label] == found[label]
        assert loaded.top[label] == found.top[label]
        assert loaded.bottom[label] == found.bottom[label]
        for values in ("scores", "medians"):
            for site, value in getattr(found, values)(label).items():
                other = getattr(loaded, values)(label)[site]
                assert np.array_equal(value, other, equal_nan=True)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    one = AveragePrecisionNeurons.load(path, labels=["zh"])
    assert one.labels == ["zh"]
    assert one["zh"] == found["zh"]
    with pytest.raises(InputError, match="no label 'xx'"):
        AveragePrecisionNeurons.load(path, labels=["xx"])


def test_the_sets_alone_are_written_as_json(tmp_path):
    found = find(shared("llama"))
    found.save(tmp_path / "found.json")
    loaded = NeuronSets.load(tmp_path / "found.json")
    assert loaded.metadata == found.metadata
    assert all(loaded[label] == found[label] for label in found)


def test_damaged_and_other_files_are_refused(tmp_path):
    found = find(shared("llama"))
    path = tmp_path / "found.safetensors"
    found.save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cannot load .*checksum"):
        AveragePrecisionNeurons.load(path)
    with pytest.raises(InputError, match="cannot load"):
        AveragePrecisionNeurons.load(tmp_path / "none.safetensors")
    found.save(tmp_path / "found.json")
    with pytest.raises(InputError, match="not an average-precision file"):
        AveragePrecisionNeurons.load(tmp_path / "found.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": torch.zeros(2, 5)}, r"scores must be float64 .* \[2, 5\]"),
        ({"scores": torch.zeros(2, 4).double()}, r"scores must be float64 .* \[2, 5\]"),
        ({"chosen": torch.zeros(2, 3)}, "chosen must be int64"),
        ({"chosen": torch.tensor([[0, 1, 2], [0, 1, 5]])}, "units from 0 to 4"),
        ({"chosen": torch.tensor([[0, 1, 2], [0, 1, -1]])}, "units from 0 to 4"),
        ({"medians": torch.zeros(2, 2).double()}, "medians must be float64"),
    ],
)
def test_results_of_other_shapes_are_refused(changed, message):
    layout = lf.neurons.Layout(("a", "b"), {"a": 3, "b": 2})
    given = {
        "scores": torch.rand(2, 5).double(),
        "chosen": torch.tensor([[4, 0, 2], [1, 2, 3]]),
        "medians": torch.rand(2, 3).double(),
    }
    found = AveragePrecisionNeurons(["x", "y"], layout, **given, top_count=1)
    assert found.top["x"]["b"].tolist() == [1]
    assert found["x"]["a"].tolist() == [0, 2]
    with pytest.raises(InputError, match=message):
        AveragePrecisionNeurons(["x", "y"], layout, **{**given, **changed}, top_count=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": {"en": TEXTS["en"]}}, "at least two labels, got 'en'"),
        ({"texts": {}}, "at least two labels, got none"),
        ({"texts": TEXTS["en"]}, "a dict from label to texts"),
        ({"texts": {"en": TEXTS["en"], "zh": [[5] * 40]}}, "label 'zh' has no document"),
        ({"top": -1}, "top must be an integer of at least 0, got -1"),
        ({"bottom": 2.0}, "bottom must be an integer"),
        ({"top": 0, "bottom": 0}, "both 0"),
        ({"seq_len": 256}, "over the model's limit of 64"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_other_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        find(shared("llama"), **options)


def test_a_layer_that_does_not_run_is_named():
    model = by_name("llama").build()
    model.model.layers[0].spare = nn.Linear(3, 5)
    with pytest.raises(InputError, match="layers.0.spare did not run"):
        find(model)


def test_a_layer_whose_outputs_are_not_one_per_token_is_named():
    model = by_name("llama").build()
    layer = model.model.layers[0]
    layer.pooler = nn.Linear(32, 5)

    def pool(module, given, output):
        module.pooler(given[0][:, :1])

    layer.register_forward_hook(pool)
    with pytest.raises(InputError, match=r"layers.0.pooler must give one output per token"):
        find(model)
