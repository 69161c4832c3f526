"""An engine serves edits or does not start; a forward fires every op or raises."""

from __future__ import annotations

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from engines import answers, asking, engine
from torch import nn

import lapefast.engines.vllm
from lapefast.engines.vllm import edits, runner
from lapefast.errors import InputError
from lapefast.neurons import save_edits


@pytest.fixture
def serving(monkeypatch):
    """Serve another edit file, or none."""

    def serve(path):
        if path is None:
            monkeypatch.delenv("LAPEFAST_EDITS")
        else:
            monkeypatch.setenv("LAPEFAST_EDITS", str(path))

    return serve


def start(path, **options):
    with engine(path, **options):
        pass


@contextmanager
def pooling_engine(path):
    """Embeddings; vLLM's class `LLM` makes none without a tokenizer."""
    from vllm import EngineArgs
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine.llm_engine import LLMEngine

    options = {"skip_tokenizer_init": True, "max_model_len": 256, "enforce_eager": True}
    arguments = EngineArgs(str(path), runner="pooling", convert="embed", **options)
    engine = LLMEngine.from_engine_args(arguments)
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "for 2 sites of .*has 3 FFNs"),
        ({"intermediate_size": 96}, "of width 96 of .*has 192 neurons"),
    ],
)
def test_edits_for_a_model_of_another_shape_are_refused(
    llama, serving, monkeypatch, tmp_path, changes, message
):
    monkeypatch.setenv("LAPEFAST_CHECK_FINGERPRINT", "0")
    serving(tiny.llama(tmp_path, **changes).edit_file)
    with pytest.raises(InputError, match=message):
        start(llama.path)


def test_edits_for_sites_of_other_names_are_refused(llama, serving, monkeypatch, tmp_path):
    monkeypatch.setenv("LAPEFAST_CHECK_FINGERPRINT", "0")
    text = llama.edit_file.read_text().replace("layers.", "blocks.")
    (tmp_path / "edits.json").write_text(text)
    serving(tmp_path / "edits.json")
    with pytest.raises(InputError, match=r"blocks\.0\.mlp .*the FFN model\.layers\.0\.mlp there"):
        start(llama.path)


def test_edits_for_other_weights_of_the_same_shape_are_refused(
    llama, serving, monkeypatch, tmp_path
):
    with torch.no_grad():
        other = transformers.LlamaForCausalLM.from_pretrained(llama.path)
        other.model.layers[1].mlp.down_proj.weight.neg_()
        other.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="fingerprint"):
        start(tmp_path)
    monkeypatch.setenv("LAPEFAST_CHECK_FINGERPRINT", "0")
    start(tmp_path)


def test_a_checkpoint_whose_fingerprint_cannot_be_taken_is_warned_of(llama, monkeypatch):
    def fail(*args):
        raise KeyError("model.layers.0.mlp.down_proj.weight")

    monkeypatch.setattr("lapefast.engines.vllm.checkpoint._read", fail)
    messages = []
    monkeypatch.setattr(
        "lapefast.engines.vllm.checkpoint._log",
        SimpleNamespace(warning=lambda text, *args: messages.append(text % args)),
    )
    start(llama.path)
    assert re.search("sites and widths are checked and the weights are not", messages[0])


@pytest.mark.parametrize("content", [None, "{", '{"format": "other"}'])
def test_an_edit_file_that_is_missing_or_broken_stops_the_engine(llama, serving, tmp_path, content):
    path = tmp_path / "edits.json"
    if content is not None:
        path.write_text(content)
    serving(path)
    with pytest.raises(InputError, match=r"edits\.json"):
        lapefast.engines.vllm.register()
    with pytest.raises(InputError, match=r"edits\.json"):
        start(llama.path)


def test_an_activation_that_is_not_known_is_refused_by_name(llama, monkeypatch):
    from vllm.model_executor.models import llama as models

    class OtherAndMul(models.SiluAndMul):
        name = "silu_and_mul"

    monkeypatch.setattr(models, "SiluAndMul", OtherAndMul)
    with pytest.raises(InputError, match=r"layers\.0\.mlp has .*OtherAndMul"):
        start(llama.path)


def test_a_model_whose_activations_are_not_modules_is_refused(llama, monkeypatch):
    from vllm.model_executor.models import llama as models

    def forward(self, x):
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(nn.functional.silu(gate) * up)[0]

    class Functional(models.LlamaMLP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.act_fn

    Functional.forward = forward
    monkeypatch.setattr(models, "LlamaMLP", Functional)
    with pytest.raises(InputError, match="no FFN whose activation is a module"):
        start(llama.path)


def test_another_model_runner_is_refused_by_name():
    class OtherRunner:
        pass

    with pytest.raises(InputError, match=r"V1 model runner.*OtherRunner"):
        runner._refuse_unknown(SimpleNamespace(model_runner=OtherRunner()))


@pytest.mark.parametrize(
    ("parallel", "encoder_decoder", "message"),
    [
        ({"pipeline_parallel_size": 2}, False, "pipeline"),
        ({"use_ubatching": True}, False, "dual-batch"),
        ({}, True, "encoder-decoder"),
    ],
)
def test_what_rows_are_not_followed_through_is_refused(parallel, encoder_decoder, message):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    worker = SimpleNamespace(
        model_runner=object.__new__(GPUModelRunner),
        parallel_config=SimpleNamespace(
            **{"pipeline_parallel_size": 1, "use_ubatching": False, **parallel}
        ),
        model_config=SimpleNamespace(is_encoder_decoder=encoder_decoder),
    )
    with pytest.raises(InputError, match=message):
        runner._refuse_unknown(worker)


def test_a_forward_in_which_an_op_does_not_run_raises(llama):
    with engine(llama.path) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        mlp = model.model.layers[1].mlp
        mlp._modules["act_fn"] = nn.Module()
        mlp.act_fn.forward = lambda x: torch.ones(len(x), 192)
        with pytest.raises(RuntimeError, match=r"op at layers\.1\.mlp must run once .* ran 0"):
            answers(llm, [([5, 6, 7], None)])


def test_a_forward_in_which_an_op_runs_twice_raises(llama):
    with engine(llama.path) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        mlp = model.model.layers[2].mlp
        edited = mlp.act_fn
        mlp._modules["act_fn"] = nn.Module()
        mlp.act_fn.forward = lambda x: (edited(x), edited(x))[1]
        with pytest.raises(RuntimeError, match=r"op at layers\.2\.mlp must run once .* ran 2"):
            answers(llm, [([5, 6, 7], None)])


def test_the_worker_class_starts_with_edits_and_not_without(llama, serving, monkeypatch):
    worker = "lapefast.engines.vllm.Worker"
    prompt = tiny.prompts(1, 10)[0]
    with engine(llama.path, worker_cls=worker) as llm:
        assert answers(llm, [(prompt, "on")]) == [llama.expected(prompt, "on")]
    monkeypatch.setattr(edits, "installed", lambda: False)
    with pytest.raises(InputError, match="has not loaded the plugin lapefast: VLLM_PLUGINS"):
        start(llama.path, worker_cls=worker)
    serving(None)
    with pytest.raises(InputError, match="LAPEFAST_EDITS is not set"):
        start(llama.path, worker_cls=worker)


def test_without_an_edit_file_nothing_is_touched(llama, serving):
    serving(None)
    prompt = tiny.prompts(1, 10)[0]
    with engine(llama.path) as llm:
        model_runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert type(model_runner.get_model().model.layers[0].mlp.act_fn).__name__ == "SiluAndMul"
        assert "_model_forward" not in vars(model_runner)
        params = asking("on")
        outputs = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        assert list(outputs[0].outputs[0].token_ids) == llama.expected(prompt, None)


def test_edits_beside_streamed_input_and_beam_search_are_refused(llama):
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    request = CompletionRequest(
        model="m", prompt="p", use_beam_search=True, vllm_xargs={"lapefast_edit": "on"}
    )
    with engine(llama.path) as llm:
        with pytest.raises(VLLMValidationError, match="beam search"):
            request.to_beam_search_params(4, {})
        with pytest.raises(VLLMValidationError, match="streamed"):
            llm.llm_engine.input_processor.process_inputs(
                "0", {"prompt_token_ids": [5]}, asking("on"), ("generate",), resumable=True
            )


def test_an_edit_that_a_pooling_request_asks_for_is_refused(llama):
    from vllm import PoolingParams
    from vllm.exceptions import VLLMValidationError

    def ask(engine, number, **extra):
        prompt = {"type": "token", "prompt_token_ids": [5, 6]}
        engine.add_request(str(number), prompt, PoolingParams(task="embed", **extra))

    with pooling_engine(llama.path) as engine:
        for number, name in enumerate(("lapefast_edit", "lapefast-edit")):
            with pytest.raises(VLLMValidationError, match="that generate, .* has PoolingParams"):
                ask(engine, number, extra_kwargs={name: "on"})
        # One that asks for nothing is answered.
        ask(engine, 2)
        assert [output.request_id for output in engine.step() if output.finished] == ["2"]


def test_edits_of_an_unbound_width_are_refused(tmp_path, serving, llama):
    save_edits(tmp_path / "edits.json", llama.edits)
    text = (tmp_path / "edits.json").read_text().replace('"width": 192', '"width": null')
    (tmp_path / "edits.json").write_text(text)
    serving(tmp_path / "edits.json")
    with pytest.raises(InputError, match="does not say the width of site"):
        lapefast.engines.vllm.register()
