"""What was found on this machine: versions, the native library, and who computes on each device."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from lapefast.ops import backends

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """`versions` and `native`: name -> finding. `serves`: device type -> backend or "none".

    `why_not`: (backend, device type) -> one sentence, for every backend that cannot serve a device.
    """

    versions: dict[str, str]
    native: dict[str, str]
    serves: dict[str, str]
    why_not: dict[tuple[str, str], str]

    def __str__(self) -> str:
        lines = [f"{name}: {finding}" for name, finding in (self.versions | self.native).items()]
        for device, backend in self.serves.items():
            lines.append(f"device {device}: served by backend {backend}")
            lines += [
                f"  not by {other}: {reason}"
                for (other, refused), reason in self.why_not.items()
                if refused == device
            ]
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Look at the versions, the native library and the devices; touches no GPU.

    Raises InputError if `LAPEFAST_BACKEND` names no backend.
    """
    import torch
    import transformers

    import lapefast
    from lapefast.ops.backends import cpu

    devices = ["cpu"]
    if torch.backends.cuda.is_built():
        devices.append("cuda")
    asked = os.environ.get("LAPEFAST_BACKEND") or "auto"
    serves = {device: _serving(asked, device) for device in devices}
    why_not = {
        (name, device): reason
        for device in devices
        for name in backends.BACKENDS
        if (reason := backends.why_not(name, device)) is not None
    }
    versions = {
        "lapefast": lapefast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.machine(),
    }
    if asked != "auto":
        versions["LAPEFAST_BACKEND"] = asked
    return Diagnosis(versions, cpu.library_findings(), serves, why_not)


def _serving(asked: str, device: str) -> str:
    if asked in backends.BACKENDS and backends.why_not(asked, device) is not None:
        return "none"
    backend = backends.backend_for(asked, device)
    return next(name for name, module in backends.BACKENDS.items() if module is backend)
