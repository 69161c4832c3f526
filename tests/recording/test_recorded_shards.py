from __future__ import annotations

import plain
import pytest
import torch
from families import IDS, VOCABULARY, by_name, shared

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models.groups import shard_groups
from lapefast.profiles import SHARDS

LABELS = ["en", "zh"]
STATISTICS = ("counts", "sums", "shard_counts")
ROWS = torch.arange(21 * 6).reshape(21, 6) * 31 % (VOCABULARY - 10) + 5


@torch.no_grad()
def expected(name, model, batches):
    """Site -> [labels, shards, width] by plain hooks; batches: (ids, groups, number of each row).

    Numbers are [batch, labels]: a row may be of several labels.
    """
    family = by_name(name)
    total = {}
    for ids, groups, numbers in batches:
        with plain.hooked(family.activations(model)) as seen:
            family.call(model, ids)
        shards = torch.where(
            groups >= 0, groups * SHARDS + numbers.gather(1, groups.clamp(min=0)) % SHARDS, -1
        )
        for site, calls in seen.items():
            counted = plain.counts(calls, shards, len(LABELS) * SHARDS)
            total[site] = total.get(site, 0) + counted
    return {site: of.view(len(LABELS), SHARDS, -1) for site, of in total.items()}


def assert_shards(profile, total):
    for site, counted in total.items():
        assert torch.equal(profile.shard_counts[site].long(), counted), site
        assert torch.equal(profile.counts[site], counted.sum(1)), site


def of_label(label, ids, first):
    """A batch of one label, its rows numbered from `first`."""
    numbers = (first + torch.arange(len(ids)))[:, None].expand(-1, len(LABELS))
    return ids, torch.full_like(ids, LABELS.index(label)), numbers


@pytest.mark.parametrize("name", ["llama", "gpt2", "bitnet"])
@torch.no_grad()
def test_rows_of_each_label_are_dealt_in_turn_from_batch_to_batch(name):
    model = shared(name, torch.bfloat16)
    batches = [
        of_label("zh", ROWS[:3], 0),
        of_label("en", ROWS[3:9], 0),
        of_label("zh", ROWS[9:16, :4], 3),  # shorter rows
        of_label("en", ROWS[16:], 6),
    ]
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        for ids, groups, _ in batches:
            recorder.set(label=LABELS[int(groups[0, 0])])
            by_name(name).call(model, ids)
    profile = recorder.profile()
    assert list(profile.statistics) == list(STATISTICS)
    assert_shards(profile, expected(name, model, batches))
    # Rows of en: 11 of 6 tokens; of zh: 3 of 6, then 7 of 4.
    assert profile.shard_tokens["decoder"].tolist() == [
        [12, 12, 12, 6, 6, 6, 6, 6],
        [10, 10, 6, 4, 4, 4, 4, 4],
    ]
    assert profile.tokens.tolist() == [66, 46]


@torch.no_grad()
def test_what_is_recorded_beside_shards_is_what_is_recorded_without():
    model = shared("gpt2", torch.bfloat16)  # a plain FFN, whose products are its activations
    found = []
    for statistics in (("counts", "sums", "square_sums"), ("shard_counts", "sums", "square_sums")):
        with lf.record(model, LABELS, statistics=statistics) as recorder:
            recorder.set(label="zh")
            model(IDS)
        found.append(recorder.profile())
    without, beside = found
    assert set(beside.statistics) == {"counts", "sums", "square_sums", "shard_counts"}
    for site in without.sites:
        assert torch.equal(beside.counts[site], without.counts[site])
        # Shards add the 24 tokens in other runs of float32, with at most 24 roundings either way
        # (and one of the square) of at most the sum of absolute values.
        squares = without.square_sums[site]
        rounding = 2 * 25 * 2.0**-24
        for name, bound in (("sums", (24 * squares).sqrt()), ("square_sums", squares)):
            a, b = beside.statistics[name][site], without.statistics[name][site]
            assert bool(((a - b).abs() <= rounding * bound).all())


@torch.no_grad()
def test_a_rows_number_alone_decides_its_shard_whoever_runs_it():
    model = shared("llama", torch.bfloat16)
    whole = lf.profile(model, {"en": ROWS, "zh": ROWS[:9]}, batch_size=4, progress=False,
                       statistics=STATISTICS)  # fmt: skip
    bare, parts = models.bare_model(model), []
    # The same batches by two recorders, the later rows first.
    for share in ((5, 3, 1), (0, 2, 4)):
        with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
            for label, rows in (("en", ROWS), ("zh", ROWS[:9])):
                batches = list(enumerate(rows.split(4)))
                for number, batch in (batches[one] for one in share if one < len(batches)):
                    recorder.set(label=label, first_row=4 * number)
                    bare(batch)
        parts.append(recorder.profile())
    merged = parts[0] + parts[1]
    assert merged.tokens.tolist() == whole.tokens.tolist()
    assert torch.equal(merged.shard_tokens["decoder"], whole.shard_tokens["decoder"])
    for site in whole.sites:
        assert torch.equal(merged.shard_counts[site], whole.shard_counts[site])


@torch.no_grad()
def test_mixed_labels_and_padding_deal_each_labels_own_rows():
    model = shared("llama", torch.bfloat16)
    groups = torch.tensor([[0, 1, -1, 0, 1, 1], [-1] * 6, [1] * 6, [0] * 5 + [-1]])
    # Of en the first and the fourth row, of zh the first and the third; the second is nobody's.
    numbers = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 0]])
    second = torch.where(groups >= 0, 1 - groups, -1)
    after = torch.tensor([[2, 2], [0, 0], [3, 0], [0, 3]])
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        recorder.set(groups=groups)
        model(ROWS[:4])
        recorder.set(groups=second)
        model(ROWS[4:8])
    batches = [(ROWS[:4], groups, numbers), (ROWS[4:8], second, after)]
    assert_shards(recorder.profile(), expected("llama", model, batches))


@torch.no_grad()
def test_rows_go_on_from_pass_to_pass_without_being_set_anew():
    model = shared("llama", torch.bfloat16)
    batches = [of_label("en", ROWS[at : at + 3], at) for at in range(0, 21, 3)]
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        recorder.set(label="en")
        for ids, _, _ in batches:
            model(ids)  # each of which fills a cache of its own
    assert_shards(recorder.profile(), expected("llama", model, batches))


@torch.no_grad()
def test_a_row_that_is_generated_stays_in_its_shard():
    model = shared("llama")
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        for _ in range(2):
            recorder.set(label="en")
            model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    # Three rows a time, of 8 tokens and the two new ones that are fed back.
    assert recorder.profile().shard_tokens["decoder"][0].tolist() == [10] * 6 + [0, 0]


@torch.no_grad()
def test_each_stack_of_an_encoder_decoder_deals_its_rows():
    family, model = by_name("t5"), shared("t5", torch.bfloat16)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        for _ in range(3):
            recorder.set(label="zh", mask=mask, decoder_mask=torch.ones(3, 5))
            family.call(model, attention_mask=mask)
    shards = recorder.profile().shard_tokens
    assert shards["encoder"][1].tolist() == [13, 8, 8, 5, 8, 8, 5, 8]
    assert shards["decoder"][1].tolist() == [10] + [5] * 7


@torch.no_grad()
def test_drained_shards_add_up_to_the_drained_counts():
    model = shared("llama")
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        recorder.set(label="en")
        model(IDS)
        first = recorder.drain()
        recorder.set(label="en")
        model(IDS)
        second = recorder.drain()
    for site, statistics in first.items():
        assert statistics["counts"].shape == (2, 52)
        shards = statistics["shard_counts"]
        assert torch.equal(shards.sum(1), statistics["counts"])
        # Three rows a time: the second time they are the next ones.
        assert torch.equal(second[site]["shard_counts"][:, 3:6], shards[:, :3])
        assert bool(shards[0, :3].any())


@torch.no_grad()
def test_a_compiled_model_counts_the_same_shards():
    torch._dynamo.reset()
    model = by_name("llama").build(torch.bfloat16)
    batches = [of_label("en", ROWS[:5], 0), of_label("en", ROWS[5:10], 5)]
    compiled = torch.compile(model, backend="eager")
    with lf.record(compiled, LABELS, statistics=STATISTICS) as recorder:
        for ids, _, _ in batches:
            recorder.set(label="en")
            compiled(ids, use_cache=False)
    assert_shards(recorder.profile(), expected("llama", model, batches))


@torch.no_grad()
def test_counts_that_int32_can_not_say_are_refused():
    with lf.record(shared("llama"), LABELS, statistics=STATISTICS) as recorder:
        recorder.set(label="en")
        shared("llama")(IDS)
        for statistics in recorder._statistics.values():
            statistics.counts[1] = 2**31
        with pytest.raises(InputError, match="active at 2147483648 tokens of one shard"):
            recorder.profile()


@pytest.mark.parametrize(
    "given", [{"groups": torch.zeros_like(IDS), "first_row": 1}, {"label": "en", "first_row": -1}]
)
def test_a_row_number_needs_a_label_and_is_not_negative(given):
    with lf.record(shared("llama"), LABELS, statistics=STATISTICS) as recorder:
        with pytest.raises(InputError, match="first_row must be the number, from 0"):
            recorder.set(**given)


@torch.no_grad()
def test_a_model_that_runs_before_anything_was_set_is_told_with_shards_too():
    with lf.record(shared("llama"), LABELS, statistics=STATISTICS):
        with pytest.raises(InputError, match="call recorder.set"):
            shared("llama")(IDS)


def test_groups_and_the_numbers_to_go_on_with():
    groups = torch.tensor([[0, 1], [-1, -1], [1, 1]])
    index, after = shard_groups(groups, torch.tensor([7, 9]), 8)
    assert index.dtype == torch.int32
    assert index.tolist() == [[7, 8 + 1], [-1, -1], [8 + 2, 8 + 2]]
    assert after.tolist() == [8, 11]
