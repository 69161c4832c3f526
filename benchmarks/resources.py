"""What each GPU kernel takes of the machine, read from its compiled code.

    python benchmarks/resources.py [--triton] [--target sm_90] [--only REGEX]

No GPU is needed and nothing is measured. Registers, shared memory and accesses to local memory are
facts; so are the instructions and bytes that the main path (`control_flow.py`) takes per element.
What bounds the kernel is *predicted* from them:

    issue time per element  = instructions / 32 / (SMs * 4 * clock)
    memory time per element = bytes / bandwidth

because each of the four schedulers of an SM issues one instruction for 32 threads per clock. The
share is issue over memory time: well below 100% the instructions hide behind memory. Latency,
occupancy and the slower units are not in it; only a GPU can tell. The defaults are an H200's, whose
bandwidth is that of a copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from control_flow import wide
from sass import Kernel, SassError, read

TARGETS = ("sm_80", "sm_90", "sm_100")
_SOURCES = Path(__file__).parents[1] / "csrc"
_ITEMSIZES = {"Float32": 4, "Float16": 2, "BFloat16": 2}


@dataclass(frozen=True)
class Case:
    """A compiled kernel and what it works on."""

    what: str
    kernel: Kernel
    itemsize: int
    operands: int  # matrices that are read: gate and up, or gate alone
    product: bool = True
    aligned: bool = True  # for rows that start at multiples of 16 bytes

    @property
    def faults(self) -> list[str]:
        return self.kernel.faults(self.operands, self.product)

    @property
    def per_element(self) -> tuple[float, float] | None:
        """Instructions and bytes of the main path; None if it has no loads of 16 bytes."""
        path = self.kernel.main_path
        loaded = sum(wide(path.loads))
        if not loaded:
            return None
        elements = loaded / self.operands / self.itemsize
        return len(path) / elements, (loaded + sum(path.stores)) / elements


def native_library() -> Path | None:
    spec = importlib.util.find_spec("lapefast._native")
    return Path(spec.origin) if spec else None


def cuda_cases(library: Path, target: str | None = None, only: str = "") -> Iterator[Case]:
    """The kernels of `csrc/cuda/`, told apart by the arguments of their templates."""
    for kernel in read(library, target):
        what = re.sub(r"lapefast::(cuda::)?", "", kernel.name)
        what = re.sub(r"\((\w+)\)(\d+)", lambda found: _enumerators(found[1])[int(found[2])], what)
        match = re.fullmatch(r"(?:profile|edit)_kernel<(\w+), (.*), (\d+)>", what)
        if match is None or match[1] not in _ITEMSIZES:
            raise SassError(
                f"{library}: {kernel.name!r} is no kernel that resources.py knows; names are only "
                "readable where c++filt (of binutils) is on PATH"
            )
        if re.search(only, what):
            operands = 1 if "false" in match[2].split(", ") else 2  # the template's `gated`
            aligned = int(match[3]) > 1
            yield Case(what, kernel, _ITEMSIZES[match[1]], operands, aligned=aligned)


def _enumerators(name: str) -> list[str]:
    """An enumeration's names: compiled names hold its numbers."""
    for path in [*_SOURCES.rglob("*.h"), *_SOURCES.rglob("*.cuh")]:
        if found := re.search(rf"enum class {name}\b[^{{]*{{([^}}]*)}}", path.read_text()):
            return re.findall(r"(\w+)(?:\s*=\s*\d+)?\s*(?:,|$)", found[1].strip())
    raise SassError(f"{_SOURCES} has no enumeration {name}")


def triton_cases(
    targets: Iterable[str], specialisations: Iterable[dict] | None = None, only: str = ""
) -> Iterator[Case]:
    """The kernels of `triton_kernels/`, compiled here; by default all that models use."""
    from lapefast.triton_kernels import ahead_of_time

    for options in specialisations or ahead_of_time.specialisations():
        dtype, gated = options["dtype"], options.get("gated", True)
        words = [options["op"], str(dtype).removeprefix("torch."), options["activation"]]
        words += ["gated" if gated else "plain", "+".join(options.get("statistics", ()))]
        what = " ".join(words).rstrip()
        if not re.search(only, what):
            continue
        for target in targets:
            compiled = ahead_of_time.compile_for(ahead_of_time.TARGETS[target], **options)
            (kernel,) = read(compiled.asm["cubin"])
            product = options["op"] != "observe"
            yield Case(what, kernel, dtype.itemsize, 1 + gated, product)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, help="default: the native library in use")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels instead")
    parser.add_argument("--target", choices=TARGETS, help="default: all")
    parser.add_argument("--only", default="", help="a regular expression for kernels")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second")
    parser.add_argument("--clock", type=float, default=1.8e9, help="hertz")
    parser.add_argument("--sms", type=int, default=132, help="multiprocessors")
    arguments = parser.parse_args()
    try:
        if arguments.triton:
            targets = [arguments.target] if arguments.target else TARGETS
            cases = triton_cases(targets, only=arguments.only)
        elif library := arguments.library or native_library():
            cases = cuda_cases(library, arguments.target, arguments.only)
        else:
            sys.exit("The native library is missing: `make` builds it, --library names another.")
        print(
            f"Predicted, not measured, for {arguments.sms} SMs, {arguments.clock / 1e9:g} GHz, "
            f"{arguments.bandwidth / 1e12:g} TB/s. Local: accesses to local memory, as of spills.\n"
            f"{'target':8}{'registers':>10}{'shared':>8}{'local':>7}{'instr/elem':>12}"
            f"{'bytes/elem':>12}{'predicted issue/memory':>24}  bound by  kernel"
        )
        for case in cases:
            print(_line(case, arguments.bandwidth, arguments.clock, arguments.sms), flush=True)
    except SassError as error:
        sys.exit(str(error))


def _line(case: Case, bandwidth: float, clock: float, sms: int) -> str:
    kernel = case.kernel
    line = f"{kernel.target:8}{kernel.registers:10}{kernel.shared:8}{kernel.local_accesses:7}"
    if case.per_element is None:
        return f"{line}{'-':>12}{'-':>12}{'-':>24}  -         {case.what}"
    instructions, moved = case.per_element
    share = predicted_share(instructions, moved, bandwidth, clock, sms)
    bound = "issue" if share > 1 else "memory"
    line += f"{instructions:12.1f}{moved:12.1f}{share:24.0%}  {bound:10}{case.what}"
    return "\n".join([line, *(f"        FAULT: {fault}" for fault in case.faults if case.aligned)])


def predicted_share(
    instructions: float, moved: float, bandwidth: float, clock: float, sms: int
) -> float:
    """Issue time over memory time of an element."""
    return (instructions / 32 / (sms * 4 * clock)) / (moved / bandwidth)


if __name__ == "__main__":
    main()
