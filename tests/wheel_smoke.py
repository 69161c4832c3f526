"""A wheel works where it was installed: its native library computes what PyTorch does."""

import torch

from lapefast import ops
from lapefast.ops.backends import native

assert native.library is not None, native.missing()
gate, up = torch.randn(70, 131), torch.randn(70, 131)
counts, flags = torch.zeros(1, 131, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
product = ops.profile(gate, up, "relu", 0.0, None, counts, None, None, None, flags, backend="cpu")
assert torch.equal(product, gate.relu() * up)
assert torch.equal(counts[0], (gate > 0).sum(0))
print(f"{native.library.__file__}: {native.library.isa()}")
