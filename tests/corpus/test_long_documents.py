"""A document larger than a window gives the tokens of the whole, without being held."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lapefast.corpus import Corpus
from lapefast.corpus.pieces import PIECE, Piece, content_pieces
from lapefast.corpus.tokens import Tokenisation


def windowed(tokenizer: Any, text: str, piece: int, special_tokens: bool = True) -> list[int]:
    pieces = [
        Piece(text[i : i + piece], i + piece >= len(text)) for i in range(0, len(text), piece)
    ]
    tokenisation = Tokenisation(tokenizer, special_tokens, window=400, context=40)
    batches = list(tokenisation.tokens(iter(pieces)))
    assert sum(len(batch.starts) for batch in batches) == 1
    assert all(len(batch.ids) <= 400 * 4 for batch in batches)
    return [token for batch in batches for token in batch.ids.tolist()]


@pytest.mark.parametrize("special_tokens", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 399, 400, 401, 10**9])
def test_windows_give_the_tokens_of_the_whole(
    piece: int, special_tokens: bool, tokenizer: Any, make_documents: Any
) -> None:
    for seed, length in enumerate([399, 400, 401, 679, 680, 681, 1500, 5000]):
        text = " ".join(make_documents(300, seed))[:length]
        expected = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        assert windowed(tokenizer, text, piece, special_tokens) == expected


def sentencepiece_like(texts: list[str]) -> Tokenizer:
    """As Llama 2: no words, blanks are letters, one is put before the text, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=60,
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_template(tokenizer, "<s> $A", "<s>")


def unigram(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_template(tokenizer, "$A </s>", "</s>")


def word_piece(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=special, limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_template(tokenizer, "[CLS] $A", "[CLS]")


def with_template(tokenizer: Tokenizer, template: str, token: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece_like, unigram, word_piece])
def test_windows_do_for_every_kind_of_tokenizer(make: Any, make_documents: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(make_documents(400, 1)))
    for seed in range(5):
        text = " ".join(make_documents(300, seed))[: 4000 + seed]
        assert windowed(tokenizer, text, 400) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "text",
    ["a" * 3000, "語" * 3000, " " * 1500 + "end", "word" + " " * 1800, "a b " * 10 + "-" * 2000],
    ids=["one letter", "one ideograph", "leading blanks", "trailing blanks", "a ruler"],
)
def test_monotonous_text_loses_nothing(text: str, tokenizer: Any) -> None:
    ids = windowed(tokenizer, text, 64, special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_tokenizer_that_drops_blanks_passes_over_long_ones() -> None:
    words = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["one two"], trainers.WordLevelTrainer(special_tokens=["?"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    text = "one two " * 90 + " " * 2000 + "two one " * 90 + "\t" * 500
    assert windowed(tokenizer, text, 100) == tokenizer(text)["input_ids"]


def test_a_slow_tokenizer_gets_the_document_whole(tokenizer: Any, make_documents: Any) -> None:
    class Slow:
        is_fast = False

        def __call__(self, texts: list[str], **options: Any) -> Any:
            options.pop("verbose")
            return tokenizer(texts, verbose=False, **options)

    text = " ".join(make_documents(50))
    batches = Tokenisation(Slow(), True, window=400, context=40).tokens(
        iter([Piece(text[:1000], False), Piece(text[1000:], True)])
    )
    assert [i for b in batches for i in b.ids.tolist()] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("document", ["line", "file"])
def test_a_file_of_one_huge_line_between_others(
    document: str, tokenizer: Any, tmp_path: Path, make_documents: Any
) -> None:
    draw = random.Random(0)
    sample = make_documents(500)
    huge = " ".join(draw.choice(sample) for _ in range(6000))
    assert len(huge) > 2 * PIECE
    texts = ["first one", huge, "last one"]
    path = tmp_path / "t.txt"
    path.write_text("".join(text + "\n" for text in texts), "utf-8", newline="\n")
    documents = texts if document == "line" else [path.read_bytes().decode()]
    stream = [i for text in documents for i in tokenizer(text, verbose=False)["input_ids"]]
    for source in (str(path), documents) if document == "line" else (str(path),):
        corpus = Corpus("en", source, tokenizer, document=document)
        rows = torch.cat(list(corpus.rows(100)))
        assert rows.flatten().tolist() == stream[: rows.numel()]
        assert corpus.report.dropped == len(stream) - rows.numel() < 100
        assert corpus.report.documents == len(documents)


def test_no_piece_of_a_text_is_longer_than_a_piece() -> None:
    text = "ab" * PIECE + "c"
    pieces = list(content_pieces(text, "text", prefer_ids=False))
    assert "".join(str(piece.content) for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False, False, True]
    assert all(len(piece.content) <= PIECE for piece in pieces)
