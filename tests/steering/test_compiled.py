"""Steering under `torch.compile`: no break, no recompilation, no skipped CUDA graph."""

from __future__ import annotations

import pytest
import torch
from families import IDS, by_name, shared
from test_sequences import OPTIONS, edits_of

import lapefast as lf


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and notes the moving inputs that each writes to."""

    def __init__(self) -> None:
        self.written: list[tuple[str, ...]] = []

    def __call__(self, graph, inputs):
        return torch._dynamo.backends.common.aot_autograd(fw_compiler=self._note)(graph, inputs)

    def _note(self, graph, inputs):
        found = torch._guards.TracingContext.get().fw_metadata
        moving = set(found.mutated_inp_runtime_indices) - set(found.static_input_indices)
        self.written.append(tuple(sorted(str(inputs[index].dtype) for index in moving)))
        return graph.forward


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_compiled_model_edits_each_sequence(name, where):
    model, edits = by_name(name).build(), edits_of(by_name(name))
    with lf.steer(model, edits, where=where):
        expected = model(IDS, use_cache=False).logits
        graphs = Graphs()
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        for _ in range(2):
            assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    # One graph. CUDA graphs are skipped where one writes to an input that has no fixed address.
    assert graphs.written == [()]


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
@torch.no_grad()
def test_generating_with_a_compiled_forward_and_a_static_cache(where):
    model, edits = by_name("llama").build(), edits_of(by_name("llama"))
    options = {"do_sample": False, "cache_implementation": "static", **OPTIONS}
    before, after = Graphs(), Graphs()

    def compiled(graphs):
        model.forward = torch.compile(model.forward, fullgraph=True, backend=graphs)
        try:
            text = model.generate(IDS, **options)
            assert torch.equal(model.generate(IDS, **options), text)
        finally:
            del model.forward
        return text

    unsteered = compiled(before)
    with lf.steer(model, edits, where=where):
        expected = model.generate(IDS, **options)
        assert torch.equal(compiled(after), expected)
    assert not torch.equal(unsteered, expected)
    assert len(after.written) <= len(before.written)  # steering compiles no more
    # The cache's own tensors are the only ones that move, steered or not.
    assert any(before.written)
    assert set(after.written) <= set(before.written)


@torch.no_grad()
def test_a_compiled_recorder_writes_to_fixed_addresses_only():
    model, graphs = by_name("llama").build(torch.bfloat16), Graphs()
    with lf.record(model, ["a"], statistics=("counts", "sums")) as recorder:
        recorder.set(label="a")
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        compiled(IDS, use_cache=False)
        compiled(IDS, use_cache=False)
    assert graphs.written == [()]


@torch.no_grad()
def test_a_batch_that_does_not_match_is_refused_under_compile_too():
    model, edits = by_name("llama").build(), edits_of(by_name("llama"))
    with lf.steer(model, edits):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(Exception, match="2 sequences, but steer was given 3 edits"):
            compiled(IDS[:2], use_cache=False)


@torch.no_grad()
def test_inductor_computes_the_same():
    model, edits = shared("llama"), edits_of(by_name("llama"))
    with lf.steer(model, edits, where="prompt"):
        compiled = torch.compile(model, fullgraph=True)
        # Float32 sums of up to 52 terms in another order differ by 52 * 2^-24, or 3.1e-6, of their
        # absolute values; two layers and the head add three of these.
        torch.testing.assert_close(
            compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits,
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
