"""The ops that count and edit neurons inside the activation.

`declarations` declares each op: schema, check, fake. `backends` computes them. Importing this
package registers them as `torch.ops.lapefast.*`; the names here are the same ops without the
look-up of an overload, and `profile` and `EditTables` without the dispatcher where nobody needs it
(`straight`).
"""

from __future__ import annotations

from lapefast.ops import autograd as _autograd  # registers the Autograd kernels
from lapefast.ops.activations import ACTIVATIONS
from lapefast.ops.backends import backend_for
from lapefast.ops.declarations import edit, leave_one_out, observe, profile_
from lapefast.ops.exact import FUSED
from lapefast.ops.straight import EditTables, profile

__all__ = [
    "ACTIVATIONS",
    "EditTables",
    "FUSED",
    "backend_for",
    "edit",
    "leave_one_out",
    "observe",
    "profile",
    "profile_",
]

del _autograd
