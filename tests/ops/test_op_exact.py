"""What a kernel may compute in place of a module is decided here, on every value there is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from activation_modules import MODULES
from torch import nn

from lapefast import _native, ops
from lapefast.ops.exact import exact_dtypes, is_exact

HALVES = (torch.bfloat16, torch.float16)


def proven() -> set[tuple[str, torch.dtype, str]]:
    cpu = torch.device("cpu")
    return {
        (name, dtype, "cpu")
        for dtype in HALVES
        for name, modules in MODULES.items()
        if all(is_exact(name, module(), dtype, cpu, "cpu") for module in modules)
    }


@pytest.mark.parametrize("isa", _native.available_isas())
def test_fused_is_what_is_proven_on_every_instruction_set(isa):
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"LAPEFAST_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [isa, *sorted(written(ops.FUSED))]


def written(entries) -> list[str]:
    return [
        f"{name}:{str(dtype).removeprefix('torch.')}:{device}" for name, dtype, device in entries
    ]


def test_every_activation_has_the_modules_it_is_compared_with():
    assert set(MODULES) == set(ops.ACTIVATIONS) - {"identity"}


def test_a_kernel_that_differs_on_one_value_is_not_exact():
    class OffByOne(nn.SiLU):
        def forward(self, gate):
            return torch.where(gate == 1.5, gate, super().forward(gate))

    cpu = torch.device("cpu")
    assert is_exact("silu", nn.SiLU(), torch.bfloat16, cpu, "cpu")
    assert not is_exact("silu", OffByOne(), torch.bfloat16, cpu, "cpu")


def test_on_other_devices_the_comparison_runs_there_once_for_each_class(monkeypatch):
    # A device that is none of torch's CPU type but computes like it.
    runs = []

    class Elsewhere:
        type = "elsewhere"

    def compared(activation, module, dtype, device, backend):
        runs.append((activation, dtype, backend))
        return dtype is torch.bfloat16

    monkeypatch.setattr("lapefast.ops.exact.is_exact", compared)
    monkeypatch.setattr("lapefast.ops.exact._found", {})
    device = Elsewhere()
    for _ in range(2):
        assert exact_dtypes("silu", nn.SiLU(), device, "triton") == {torch.bfloat16}
    assert len(runs) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_native.isa(), *sorted(written(proven())))
