"""What the compiler made of GPU kernels: their resources, instructions and main loops.

`read` takes a cubin or a host library with CUDA code in it. It needs cuobjdump, which comes with
Triton and with the CUDA toolkit, and no GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from control_flow import Code, Instruction, main_path, wide


class SassError(RuntimeError):
    """No tool to read with, or no device code."""


@dataclass(frozen=True)
class Kernel:
    target: str  # "sm_90"
    name: str  # without parameters; demangled where c++filt is at hand
    registers: int
    stack: int
    shared: int  # bytes; from sm_90 on the system takes 1,024 of them
    disassembly: str = field(repr=False)

    @cached_property
    def code(self) -> Code:
        return Code(
            Instruction(int(address, 16), predicate, opcode, operands)
            for address, predicate, opcode, operands in _INSTRUCTION.findall(self.disassembly)
        )

    @property
    def local_accesses(self) -> int:
        """Accesses to local memory: registers spilled, or arrays that could not be registers."""
        return self.code.count("LDL", "STL")

    @cached_property
    def main_path(self) -> Code:
        return main_path(self.code)

    def faults(self, operands: int, product: bool) -> list[str]:
        """What a kernel for aligned data must not have, if it reads `operands` tensors."""
        found = []
        if self.stack or self.local_accesses:
            found.append(f"{self.stack} bytes of stack, {self.local_accesses} local accesses")
        if fences := self.code.count("MEMBAR"):
            found.append(f"{fences} memory barriers")
        if self.main_path.calls:
            found.append("calls a function in the main loop")
        loads, stores = self.main_path.loads, self.code.stores
        rows, rest = divmod(len(wide(loads)), operands)
        # A row's index is a narrow load by right; nothing of ours but halves is below 4 bytes.
        if rows == 0 or rest or len(loads) > rows * (operands + 1) or min(self.code.loads) < 4:
            found.append(f"narrow loads: bytes {loads} in the main loop")
        if bool(stores) != product or stores != wide(stores):
            found.append(f"narrow stores: bytes {stores}")
        return found


def read(source: Path | str | bytes, target: str | None = None) -> list[Kernel]:
    """Every kernel, for one target or all, in a file or in the bytes of a cubin."""
    if isinstance(source, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(source)
            file.flush()
            return read(file.name, target)
    command = [_cuobjdump(), "-res-usage", "-sass", str(source)]
    command += ["-arch", target] if target else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SassError(f"{source}: {(done.stderr or done.stdout).strip()}")
    return list(_kernels(_demangled(done.stdout)))


def _cuobjdump() -> str:
    # Triton's first: it knows the targets of Triton's compiler, which a toolkit may be too old for.
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    if bundled is not None and bundled.exists():
        return str(bundled)
    if found := shutil.which("cuobjdump"):
        return found
    raise SassError("cuobjdump is missing: install Triton or the CUDA toolkit")


def _demangled(text: str) -> str:
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


# cuobjdump prints, for each target, the resources of all kernels and then the code of each.
_HEADING = re.compile(
    r"^\s+(?:"
    r"Function (?P<described>.+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+).*"
    r"|code for (?P<target>\w+)"
    r"|Function : (?P<function>.+)"
    r")$",
    re.MULTILINE,
)
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE
)


def _kernels(text: str) -> Iterator[Kernel]:
    target, resources = "", {}
    headings = list(_HEADING.finditer(text))
    for heading, following in itertools.zip_longest(headings, headings[1:]):
        described, *numbers = heading.group(1, 2, 3, 4)
        if described:
            resources[described] = tuple(map(int, numbers))
        elif heading["target"]:
            target = heading["target"]
        else:
            name = heading["function"]
            disassembly = text[heading.end() : following.start() if following else None]
            yield Kernel(target, _short(name), *resources[name], disassembly)


def _short(name: str) -> str:
    """Without return type and parameters, which templates' names have."""
    depth = 0
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:position]
    return name
