from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "the of language neurons über été naïve año 语言 模型 神经元 の言語 tiếng Việt bahasa "
    "12.5 km² e=mc² don't 🙂 👩‍👩‍👧 (brackets) https://example.org/a?b=c\tindent"
).split(" ")


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 40 words, in many scripts, some with separators that end no line."""
    draw = random.Random(seed)
    documents = []
    for index in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))
        documents.append(text + "\u2028next\x85and\x0cmore" if index % 7 == 3 else text)
    return documents


@pytest.fixture(scope="session", name="make_documents")
def make_documents_fixture() -> Callable[..., list[str]]:
    return make_documents


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def vocabulary() -> Tokenizer:
    """A byte-level BPE tokenizer that puts <s> before and </s> after each document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_documents(400, seed=1), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
            ),
        ]
    )
    return tokenizer


@pytest.fixture
def tokenizer(vocabulary: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", model_max_length=16
    )
