"""The demo model: a small Llama, and the byte-level BPE tokenizer it reads with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["Recipe", "train_model", "train_tokenizer"]

_BEGIN, _END = "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """All that decides what the demo model becomes, on one machine and one set of versions.

    Its figures were chosen so that training takes about a minute on two cores and each language's
    neurons matter plainly more to it than to the others. Weights begin wider than transformers'
    0.02, with which so narrow a model's gates stay near zero, where SiLU is nearly linear and a
    neuron hardly off for any language.
    """

    documents: int = 6000
    valid_documents: int = 100
    vocabulary: int = 2048
    width: int = 96
    neurons: int = 1024
    layers: int = 4
    heads: int = 4
    initializer_range: float = 0.05
    context: int = 512
    seq_len: int = 128
    batch_size: int = 7
    steps: int = 500
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    seed: int = 0
    threads: int = 2


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE tokenizer; like Llama's it puts <s> before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, tokenizer.token_to_id(_BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_BEGIN, eos_token=_END, pad_token=_END
    )


def train_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    texts: Mapping[str, Sequence[str]],
    progress: bool = True,
) -> LlamaForCausalLM:
    """Trains the model on rows of each language's text, the languages taking turns."""
    rows = [_rows(tokenizer, documents, recipe.seq_len) for documents in texts.values()]
    with _seeded(recipe.seed, recipe.threads):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=recipe.vocabulary,
                hidden_size=recipe.width,
                intermediate_size=recipe.neurons,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.heads,
                initializer_range=recipe.initializer_range,
                max_position_embeddings=recipe.context,
                tie_word_embeddings=False,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        optimizer = torch.optim.AdamW(
            model.parameters(),
            recipe.learning_rate,
            (0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
        )
        model.train()
        turn = 0
        with tqdm(range(recipe.steps), "training", unit="step", disable=not progress) as bar:
            for step in bar:
                batch = []
                for _ in range(recipe.batch_size):
                    choice = rows[turn % len(rows)]
                    batch.append(choice[torch.randint(len(choice), ())])
                    turn += 1
                ids = torch.stack(batch)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval()


def _rows(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int
) -> torch.Tensor:
    ids = [token for text in tokenizer(list(documents)).input_ids for token in text]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@contextmanager
def _seeded(seed: int, threads: int):
    """Random numbers and threads as the recipe says; the caller's are given back."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
