"""Mixtures whose experts are modules of their own: transformers 4's, NLLB-MoE's, users' own."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field

import plain
import pytest
import torch
import transformers
from families import BART, MODERN, VERSION_4, VOCABULARY
from mixtures import IDS, LATENT, by_name, needs_5
from torch import Tensor, nn

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError

WIDTH, EXPERTS = 24, 4
# Two labels within a row, padding on the left and on the right.
GROUPS = torch.tensor([[-1, -1] + 6 * [0], 4 * [0] + 4 * [1], 5 * [1] + 3 * [-1]])
LABELS = ["a", "b"]


class Expert(nn.Module):
    """A gated FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, WIDTH, bias=False)
        self.up_proj = nn.Linear(32, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, 32, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ScalingExpert(Expert):
    """Its activation alone can be handled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)


class Block(nn.Module):
    """Sends a token to the experts of its two largest entries of four, some to the first alone.

    Attributes:
        schedule: (expert, tokens) of every call of an expert, while one is kept.
    """

    def __init__(self, make=Expert, order: str = "rising") -> None:
        super().__init__()
        self.experts = nn.ModuleList(make() for _ in range(EXPERTS))
        self.order = order
        self.schedule: list[tuple[int, list[int]]] | None = None

    def plan(self, rows: Tensor) -> list[tuple[int, list[int]]]:
        chosen, alone = rows[:, :EXPERTS].topk(2).indices.tolist(), (rows[:, 4] > 0).tolist()
        planned = []
        for expert in range(EXPERTS):
            own = [t for t, (first, _) in enumerate(chosen) if first == expert]
            own += [t for t, (_, last) in enumerate(chosen) if last == expert and not alone[t]]
            if self.order == "falling":
                own.reverse()
            parts = [own] if self.order != "one by one" else [[token] for token in own]
            planned += [(expert, part) for part in parts]
        return planned

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        made = torch.zeros_like(flat)
        for expert, tokens in self.plan(flat):
            if self.schedule is not None:
                self.schedule.append((expert, tokens))
            index = torch.tensor(tokens, dtype=torch.int64)
            made = made.index_add(0, index, self.run(self.experts[expert], flat[index]))
        return made.view_as(hidden_states)

    def run(self, expert: nn.Module, rows: Tensor) -> Tensor:
        return expert(rows)


SITES = ["layers.0.mlp.experts", "layers.1.mlp.experts"]


def build(make=Expert, order: str = "rising", dtype=torch.float32, block=Block) -> nn.Module:
    """A Llama whose FFNs are blocks; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODERN)).eval()
        for layer in model.model.layers:
            layer.mlp = block(make, order)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


@dataclass
class Seen:
    """What the experts of one block activated: (expert, token, activation) of each row."""

    rows: list[tuple[int, int, Tensor]] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module, change=None):
    """Site -> what its experts saw, by hooks on their activation modules and the blocks' plans.

    Args:
        change: ``change(site, expert, tokens, activation)`` replaces the activation, where given.
    """
    seen, hooks = {}, []
    for site in SITES:
        block = model.model.get_submodule(site.removesuffix(".experts"))
        block.schedule, seen[site] = [], Seen()
        for expert in block.experts:

            def hook(module, args, output, site=site, block=block):
                number, tokens = block.schedule[-1]
                if change is not None:
                    output = change(site, number, tokens, output)
                rows = output.detach().reshape(-1, WIDTH)
                assert len(rows) == len(tokens)
                seen[site].rows += [(number, t, row) for t, row in zip(tokens, rows, strict=True)]
                return output

            hooks.append(expert.act_fn.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()
        for site in SITES:
            model.model.get_submodule(site.removesuffix(".experts")).schedule = None


def counts(seen: Seen, groups: Tensor, labels: int = 2) -> tuple[Tensor, Tensor]:
    """Active and all rows, int64 [labels, experts, width] and [labels, experts]."""
    active = torch.zeros(labels, EXPERTS, WIDTH, dtype=torch.int64)
    routed = torch.zeros(labels, EXPERTS, dtype=torch.int64)
    owners = groups.flatten().tolist()
    for expert, token, row in seen.rows:
        if owners[token] >= 0:
            active[owners[token], expert] += row.float() > 0
            routed[owners[token], expert] += 1
    return active, routed


@pytest.mark.parametrize("order", ["rising", "falling", "one by one"])
@pytest.mark.parametrize("make", [Expert, ScalingExpert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_outputs_counts_and_routed_tokens_equal_those_of_plain_hooks(make, order, dtype):
    model = build(make, order, dtype)
    before = plain.attributes(model)
    with watched(model) as seen:
        expected = model(IDS)
    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        assert plain.same(model(IDS), expected)
    profile = recorder.profile()
    assert [(site.name, site.experts, site.width) for site in recorder.sites] == [
        (site, EXPERTS, WIDTH) for site in SITES
    ]
    assert profile.metadata["experts_implementation"] == "modules"
    assert set(recorder.how.values()) == {"fused" if dtype is torch.bfloat16 else "given"}
    for site in SITES:
        active, routed = counts(seen[site], GROUPS)
        assert torch.equal(profile.counts[site], active)
        assert torch.equal(profile.routed[site], routed)
        assert (routed.sum(1) > 0).all()
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS), expected)


@pytest.mark.parametrize("order", ["rising", "one by one"])
@torch.no_grad()
def test_tokens_that_are_alike_are_told_apart_by_their_order(order):
    """As the token is that begins every text, and two texts of different labels throughout."""
    model = build(order=order)
    ids = IDS.clone()
    ids[:, 0] = 1
    ids[1] = ids[2]
    groups = torch.tensor([8 * [0], 8 * [0], 8 * [1]])
    with watched(model) as seen:
        model(ids)
    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=groups)
        model(ids)
    profile = recorder.profile()
    for site in SITES:
        active, routed = counts(seen[site], groups)
        assert torch.equal(profile.routed[site], routed)
        assert torch.equal(profile.counts[site], active)


def edits() -> list[lf.Edit | None]:
    total = EXPERTS * WIDTH
    return [
        lf.deactivate(dict.fromkeys(SITES, range(0, total, 2))),
        None,
        lf.activate({SITES[1]: range(1, total, 3)}, 5.0) | lf.scale({SITES[1]: [0, WIDTH]}, -3.0),
    ]


def by_hand(edits):
    def change(site, expert, tokens, activation):
        changed = activation.clone()
        for row, token in enumerate(tokens):
            edit = edits[token // IDS.shape[1]] if len(edits) > 1 else edits[0]
            if edit is None or site not in edit.tables:
                continue
            for flat, scale, shift in zip(*(t.tolist() for t in edit.tables[site]), strict=True):
                if flat // WIDTH == expert:
                    own = activation[row, flat % WIDTH].float()
                    changed[row, flat % WIDTH] = shift if scale == 0 else scale * own + shift
        return changed

    return change


@pytest.mark.parametrize("make", [Expert, ScalingExpert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_edits_per_sequence_equal_those_by_hand_and_are_recorded(make, dtype):
    model = build(make, dtype=dtype)
    before, untouched = plain.attributes(model), model(IDS)
    for given in (edits(), edits()[2:]):
        with watched(model, by_hand(given)) as seen:
            expected = model(IDS)
        assert not plain.same(expected, untouched)
        with lf.steer(model, given if len(given) > 1 else given[0]):
            assert plain.same(model(IDS), expected)
            with lf.record(model, LABELS) as recorder:
                recorder.set(groups=GROUPS)
                assert plain.same(model(IDS), expected)
            for site in SITES:
                assert torch.equal(recorder.profile().counts[site], counts(seen[site], GROUPS)[0])
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS), untouched)


def test_an_edit_per_sequence_holds_while_the_model_generates():
    model = build()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    one_each = by_hand(edits())

    def change(site, expert, tokens, activation):
        # Behind the prompt a step has one token of each sequence.
        rows = model.model.get_submodule(site.removesuffix(".experts")).rows
        length = IDS.shape[1] if rows > len(IDS) else 1
        return one_each(
            site, expert, [token * IDS.shape[1] // length for token in tokens], activation
        )

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda module, args: setattr(module, "rows", args[0].shape[0] * args[0].shape[1])
        )
    plainly = model.generate(IDS, **options)
    with watched(model, change):
        expected = model.generate(IDS, **options)
    with lf.steer(model, edits()):
        assert torch.equal(model.generate(IDS, **options), expected)
    assert not torch.equal(plainly, expected)


@torch.no_grad()
def test_a_profile_tells_experts_apart_and_identifies_them():
    model = build()
    rows = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    profile = lf.profile(model, {"a": rows[:4], "b": rows[4:]}, progress=False)
    neurons = lf.detect.lape(profile, top_rate=0.2)
    expected = model(IDS)
    with lf.steer(model, lf.deactivate(neurons["a"]) | lf.deactivate(neurons["b"])):
        assert not plain.same(model(IDS), expected)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_flow_and_what_is_recomputed_is_not_counted_again(checkpointed):
    model = build()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    weight = model.model.layers[0].mlp.experts[1].gate_proj.weight
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected, weight.grad = weight.grad.clone(), None
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert torch.equal(weight.grad, expected)
    profile = recorder.profile()
    assert 24 < int(profile.routed[SITES[0]].sum()) < 48
    assert (profile.counts[SITES[0]] <= profile.routed[SITES[0]][..., None]).all()


@torch.no_grad()
def test_a_copy_of_a_placed_mixture_is_an_ordinary_one():
    model = build()
    expected = model(IDS)
    with lf.record(model, ["a"]):
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert plain.same(made(IDS), expected)  # nobody said what these tokens are
            assert not any("_lapefast" in key for m in made.modules() for key in vars(m))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


@torch.no_grad()
def test_experts_that_share_one_activation_module_get_copies_while_something_is_placed():
    model, shared = build(), nn.SiLU()
    for layer in model.model.layers:
        for expert in layer.mlp.experts:
            expert.act_fn = shared
    before, expected = plain.attributes(model), model(IDS)
    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        assert plain.same(model(IDS), expected)
    plain.assert_untouched(before, model)
    own = build()  # the same weights, an activation module each
    with watched(own) as seen:
        own(IDS)
    for site in SITES:
        assert torch.equal(recorder.profile().counts[site], counts(seen[site], GROUPS)[0])


class Scaled(Block):
    def run(self, expert, rows):
        return expert(rows * 1.5)


class Narrowing(Block):
    def run(self, expert, rows):
        return expert.to(torch.bfloat16)(rows.to(torch.bfloat16)).to(rows.dtype)


class Functional(Block):
    def run(self, expert, rows):
        gate = nn.functional.silu(rows @ expert.gate_proj.weight.T)
        return (gate * (rows @ expert.up_proj.weight.T)) @ expert.down_proj.weight.T


class Repeating(Block):
    def run(self, expert, rows):
        return expert(torch.cat([rows, rows]))[: len(rows)]


class Passing(Expert):
    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x) * 0.5)


@pytest.mark.parametrize(
    ("block", "make", "message"),
    [
        (Scaled, Expert, "gives an expert rows that its block was not called with"),
        (Repeating, Expert, "gives an expert a token more than once"),
        (Narrowing, Expert, "gives an expert rows of another dtype"),
        (Functional, Expert, "runs without calling its experts as modules"),
        (Block, Passing, r"layers.0.mlp.experts.0 runs without calling its activation module"),
    ],
)
@torch.no_grad()
def test_blocks_whose_rows_can_not_be_told_are_refused_by_name(block, make, message):
    model = build(make, block=block)
    before, expected = plain.attributes(model), model(IDS)
    with pytest.raises(InputError, match=message):
        lf.record(model, LABELS)
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS), expected)


@torch.no_grad()
def test_calls_past_the_block_and_without_hidden_states_are_refused():
    model = build()
    block = model.model.layers[0].mlp
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
        with pytest.raises(InputError, match="an expert of .* was called outside of Block"):
            block.experts[0](torch.ones(2, 32))
        with pytest.raises(InputError, match=r"is called without hidden states"):
            block(torch.ones(3, 32, dtype=torch.int64))


@torch.no_grad()
def test_a_block_that_is_called_with_other_rows_than_tokens_is_refused_where_no_probe_tells():
    model = build()
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
        with pytest.raises(InputError, match="saw 3 tokens where the model's input has 24"):
            model.model.layers[0].mlp(torch.ones(3, 1, 32))


def test_experts_of_different_widths_are_refused_by_name():
    model = build()
    model.model.layers[1].mlp.experts[2].down_proj = nn.Linear(WIDTH + 8, 32)
    model.model.layers[1].mlp.experts[2].gate_proj = nn.Linear(32, WIDTH + 8)
    model.model.layers[1].mlp.experts[2].up_proj = nn.Linear(32, WIDTH + 8)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts .*all of one width"):
        models.find_sites(model)


SPARSE = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "num_experts": EXPERTS,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
FAMILIES = {
    "SwitchTransformersForConditionalGeneration": {
        **SPARSE,
        "d_kv": 8,
        "d_ff": WIDTH,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 24,
    },
}
FAMILIES_OF_4 = {
    "NllbMoeForConditionalGeneration": {
        **BART,
        **SPARSE,
        "encoder_ffn_dim": WIDTH,
        "decoder_ffn_dim": WIDTH,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "expert_capacity": 24,
    },
    "MixtralForCausalLM": {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
    "Qwen2MoeForCausalLM": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 56,
        "mlp_only_layers": [0],
    },
    "Qwen3MoeForCausalLM": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "head_dim": 8,
    },
    "OlmoeForCausalLM": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
    "DeepseekV2ForCausalLM": {**LATENT, "n_routed_experts": EXPERTS},
    "DeepseekV3ForCausalLM": {**LATENT, "n_routed_experts": EXPERTS},
    "PhimoeForCausalLM": {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
}
needs_4 = pytest.mark.skipif(
    not VERSION_4,
    reason="transformers 5 keeps these experts in one module, or sends NLLB-MoE's a token twice; "
    "make test-transformers4 runs this",
)
ALL = [*FAMILIES, *(pytest.param(name, marks=needs_4) for name in FAMILIES_OF_4)]


def family(name: str, dtype: torch.dtype) -> nn.Module:
    cls = getattr(transformers, name)
    options = FAMILIES.get(name) or FAMILIES_OF_4[name]
    if "d_model" not in options:
        options = {**MODERN, "num_experts_per_tok": 2, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(cls.config_class(**options)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


@contextmanager
def compared(bare: nn.Module):
    """Site -> what its experts saw; the token of a row by comparing it with all of the block's."""
    seen, hooks, hidden = {}, [], {}
    for site, module in bare.named_modules():
        if not site.endswith(".experts"):
            continue
        own = type(module).forward is not nn.Module.forward
        block = module if own else bare.get_submodule(site.rpartition(".")[0])
        seen[site] = Seen()

        def before(module, args, site=site):
            hidden[site] = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

        hooks.append(block.register_forward_pre_hook(before))
        experts = [one for one in module.children() if not isinstance(one, nn.Dropout)]
        for number, expert in enumerate(experts):
            activation = expert.act if hasattr(expert, "act") else expert.act_fn
            rows: list[int] = []

            def given(module, args, site=site, rows=rows):
                equal = (args[0].reshape(-1, 1, args[0].shape[-1]) == hidden[site]).all(2)
                assert (equal.sum(1) == 1).all()  # no two tokens of these texts are alike
                rows[:] = equal.int().argmax(1).tolist()

            def activated(module, args, output, site=site, rows=rows, number=number):
                flat = output.detach().reshape(-1, WIDTH)
                seen[site].rows += [
                    (number, token, row) for token, row in zip(rows, flat, strict=True)
                ]

            hooks += [
                expert.register_forward_pre_hook(given),
                activation.register_forward_hook(activated),
            ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_experts_of_families_are_counted_as_by_plain_hooks(name, dtype):
    model = family(name, dtype)
    bare = models.bare_model(model)
    ids, groups = {"input_ids": IDS}, {"groups": GROUPS}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = IDS.flip(0)
        groups["decoder_groups"] = GROUPS
    with compared(bare) as seen:
        expected = model(**ids)
    before = plain.attributes(model)  # Switch's routers keep something of a first pass
    with lf.record(model, LABELS) as recorder:
        recorder.set(**groups)
        assert plain.same(model(**ids), expected)
    profile = recorder.profile()
    assert seen.keys() == profile.routed.keys()
    for site, one in seen.items():
        active, routed = counts(one, GROUPS)
        assert routed.any()
        assert torch.equal(profile.routed[site], routed)
        assert torch.equal(profile.counts[site], active)
    site = list(seen)[-1]
    with lf.steer(model, lf.activate({site: range(EXPERTS * WIDTH)}, 3.0)):
        assert not plain.same(model(**ids), expected)
    plain.assert_untouched(before, model)
    assert plain.same(model(**ids), expected)


@needs_4
@torch.no_grad()
def test_routed_tokens_are_those_that_the_router_chose():
    model = family("MixtralForCausalLM", torch.float32)
    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        chosen = [
            logits.topk(2).indices for logits in model(IDS, output_router_logits=True).router_logits
        ]
    for of, site in zip(chosen, recorder.profile().routed.values(), strict=True):
        for label in range(2):
            own = of[GROUPS.flatten() == label].flatten()
            assert site[label].tolist() == own.bincount(minlength=EXPERTS).tolist()


@needs_5
def test_the_fingerprint_is_that_of_the_same_experts_in_one_module():
    """So that a profile made with transformers 4 fits the model in transformers 5."""
    model = by_name("MixtralForCausalLM").build()
    expected = models.fingerprint(model)
    assert expected != models.fingerprint(build())
    for layer in model.model.layers:
        stacked, block = layer.mlp.experts, Block()
        for number, expert in enumerate(block.experts):
            expert.act_fn = copy.copy(stacked.act_fn)
            expert.down_proj.weight = nn.Parameter(stacked.down_proj[number].detach().clone())
        layer.mlp = block
    assert models.fingerprint(model) == expected
    with torch.no_grad():
        model.model.layers[1].mlp.experts[3].down_proj.weight[0, :WIDTH] += 1
    assert models.fingerprint(model) != expected
