"""An edit per sequence, in every mode of `generate`, against hooks that know the rows by hand."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import peft
import plain
import pytest
import torch
import transformers
from families import IDS, VERSION_4, VOCABULARY, by_name, shared
from torch import Tensor

import lapefast as lf
from lapefast.errors import InputError

WIDTH = 52
OPTIONS = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def edits_of(family) -> list:
    """Four edits that differ much: of the first, one is None."""
    sites = list(family.sites)
    return [
        lf.deactivate(dict.fromkeys(sites, range(0, WIDTH, 2))),
        None,
        lf.activate(dict.fromkeys(sites, range(1, WIDTH, 3)), 25.0)
        | lf.scale({sites[-1]: [0, 2, 4]}, -30.0),
    ]


def apply(edit, site: str, rows: Tensor) -> Tensor:
    """What an edit means, written down independently of the ops."""
    if edit is None or site not in edit.tables:
        return rows
    neurons, scale, shift = edit.tables[site]
    chosen = rows[..., neurons].float()
    moved = torch.where(scale == 0, shift, scale * chosen + shift)
    rows = rows.clone()
    rows[..., neurons] = moved.to(rows.dtype)
    return rows


@contextlib.contextmanager
def by_hand(family, model, edits, prompt=True, generated=True, length=IDS.shape[1]):
    """Hooks that edit sequence r by ``edits[r // (sequences / edits)]``.

    Positions are counted by the hooks themselves: each site's calls go on where the last ended,
    unless a call is longer than one position, which starts a sequence.
    """

    def change(site: str, output: Tensor) -> Tensor:
        rows = output.reshape(-1, output.shape[-2], WIDTH) if output.dim() == 3 else output
        each = len(rows) // len(edits)
        fresh = rows.shape[1] > 1
        kept = torch.tensor([prompt and fresh or generated and not fresh] * rows.shape[1])
        return torch.stack(
            [
                torch.where(kept[:, None], apply(edits[r // each], site, row), row)
                for r, row in enumerate(rows)
            ]
        )

    with plain.hooked(family.activations(model), change):
        yield


@pytest.fixture(params=["llama", "phi3", "gemma", "gpt2", "falcon-h1"])
def family(request):
    return by_name(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_each_sequence_has_its_own_edit(family, dtype):
    model, edits = shared(family.name, dtype), edits_of(family)
    before = plain.attributes(model)
    with by_hand(family, model, edits):
        expected = model(IDS)
    with lf.steer(model, edits):
        assert plain.same(model(IDS), expected)
        assert plain.same(model(input_ids=IDS), expected)
    assert not plain.same(model(IDS), expected)
    plain.assert_untouched(before, model)


@torch.no_grad()
def test_an_edit_in_a_list_equals_the_same_edit_for_all(family):
    model, edit = shared(family.name), edits_of(family)[2]
    with lf.steer(model, edit):
        expected = model(IDS)
    with lf.steer(model, [edit] * len(IDS)) as steering:
        assert len(steering.edits) == 1  # one table for those who share it
        assert plain.same(model(IDS), expected)


MODES = {
    "greedy": ({"do_sample": False}, 1),
    "sampling": ({"do_sample": True, "top_k": 0}, 1),
    "beams": ({"num_beams": 3}, 3),
    "returned": ({"do_sample": True, "num_return_sequences": 2}, 2),
    "returned beams": ({"num_beams": 4, "num_return_sequences": 2}, 4),
    "static cache": ({"do_sample": False, "cache_implementation": "static"}, 1),
    "no cache": ({"do_sample": False, "use_cache": False}, 1),
}


def generated(model, ids=IDS, **options) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(ids, **OPTIONS, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_generating_in_every_mode_edits_the_sequences_of_each_input(name, mode):
    family, model = by_name(name), shared(name)
    options, _ = MODES[mode]
    edits = edits_of(family)
    plain_text = generated(model, **options)
    with by_hand(family, model, edits):
        expected = generated(model, **options)
    with lf.steer(model, edits):
        assert torch.equal(generated(model, **options), expected)
    assert not torch.equal(plain_text, expected)
    assert torch.equal(generated(model, **options), plain_text)


@pytest.mark.parametrize(
    ("where", "parts"), [("prompt", (True, False)), ("generated", (False, True))]
)
@pytest.mark.parametrize("mode", ["greedy", "beams", "returned", "static cache"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_where_limits_edits_to_given_or_to_new_positions(name, mode, where, parts):
    family, model, edits = by_name(name), shared(name), edits_of(by_name(name))
    options, _ = MODES[mode]
    with by_hand(family, model, edits, *parts):
        expected = generated(model, **options)
    with by_hand(family, model, edits):
        everywhere = generated(model, **options)
    with lf.steer(model, edits, where=where):
        assert torch.equal(generated(model, **options), expected)
    assert not torch.equal(expected, everywhere)


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_one_edit_for_all_takes_any_batch_and_any_place(where):
    family, model = by_name("llama"), shared("llama")
    edit = edits_of(family)[2]
    parts = {"all": (True, True), "prompt": (True, False), "generated": (False, True)}[where]
    with lf.steer(model, edit, where=where):
        found = [generated(model, IDS[:n, :m]) for n, m in ((3, 8), (1, 5), (2, 8), (3, 8))]
    with by_hand(family, model, [edit], *parts):
        expected = [generated(model, IDS[:n, :m]) for n, m in ((3, 8), (1, 5), (2, 8), (3, 8))]
    assert all(map(torch.equal, found, expected))


def test_without_a_cache_the_prompt_stays_the_prompt():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    for where in ("prompt", "generated"):
        with lf.steer(model, edits, where=where):
            with_cache = generated(model, do_sample=False)
            assert torch.equal(generated(model, do_sample=False, use_cache=False), with_cache)


def test_left_padding_shifts_no_row():
    family, model, edits = by_name("llama"), shared("llama"), edits_of(by_name("llama"))
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3] = 0, 0
    ids[2, :1], mask[2, :1] = 0, 0
    for where, parts in (("all", (True, True)), ("generated", (False, True))):
        with by_hand(family, model, edits, *parts):
            expected = generated(model, ids, attention_mask=mask)
        with lf.steer(model, edits, where=where):
            assert torch.equal(generated(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
@pytest.mark.parametrize(
    "assistant",
    [
        "model",
        "itself",
        "early exit",
        pytest.param(
            "prompt lookup",
            marks=pytest.mark.skipif(
                VERSION_4, reason="prompt lookup of 4.57 fails without an end token, steered or not"
            ),
        ),
    ],
)
def test_assisted_generation_gives_what_greedy_gives(assistant, where):
    """The first pass reads the prompt and guessed tokens at once; only the former are given."""
    model, edits = shared("llama"), edits_of(by_name("llama"))
    options = {
        "model": {"assistant_model": by_name("llama").build()},
        "itself": {"assistant_model": model},
        "early exit": {"assistant_early_exit": 1},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    ids = torch.cat([IDS[:1], IDS[:1]], dim=1)  # so that a lookup finds something
    with lf.steer(model, edits[2:], where=where):
        expected = generated(model, ids, do_sample=False)
        assert torch.equal(generated(model, ids, do_sample=False, **options), expected)


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_each_branch_of_classifier_free_guidance_has_its_own_prompt(where):
    """The unconditional branch reads the last token of the prompt, and then what is generated."""
    family, model, edits = by_name("llama"), shared("llama"), edits_of(by_name("llama"))
    seen: dict[str, int] = {}

    def change(site, output):
        # Conditional and unconditional passes take turns; the first of each is the prompt's.
        turn = seen[site] = seen.get(site, -1) + 1
        if where != "all" and (where == "prompt") != (turn < 2):
            return output
        return torch.stack([apply(e, site, row) for e, row in zip(edits, output, strict=True)])

    options = {"do_sample": False, "guidance_scale": 2.5}
    with plain.hooked(family.activations(model), change):
        expected = generated(model, **options)
    with lf.steer(model, edits, where=where):
        assert torch.equal(generated(model, **options), expected)


def test_two_threads_that_generate_at_once_are_told_so():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    raised = []

    class Other(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            def generate():
                try:
                    generated(model)
                except InputError as error:
                    raised.append(str(error))

            thread = threading.Thread(target=generate)
            thread.start()
            thread.join()
            return torch.zeros(len(ids), dtype=torch.bool)

    with lf.steer(model, edits, where="generated"):
        expected = generated(model, do_sample=False)
        assert torch.equal(generated(model, do_sample=False, stopping_criteria=[Other()]), expected)
    assert raised
    assert all("another thread is generating" in message for message in raised)


@pytest.mark.skipif(
    VERSION_4, reason="continuous batching of 4.57 asks for a GPU; transformers 5 does not"
)
def test_continuous_batching_is_refused_where_rows_matter():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    with lf.steer(model, edits), pytest.raises(InputError, match="continuous batching"):
        model.generate_batch([[5, 6], [7]], max_new_tokens=2)


def test_a_prompt_read_in_chunks_is_all_prompt():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    for where in ("prompt", "generated"):
        with lf.steer(model, edits, where=where):
            expected = generated(model, do_sample=False)
            assert torch.equal(generated(model, do_sample=False, prefill_chunk_size=3), expected)


def test_a_chat_that_goes_on_from_its_cache_has_its_new_turn_as_prompt():
    model, edit = shared("llama"), edits_of(by_name("llama"))[2]
    turn = torch.cat([IDS, IDS.flip(1)], dim=1)

    def second(ids):
        cache = transformers.DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
        return generated(model, ids, do_sample=False, past_key_values=cache)[:, -6:]

    with lf.steer(model, edit, where="prompt"):
        whole = generated(model, turn, do_sample=False)[:, -6:]
        assert torch.equal(second(turn), whole)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="transformers 4 takes every prompt to begin with what the cache holds, so there is no "
    "such call; goes with the support of it",
)
@torch.no_grad()
def test_a_turn_given_without_what_the_cache_holds_is_the_prompt():
    model, edit = shared("llama"), edits_of(by_name("llama"))[2]
    talk = torch.cat([IDS, IDS.flip(1), IDS.flip(0)], dim=1)
    cached, turn = talk.split([IDS.shape[1], 2 * IDS.shape[1]], dim=1)

    def after_the_turn():
        """The logits of its last position, which read positions of the prompt only."""
        cache = transformers.DynamicCache(config=model.config)
        model(cached, past_key_values=cache)
        return model.generate(
            turn, attention_mask=torch.ones_like(talk), past_key_values=cache,
            do_sample=False, return_dict_in_generate=True, output_logits=True, **OPTIONS,
        ).logits[0]  # fmt: skip

    found = {}
    for where in ("all", "prompt", "generated"):
        with lf.steer(model, edit, where=where):
            found[where] = after_the_turn()
    assert torch.equal(found["prompt"], found["all"])
    assert torch.equal(found["generated"], after_the_turn())
    assert not torch.equal(found["prompt"], found["generated"])


@pytest.mark.parametrize("where", ["prompt", "generated"])
@torch.no_grad()
def test_a_batch_of_another_size_is_told_apart_outside_generate(where):
    model, edit = shared("llama"), edits_of(by_name("llama"))[2]
    with lf.steer(model, edit, where=where):
        expected = model(IDS).logits
        assert torch.equal(model(IDS[:1].expand(2, -1)).logits[1], expected[0])
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_embeddings_as_input_are_the_prompt(where):
    model, edits = shared("llama"), edits_of(by_name("llama"))
    with lf.steer(model, edits, where=where), torch.no_grad():
        expected = generated(model, do_sample=False)[:, -6:]
        embedded = model.get_input_embeddings()(IDS)
        found = model.generate(inputs_embeds=embedded, do_sample=False, **OPTIONS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["t5-v1.1", "bart"])
@pytest.mark.parametrize("num_beams", [1, 2])
@torch.no_grad()
def test_encoder_decoders_edit_both_stacks_by_sequence(name, num_beams):
    family, model = by_name(name), shared(name)
    edits = edits_of(family)
    options = {"num_beams": num_beams, "do_sample": False}
    with by_hand(family, model, edits):
        expected = generated(model, **options)
    with lf.steer(model, edits):
        assert torch.equal(generated(model, **options), expected)
    # The decoder's start token is its prompt, everything that the encoder reads is.
    encoder = [site for site in family.sites if site.startswith("encoder")]

    def only_read(site, output):
        rows = output.reshape(-1, output.shape[-2], WIDTH)
        position = seen.setdefault(site, 0)
        seen[site] += rows.shape[1]
        if site not in encoder and position > 0:
            return output
        each = len(rows) // len(edits)
        return torch.stack([apply(edits[r // each], site, row) for r, row in enumerate(rows)])

    seen: dict[str, int] = {}
    with plain.hooked(family.activations(model), only_read):
        expected = generated(model, **options)
    with lf.steer(model, edits, where="prompt"):
        assert torch.equal(generated(model, **options), expected)


@torch.no_grad()
def test_outside_generate_what_goes_on_from_a_cache_is_new():
    family, model, edits = by_name("llama"), shared("llama"), edits_of(by_name("llama"))

    def loop():
        cache = transformers.DynamicCache(config=model.config)
        first = model(IDS, past_key_values=cache).logits
        return first, model(IDS[:, :1], past_key_values=cache).logits

    for where, parts in (("prompt", (True, False)), ("generated", (False, True))):
        with by_hand(family, model, edits, *parts):
            expected = loop()
        with lf.steer(model, edits, where=where):
            assert all(map(torch.equal, loop(), expected))


@torch.no_grad()
def test_a_batch_that_does_not_match_the_edits_is_refused_and_the_model_kept():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    before = plain.attributes(model)
    with lf.steer(model, edits) as steering:
        with pytest.raises(InputError, match="2 sequences, but steer was given 3 edits"):
            model(IDS[:2])
        with pytest.raises(InputError, match="6 sequences, but steer was given 3 edits"):
            model(IDS.repeat(2, 1))  # outside generate nothing says whose they are
        with pytest.raises(InputError, match="2 sequences, but steer was given 3 edits"):
            model.generate(IDS[:2], **OPTIONS)
        expected = model(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        steering.remove()
    plain.assert_untouched(before, model)


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
def test_edits_that_would_share_out_the_beams_of_one_prompt_are_refused(option):
    model, edits = shared("llama"), edits_of(by_name("llama"))
    before = plain.attributes(model)
    more = {option: 2, "do_sample": option == "num_return_sequences"}
    with lf.steer(model, edits[:2]) as steering:
        with pytest.raises(InputError, match="3 sequences, but steer was given 2 edits"):
            model.generate(IDS, **OPTIONS, **more)
        model.generate(IDS[:2], **OPTIONS, **more)
        steering.remove()
    plain.assert_untouched(before, model)


def test_the_returned_sequences_of_one_prompt_may_have_an_edit_each():
    model, edits = shared("llama"), edits_of(by_name("llama"))

    def generate(ids, **more):
        torch.manual_seed(0)
        return model.generate(ids, **OPTIONS, do_sample=True, **more)

    with lf.steer(model, edits):
        expected = generate(IDS[:1].expand(len(edits), -1))
        found = generate(IDS[:1], num_return_sequences=len(edits))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no edit at all"),
        ([None, None], "no edit at all"),
        (["en"], "got str"),
        ({"a": None}, "got dict"),
    ],
)
def test_lists_of_anything_else_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        lf.steer(shared("llama"), given)


def test_a_generate_that_does_not_say_where_its_prompt_ends_is_refused():
    class OwnLoop(transformers.LlamaForCausalLM):
        def generate(self, ids):
            return self(ids).logits.argmax(-1)

    model = OwnLoop(shared("llama").config).eval()
    edit = lf.deactivate({"layers.0.mlp": [0]})
    with lf.steer(model, edit, where="prompt"):
        with pytest.raises(InputError, match='how long its prompt is.*use where="all"'):
            model.generate(IDS)
    with lf.steer(model, edit):
        model.generate(IDS)


def test_an_unknown_place_is_refused():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    with pytest.raises(InputError, match="where must be one of all, prompt, generated"):
        lf.steer(model, edits, where="new")


class _Failing(transformers.LogitsProcessor):
    """Fails at the third new token."""

    def __init__(self, error=RuntimeError):
        self._error = error

    def __call__(self, ids, scores):
        if ids.shape[1] > IDS.shape[1] + 2:
            raise self._error
        return scores


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_midway_leaves_the_model_as_it_was(error):
    model, edits = shared("llama"), edits_of(by_name("llama"))
    before, plain_text = plain.attributes(model), generated(model, do_sample=False)

    with pytest.raises(error), lf.steer(model, edits, where="generated"):
        generated(model, logits_processor=[_Failing(error)])
    plain.assert_untouched(before, model)
    assert torch.equal(generated(model, do_sample=False), plain_text)


def test_after_an_error_midway_the_next_call_is_right():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    with lf.steer(model, edits, where="generated"):
        expected = generated(model, do_sample=False)
        with pytest.raises(RuntimeError):
            generated(model, logits_processor=[_Failing()])
        with pytest.raises(InputError, match="6 sequences"):
            model(IDS.repeat(2, 1))  # generate runs no more
        assert torch.equal(generated(model, do_sample=False), expected)


def test_streaming_from_another_thread():
    model, edit = shared("llama"), edits_of(by_name("llama"))[2]

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.append(value.reshape(-1))

        def end(self):
            pass

    streamer = Streamer()
    with lf.steer(model, [edit], where="generated"):
        expected = generated(model, IDS[:1], do_sample=False)
        arguments = {"do_sample": False, "streamer": streamer, **OPTIONS}
        thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=arguments)
        thread.start()
        thread.join()
    assert torch.equal(torch.cat(streamer.tokens), expected[0])


@torch.no_grad()
def test_a_copy_made_while_steered_is_unsteered():
    model, edits = by_name("llama").build(), edits_of(by_name("llama"))
    expected = generated(model, do_sample=False)
    with lf.steer(model, edits, where="generated"):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in copies:
        assert torch.equal(generated(one, do_sample=False), expected)
        assert not any(name.startswith("_lapefast") for m in one.modules() for name in vars(m))
        assert "generate" not in vars(one)


def test_an_adapted_model_generates_by_its_own_generate():
    family, edits = by_name("llama"), edits_of(by_name("llama"))
    config = peft.LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(family.build(), config).eval()
    before = plain.attributes(model)
    for where, parts in (("all", (True, True)), ("generated", (False, True))):
        with by_hand(family, model.get_base_model(), edits, *parts):
            expected = model.generate(input_ids=IDS, num_beams=2, **OPTIONS)
        with lf.steer(model, edits, where=where):
            found = model.generate(input_ids=IDS, num_beams=2, **OPTIONS)
        assert torch.equal(found, expected)
    plain.assert_untouched(before, model)


def test_a_chat_template_changes_no_row():
    """A template only makes other prompts; its special tokens are given positions too."""
    model, edits = shared("llama"), edits_of(by_name("llama"))
    framed = torch.cat([torch.full((3, 2), 1), IDS, torch.full((3, 2), 3)], dim=1)
    with by_hand(by_name("llama"), model, edits, False, True):
        expected = generated(model, framed)
    with lf.steer(model, edits, where="generated"):
        assert torch.equal(generated(model, framed), expected)


@torch.no_grad()
def test_gradients_are_those_of_each_sequences_edit():
    family, edits = by_name("llama"), edits_of(by_name("llama"))
    model = family.build()

    def gradients():
        model.zero_grad()
        with torch.enable_grad():
            model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with by_hand(family, model, edits):
        expected = gradients()
    with lf.steer(model, edits):
        found = gradients()
    assert all(map(torch.equal, found, expected))
    assert int(IDS.max()) < VOCABULARY


@torch.no_grad()
def test_a_recorder_sees_each_sequences_edit():
    family, model, edits = by_name("llama"), shared("llama"), edits_of(by_name("llama"))
    groups = torch.arange(3)[:, None].expand_as(IDS)

    def change(site, output):
        return torch.stack([apply(e, site, row) for e, row in zip(edits, output, strict=True)])

    with plain.hooked(family.activations(model), change) as seen:
        model(IDS)
    with lf.steer(model, edits), lf.record(model, ["a", "b", "c"]) as recorder:
        recorder.set(groups=groups)
        model(IDS)
    for site, counted in recorder.profile().counts.items():
        assert torch.equal(counted, plain.counts(seen[site], groups, 3)), site
