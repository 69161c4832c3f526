"""Documents as padded batches: each whole, in its place, and none lost."""

from __future__ import annotations

import pytest
import torch
from families import by_name

from lapefast.corpus import Corpus
from lapefast.errors import InputError
from lapefast.profiling.documents import DocumentPass


def documents(seed, count, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]


CORPORA = {"en": documents(0, 23), "zh": documents(1, 9)}


def read(text, label):
    """Number -> the document's ids, from the batches."""
    found = {}
    for batch in text.batches(label):
        ids, mask = batch.inputs["input_ids"], batch.mask
        assert ids.shape == mask.shape
        assert len(batch.numbers) <= text.batch_size
        if "attention_mask" in batch.inputs:
            assert torch.equal(batch.inputs["attention_mask"].bool(), mask)
        else:
            assert bool(mask.all())
        for row, number in enumerate(batch.numbers):
            assert bool((mask[row].int().diff() <= 0).all())  # padding stands on the right
            assert number not in found
            found[number] = ids[row, : batch.lengths[row]].tolist()
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_every_document_comes_once_and_whole(batch_size):
    text = DocumentPass(
        by_name("llama").build(), CORPORA, None, batch_size=batch_size, progress=False
    )
    assert text.labels == ["en", "zh"]
    for label, given in CORPORA.items():
        assert read(text, label) == dict(enumerate(given))
    assert [one["documents"] for one in text.metadata()["corpora"]] == [23, 9]


def test_longer_documents_are_cut_or_dropped_and_counted():
    model = by_name("llama").build()
    longer = sum(len(ids) > 6 for ids in CORPORA["en"])
    assert 0 < longer < len(CORPORA["en"])
    cut = DocumentPass(model, CORPORA, None, 6, batch_size=4, progress=False)
    assert read(cut, "en") == {n: ids[:6] for n, ids in enumerate(CORPORA["en"])}
    drop = DocumentPass(model, CORPORA, None, 6, "drop", batch_size=4, progress=False)
    kept = {n: ids for n, ids in enumerate(CORPORA["en"]) if len(ids) <= 6}
    assert read(drop, "en") == kept
    for text in (cut, drop):
        assert text.metadata()["corpora"][0]["longer"] == longer
    with pytest.raises(InputError, match="no document of at most 1 tokens"):
        list(
            DocumentPass(model, {"en": [[1, 2, 3]]}, None, 1, "drop", progress=False).batches("en")
        )


def test_only_so_many_are_read():
    text = DocumentPass(
        by_name("llama").build(), CORPORA, None, max_documents=4, batch_size=3, progress=False
    )
    assert read(text, "en") == dict(enumerate(CORPORA["en"][:4]))


@pytest.mark.parametrize(("most", "empty"), [(None, 4), (3, 3), (2, 1), (1, 1)])
def test_empty_texts_before_the_last_document_are_counted(most, empty):
    ids = [[], [3, 4], [5], [], [], [6], []]
    text = DocumentPass(
        by_name("llama").build(), {"en": ids}, None, max_documents=most, progress=False
    )
    places = {place: tokens for place, tokens in enumerate(ids) if tokens}
    assert read(text, "en") == dict(list(places.items())[:most])
    assert text.metadata()["corpora"][0]["empty"] == empty


def test_a_batch_is_split_into_its_documents():
    text = DocumentPass(by_name("t5-v1.1").build(), CORPORA, None, batch_size=4, progress=False)
    for batch in text.batches("en"):
        for row, one in enumerate(batch.split()):
            number = batch.numbers[row]
            assert one.numbers == [number]
            assert one.inputs["input_ids"].tolist() == [CORPORA["en"][number]]
            assert one.inputs["decoder_input_ids"].shape == one.inputs["input_ids"].shape
            assert bool(one.mask.all())


def test_texts_are_tokenised_one_by_one_even_where_they_are_long(tmp_path):
    from lapefast import demo

    made = demo.load(progress=False)
    lines = (made.valid["en"]).read_text().splitlines()[:40]
    whole = " ".join(lines * 40)  # longer than the tokeniser's window
    path = tmp_path / "en.txt"
    path.write_text("\n".join([*lines, "", whole, lines[0]]))
    found = [one.tolist() for one in Corpus("en", path, made.tokenizer).documents()]
    expected = [made.tokenizer(line)["input_ids"] for line in (*lines, whole, lines[0])]
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_documents": 0}, "max_documents must be"),
        ({"seq_len": 0}, "seq_len must be"),
        ({"seq_len": 1 << 20}, "over the model's limit"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DocumentPass(by_name("llama").build(), CORPORA, None, progress=False, **options)
