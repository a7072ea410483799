"""The static gate (``make static``): every shipped kernel configuration, for every target, without a GPU.

For each one: it compiles; no spills and no stack; tensor-core instructions are there; fewer than 255
registers; shared memory under the target's limit; no narrow global access in a main loop, which is one with
tensor-core instructions and no loop inside. Narrow is below 128 bits, less where a case says so. A kernel
without a main loop is one tile: all of its stores count, and all but a few of its loads (bias, seed, h).
A kernel that adds up columns has no products.
Where `grad_a` multiplies x first, its main loop has products of four warps and no synchronous load.

AMD's targets, with 16-bit products: it compiles; no scratch memory; matrix instructions are there; shared
memory under the limit. These kernels are never launched.

The table has a line a kernel and target. The launches are those that the launchers plan, on tensors without
memory. Compiled kernels are kept in Triton's own cache,
findings beside them: only a first run is slow.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("the static gate compiles kernels: unset TRITON_INTERPRET")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mica.kernels import configs
from tests.support.static_cases import AMD, TARGETS, Case, cases

VERSION = 6  # of what is looked for: raise it, and kept findings are made anew
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Finding:
    registers: int = 0
    shared: int = 0
    tensor_core: str = ""
    faults: list[str] = field(default_factory=list)


@dataclass
class Examined:
    """A case, without what another process cannot be given, and what was found."""

    target: str
    kernel: str
    label: str
    key: str  # of the finding, "" for one that is not kept
    finding: Finding


def source(launch, shifted: tuple[str, ...] = ()) -> ASTSource:
    """What Triton's own launcher would compile: None and 1 are constants, what 16 divides is marked.

    ``shifted``: the pointers that it does not divide.
    """
    signature, constants, attributes = {}, {}, {}
    unspecialised = launch.kernel.do_not_specialize or ()
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.meta:
            signature[name], constants[name] = "constexpr", launch.meta[name]
            continue
        value = launch.args[name]
        is_divided = name not in shifted
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name], is_divided = "fp32", False
        elif value is None or (value == 1 and name not in unspecialised):
            signature[name], constants[name], is_divided = "constexpr", value, False
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            is_divided = value % 16 == 0 and name not in unspecialised
        if is_divided:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(target: str, case: Case):
    gpu = GPUTarget("hip", target, 64) if target in AMD else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source(case.launch, case.shifted), target=gpu, options=case.launch.options())


def inspect(target: str, case: Case, kernel) -> Finding:
    finding = Finding(shared=kernel.metadata.shared)
    if target in AMD:
        _inspect_amd(kernel.asm["amdgcn"], finding)
    else:
        _inspect_code(case, kernel.asm["cubin"], finding)
        # with an address for each number, which Triton 3.6 keeps in up to 255: no spill is enough
        if finding.registers >= 255 and not case.shifted:
            finding.faults.append(f"{finding.registers} registers")
    if case.has_products and not finding.tensor_core:
        finding.faults.append("no tensor-core instruction")
    if finding.shared > configs.SHARED_MEMORY[target]:
        finding.faults.append(f"{finding.shared} bytes of shared memory")
    return finding


def _inspect_amd(text: str, finding: Finding) -> None:
    """What the assembler's text says of itself: scratch memory is where vector registers are spilled to."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    finding.registers = number("vgpr_count")
    spilled, scratch = number("vgpr_spill_count"), number("private_segment_fixed_size")
    if spilled or scratch:
        finding.faults.append(f"spills {spilled} registers ({scratch} bytes of scratch memory)")
    if re.search(r"\bv_mfma_", text):
        finding.tensor_core = "MFMA"


def _inspect_code(case: Case, cubin: bytes, finding: Finding) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    finding.registers, stack, local = (int(number) for number in usage.groups())
    if stack or local or re.search(r"\b(LDL|STL)\b", text):
        finding.faults.append(f"spills or a stack ({stack} + {local} bytes)")
    match = re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", text)
    finding.tensor_core = match.group(1) if match else ""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)
    code = [(int(address, 16), instruction) for address, instruction in lines]
    jumps = []
    for address, instruction in code:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)
        if jump and int(jump.group(1), 16) < address:
            jumps.append((int(jump.group(1), 16), address))
    bits = r"\.(128|64|U?S?16|U?S?8)\b"
    accesses = []
    for address, instruction in code:
        access = re.search(r"\b(LDGSTS|LDG|STG)\b", instruction)
        if access:
            width = re.search(bits, instruction)
            size = int(width.group(1).lstrip("US")) if width else 32
            accesses.append((address, access.group(1) == "STG", size, instruction))
    products = [address for address, instruction in code if re.search(r"MMA\b", instruction)]
    main = [
        (first, last)
        for first, last in jumps
        if any(first <= place <= last for place in products)
        and not any((a, b) != (first, last) and first <= a and b <= last for a, b in jumps)
    ]
    if case.is_aligned:
        _judge_widths(case, main, accesses, finding)
    if case.is_asynchronous:
        _judge_asynchrony(main, code, finding)


def _judge_asynchrony(main, code, finding: Finding) -> None:
    """main: (first, last) place of every main loop; code: (place, instruction)."""
    inside = [text for place, text in code if any(first <= place <= last for first, last in main)]
    if not any(re.search(r"\b(HGMMA|UTC\w*MMA)\b", text) for text in inside):
        finding.faults.append("no product of four warps in a main loop")
    synchronous = [text for text in inside if re.search(r"\bLDG\b", text)]
    if synchronous:
        example = " ".join(synchronous[0].split())
        finding.faults.append(f"{len(synchronous)} synchronous loads in a main loop, such as {example}")


def _judge_widths(case: Case, main, accesses, finding: Finding) -> None:
    """main: (first, last) place of every main loop; accesses: (place, is a store, bits, instruction)."""
    narrow = [access for access in accesses if access[2] < case.load_bits]
    if main:
        narrow = [access for access in narrow if any(first <= access[0] <= last for first, last in main)]
    else:
        loads = [access for access in narrow if not access[1]]
        stores = [access for access in narrow if access[1]]
        narrow = stores[case.few_stores :] + loads[case.few_loads :]
    if narrow:
        finding.faults.append(
            f"{len(narrow)} narrow global accesses, such as {' '.join(narrow[0][3].split())}"
        )


def examine(target: str, case: Case, kept: dict[str, dict]) -> tuple[str, Finding]:
    """(key of the finding, finding) of one case; a compiler's error is a finding too."""
    try:
        kernel = compile_for(target, case)
        asked = case.is_aligned, case.load_bits, case.few_loads, case.is_asynchronous
        key = " ".join(map(str, (VERSION, kernel.hash, *asked)))
        return key, Finding(**kept[key]) if key in kept else inspect(target, case, kernel)
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return "", Finding(faults=[f"does not compile: {text[:200]}"])


def examine_part(target: str, start: int, step: int, is_quick: bool, kept: dict) -> list[Examined]:
    """Every ``step``-th case of one target."""
    found = []
    for case in [case for case in cases(target) if case.is_quick or not is_quick][start::step]:
        key, finding = examine(target, case, kept)
        found.append(Examined(target, case.kernel, case.label, key, finding))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="only this target (may be repeated)"
    )
    parser.add_argument("--quick", action="store_true", help="default configurations, main dtypes")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="a line for every compilation")
    args = parser.parse_args()
    start = time.monotonic()
    store = Path(triton.knobs.cache.dir) / "mica-static-gate.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    step = args.processes
    with ProcessPoolExecutor(step) as pool:
        jobs = [
            pool.submit(examine_part, target, part, step, args.quick, kept)
            for target in args.target or TARGETS
            for part in range(step)
        ]
        found = [one for job in jobs for one in job.result()]
    kept |= {one.key: asdict(one.finding) for one in found if one.key}
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(kept))

    rows: dict[tuple[str, str], list[Examined]] = defaultdict(list)
    for one in found:
        rows[one.kernel, one.target].append(one)
        if args.verbose:
            numbers = one.finding.registers, one.finding.shared, one.finding.tensor_core
            print(one.target, one.kernel, one.label, *numbers)
    print(f"{'kernel':18} {'target':8} {'compiled':>8} {'registers':>9} {'shared KiB':>10}  tensor cores")
    for (kernel, target), examined in sorted(rows.items()):
        findings = [one.finding for one in examined]
        good = sum(not finding.faults for finding in findings)
        most = max(finding.registers for finding in findings)
        shared = max(finding.shared for finding in findings) / 1024
        cores = "/".join(sorted({finding.tensor_core for finding in findings} - {""})) or "-"
        print(f"{kernel:18} {target:8} {good:>4}/{len(findings):<3} {most:>9} {shared:>10.0f}  {cores}")
    bad = [one for one in found if one.finding.faults]
    seconds = time.monotonic() - start
    print(f"{len(found)} compilations, {len(bad)} at fault, {seconds:.0f} s, triton {triton.__version__}")
    for one in bad:
        print(f"{one.target} {one.kernel} {one.label}: {'; '.join(one.finding.faults)}")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
