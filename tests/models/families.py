"""Tiny random models, one row per family, with where their neurons are said by hand.

The paths are those of the families' own code, written down independently of
`lapefast.models.structure`, so that a comparison with them checks discovery too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

VOCABULARY = 97
WIDTH = 52  # not a multiple of a vector's lanes, so that every kernel has a tail
IDS = torch.arange(24).reshape(3, 8) * 31 % (VOCABULARY - 10) + 5

VERSION_4 = transformers.__version__.startswith("4.")

# Names of one thing differ between the families' configurations.
MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": WIDTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": WIDTH,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
ZAMBA = {
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_mem_blocks": 1,
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "chunk_size": 8,
    "adapter_rank": 4,
    "use_mem_rope": False,
}
GEMMA3N = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 1,
    "layer_types": ["full_attention"] * 3,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0],
    "num_hidden_layers": 3,
}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: what the test is called.
        model: class name in transformers; its configuration is found by it.
        options: what the configuration is made of.
        sites: site name -> path of its activation module inside the bare model.
        bare: path from the model to its bare form.
        replaced: whether the whole forward of the FFN is of a known gated form.
        kernel: the activation's name in lapefast.ops, "" where the ops have none for it.
        calls: times each site fires in one forward pass.
        gate_scale: how much larger than usual the first projection's weights are, so that
            activations reach hundreds or thousands.
        stays_float32: modules that keep float32 in a half-precision model, as loading does it.
        inputs: more that the forward is called with.
    """

    name: str
    model: str
    options: Mapping[str, Any]
    sites: Mapping[str, str]
    bare: str = "model"
    replaced: bool = False
    kernel: str = ""
    calls: int = 1
    gate_scale: float = 3000.0
    stays_float32: tuple[str, ...] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in eval mode; the same weights at every call."""
        if not hasattr(transformers, self.model):
            pytest.skip(f"{self.model} does not exist in transformers {transformers.__version__}")
        cls = getattr(transformers, self.model)
        torch.manual_seed(0)
        with torch.random.fork_rng():
            model = cls(cls.config_class(**self.options)).eval()
        _enlarge(model, self)
        model.to(dtype)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in self.stays_float32:
                module.float()
        return model

    def call(self, model: nn.Module, ids: torch.Tensor = IDS, **options: Any) -> Any:
        """One forward pass over ``ids``."""
        if model.config.is_encoder_decoder:
            options.setdefault("decoder_input_ids", ids.flip(1)[:, :5])
        return model(input_ids=ids, **self.inputs, **options)

    def bare_of(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.bare)

    def activations(self, model: nn.Module) -> dict[str, nn.Module]:
        """Site name -> its activation module."""
        bare = self.bare_of(model)
        return {site: bare.get_submodule(path) for site, path in self.sites.items()}


def _enlarge(model: nn.Module, family: Family) -> None:
    """Make every other neuron's activation large: a normal one beside it shows cross-talk."""
    firsts = ("gate_proj", "gate_up_proj", "wi_0", "wi", "Wi", "fc1", "fc_in", "c_fc", "lin1",
              "dense_h_to_4h", "up_proj", "dense", "ffn", "layer_1")  # fmt: skip
    bare = family.bare_of(model)
    seen = set()
    for path in family.sites.values():
        owner = bare.get_submodule(path.rpartition(".")[0])
        # BERT's sits in `intermediate`, all others beside the activation.
        name = next(name for name in firsts if name in owner._modules)
        first = owner._modules[name]
        if first.weight in seen:
            continue
        seen.add(first.weight)
        with torch.no_grad():
            rows = first.weight.T if type(first).__name__ == "Conv1D" else first.weight
            # gate_up: only the gate half, up stays as it is.
            rows[0:WIDTH:2] *= family.gate_scale


def layers(site: str, activation: str, count: int = 2) -> dict[str, str]:
    """Sites named by layer, ``{}`` being its number."""
    return {site.format(i): activation.format(i) for i in range(count)}


def gated(
    name: str, model: str, kernel: str = "silu", activation: str = "act_fn", **options: Any
) -> Family:
    """A decoder with the modern names whose FFN is exactly down(act(gate(x)) * up(x))."""
    return Family(
        name,
        model,
        {**MODERN, **options},
        layers("layers.{}.mlp", f"layers.{{}}.mlp.{activation}"),
        replaced=True,
        kernel=kernel,
    )


def bert(name: str, model: str, bare: str, kernel: str = "gelu", **options: Any) -> Family:
    """An encoder whose FFN is two modules of its layer."""
    return Family(
        name,
        model,
        {**MODERN, "type_vocab_size": 2, **options},
        layers("encoder.layer.{}", "encoder.layer.{}.intermediate.intermediate_act_fn"),
        bare=bare,
        kernel=kernel,
    )


def bart(name: str, model: str, kernel: str, **options: Any) -> Family:
    """An encoder-decoder whose FFN has no module of its own."""
    return Family(
        name,
        model,
        {**BART, **options},
        layers("encoder.layers.{}", "encoder.layers.{}.activation_fn")
        | layers("decoder.layers.{}", "decoder.layers.{}.activation_fn"),
        kernel=kernel,
    )


def t5(name: str, model: str, kernel: str, **options: Any) -> Family:
    """An encoder-decoder with T5's blocks; loading keeps its last projections in float32."""
    ffn = "{}.block.{}.layer.{}.DenseReluDense"
    names = [ffn.format(stack, i, last) for stack, last in (("encoder", 1), ("decoder", 2))
             for i in range(2)]  # fmt: skip
    return Family(
        name,
        model,
        {**T5, **options},
        {name: f"{name}.act" for name in names},
        bare="",
        kernel=kernel,
        stays_float32=("wo",),
    )


FAMILIES = (
    # exactly gated: the FFN's forward is replaced
    gated("llama", "LlamaForCausalLM"),
    gated("mistral", "MistralForCausalLM"),
    gated("qwen2", "Qwen2ForCausalLM"),
    gated("qwen3", "Qwen3ForCausalLM", **HEAD),
    gated("gemma", "GemmaForCausalLM", "gelu_tanh", **HEAD),
    gated("gemma2", "Gemma2ForCausalLM", "gelu_tanh", **HEAD),
    gated("gemma3", "Gemma3ForCausalLM", "gelu_tanh", **HEAD),
    gated("phi3", "Phi3ForCausalLM", activation="activation_fn"),
    gated("cohere", "CohereForCausalLM"),
    gated("cohere2", "Cohere2ForCausalLM", **HEAD),
    gated("olmo2", "Olmo2ForCausalLM"),
    gated("olmo3", "Olmo3ForCausalLM"),
    gated("granite", "GraniteForCausalLM"),
    gated("stablelm", "StableLmForCausalLM"),
    gated("glm4", "Glm4ForCausalLM", activation="activation_fn", **HEAD),
    gated("helium", "HeliumForCausalLM", **HEAD),
    gated("smollm3", "SmolLM3ForCausalLM"),
    gated("exaone4", "Exaone4ForCausalLM", **HEAD),
    gated("ministral", "MinistralForCausalLM", **HEAD),
    gated("relu-llama", "LlamaForCausalLM", "relu", hidden_act="relu"),
    replace(gated("relu-squared-llama", "LlamaForCausalLM", "relu_squared", hidden_act="relu2"),
            gate_scale=150),
    gated("quick-gelu-llama", "LlamaForCausalLM", "quick_gelu", hidden_act="quick_gelu"),
    gated("mish-llama", "LlamaForCausalLM", "", hidden_act="mish"),
    # plain
    Family("phi", "PhiForCausalLM", MODERN, layers("layers.{}.mlp", "layers.{}.mlp.activation_fn"),
           kernel="gelu_new"),
    Family("starcoder2", "Starcoder2ForCausalLM", MODERN,
           layers("layers.{}.mlp", "layers.{}.mlp.act"), kernel="gelu_tanh"),
    Family("nemotron", "NemotronForCausalLM", MODERN | HEAD,
           layers("layers.{}.mlp", "layers.{}.mlp.act_fn"), kernel="relu_squared", gate_scale=150),
    Family("persimmon", "PersimmonForCausalLM", MODERN,
           layers("layers.{}.mlp", "layers.{}.mlp.act"), kernel="relu_squared", gate_scale=150),
    Family("apertus", "ApertusForCausalLM", MODERN,
           layers("layers.{}.mlp", "layers.{}.mlp.act_fn"), gate_scale=150),
    Family("gpt2", "GPT2LMHeadModel", GPT, layers("h.{}.mlp", "h.{}.mlp.act"), bare="transformer",
           kernel="gelu_new"),
    Family("gpt-bigcode", "GPTBigCodeForCausalLM", GPT, layers("h.{}.mlp", "h.{}.mlp.act"),
           bare="transformer", kernel="gelu_tanh"),
    Family("gpt-neo", "GPTNeoForCausalLM",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "intermediate_size": WIDTH,
            "max_position_embeddings": 64}, layers("h.{}.mlp", "h.{}.mlp.act"),
           bare="transformer", kernel="gelu_new"),
    Family("gpt-neox", "GPTNeoXForCausalLM", MODERN, layers("layers.{}.mlp", "layers.{}.mlp.act"),
           bare="gpt_neox", kernel="gelu"),
    Family("gpt-j", "GPTJForCausalLM", GPT | {"rotary_dim": 4},
           layers("h.{}.mlp", "h.{}.mlp.act"), bare="transformer", kernel="gelu_new"),
    Family("codegen", "CodeGenForCausalLM", GPT | {"rotary_dim": 4},
           layers("h.{}.mlp", "h.{}.mlp.act"), bare="transformer", kernel="gelu_new"),
    Family("opt", "OPTForCausalLM", MODERN | {"ffn_dim": WIDTH, "word_embed_proj_dim": 32},
           layers("decoder.layers.{}", "decoder.layers.{}.activation_fn"), kernel="relu"),
    Family("xglm", "XGLMForCausalLM",
           {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": WIDTH, "num_layers": 2,
            "attention_heads": 4, "max_position_embeddings": 64},
           layers("layers.{}", "layers.{}.activation_fn"), kernel="gelu"),
    Family("bloom", "BloomForCausalLM",
           {"vocab_size": VOCABULARY, "hidden_size": 13 * 4, "n_layer": 2, "n_head": 4},
           layers("h.{}.mlp", "h.{}.mlp.gelu_impl"), bare="transformer"),
    Family("falcon", "FalconForCausalLM",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "ffn_hidden_size": WIDTH},
           layers("h.{}.mlp", "h.{}.mlp.act"), bare="transformer", kernel="gelu"),
    Family("mpt", "MptForCausalLM",
           {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
            "max_seq_len": 64}, layers("blocks.{}.ffn", "blocks.{}.ffn.act"), bare="transformer",
           kernel="gelu"),
    # encoders
    bert("bert", "BertForMaskedLM", "bert"),
    bert("xlm-roberta", "XLMRobertaForMaskedLM", "roberta"),
    bert("xmod", "XmodForMaskedLM", "roberta", languages=["en", "de"], default_language="en"),
    bert("electra", "ElectraForMaskedLM", "electra", embedding_size=16),
    Family("distilbert", "DistilBertForMaskedLM",
           {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": WIDTH, "n_layers": 2, "n_heads": 4,
            "max_position_embeddings": 64},
           layers("transformer.layer.{}.ffn", "transformer.layer.{}.ffn.activation"),
           bare="distilbert", kernel="gelu"),
    Family("albert", "AlbertForMaskedLM", MODERN | {"embedding_size": 16, "num_hidden_layers": 3},
           {"encoder.albert_layer_groups.0.albert_layers.0":
            "encoder.albert_layer_groups.0.albert_layers.0.activation"},
           bare="albert", kernel="gelu_new", calls=3),
    Family("modernbert", "ModernBertForMaskedLM",
           MODERN | {"attn_implementation": "eager", "reference_compile": False},
           layers("layers.{}.mlp", "layers.{}.mlp.act"), kernel="gelu"),
    # encoder-decoders
    t5("t5", "T5ForConditionalGeneration", "relu"),
    t5("t5-v1.1", "T5ForConditionalGeneration", "gelu_new", feed_forward_proj="gated-gelu",
       tie_word_embeddings=False),
    t5("mt5", "MT5ForConditionalGeneration", "gelu_new"),
    t5("umt5", "UMT5ForConditionalGeneration", "gelu_new"),
    bart("bart", "BartForConditionalGeneration", "gelu"),
    bart("pegasus", "PegasusForConditionalGeneration", "relu", activation_function="relu"),
    bart("m2m-100", "M2M100ForConditionalGeneration", "relu", activation_function="relu"),
    # something odd around the same names: handled at the activation
    Family("bitnet", "BitNetForCausalLM", MODERN, layers("layers.{}.mlp", "layers.{}.mlp.act_fn"),
           kernel="relu_squared", gate_scale=150),
    Family("falcon-h1", "FalconH1ForCausalLM",
           MODERN | HEAD | MAMBA | {"mlp_multipliers": [0.5, 2.0]},
           layers("layers.{}.feed_forward", "layers.{}.feed_forward.act_fn"), kernel="silu"),
    Family("gemma3n", "Gemma3nForCausalLM", MODERN | HEAD | GEMMA3N,
           layers("layers.{}.mlp", "layers.{}.mlp.act_fn", 3), kernel="gelu_tanh"),
    # One FFN that several layers share, up to 4.57; later, an FFN of shared weights for each.
    Family("zamba2", "Zamba2ForCausalLM",
           MODERN | ZAMBA | {"num_hidden_layers": 4, "num_key_value_heads": 4},
           {f"layers.{i}.shared_transformer.feed_forward":
            f"layers.{i}.shared_transformer.feed_forward.act_fn"
            for i in ((1,) if VERSION_4 else (1, 3))}, kernel="gelu", calls=2 if VERSION_4 else 1),
)  # fmt: skip


@functools.cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A family's model, built once for all tests that leave it as it was."""
    return by_name(name).build(dtype)


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
