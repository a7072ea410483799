"""The static gate (``make static``): every shipped kernel configuration, for every target, without a GPU.

For each one: it compiles; no spills and no stack; tensor-core instructions are there; fewer than 255
registers; shared memory under the target's limit; no narrow global access in a main loop, which is one with
tensor-core instructions and no loop inside. Narrow is below 128 bits, less where a case says so. A kernel
without a main loop is one tile: all of its stores count, and all but a few of its loads (bias, seed, h).

One table, a line a kernel and target. The launches are those that the launchers plan, on tensors without
memory. Compiled kernels are kept in Triton's own cache, findings beside them: only a first run is slow.
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
from tests.support.static_cases import TARGETS, Case, cases

VERSION = 5  # of what is looked for: raise it, and kept findings are made anew
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
    gpu = GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source(case.launch, case.shifted), target=gpu, options=case.launch.options())


def inspect(target: str, case: Case, kernel) -> Finding:
    finding = Finding(shared=kernel.metadata.shared)
    _inspect_code(case, kernel.asm["cubin"], finding)
    if not finding.tensor_core:
        finding.faults.append("no tensor-core instruction")
    # with an address for each number, which Triton 3.6 keeps in up to 255: no spill is enough
    if finding.registers >= 255 and not case.shifted:
        finding.faults.append(f"{finding.registers} registers")
    if finding.shared > configs.SHARED_MEMORY[target]:
        finding.faults.append(f"{finding.shared} bytes of shared memory")
    return finding


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
    _judge_widths(case, jumps, products, accesses, finding)


def _judge_widths(case: Case, jumps, products, accesses, finding: Finding) -> None:
    """jumps: (first, last) place of every loop; accesses: (place, is a store, bits, instruction)."""
    if not case.is_aligned:
        return
    main = [
        (first, last)
        for first, last in jumps
        if any(first <= place <= last for place in products)
        and not any((a, b) != (first, last) and first <= a and b <= last for a, b in jumps)
    ]

    narrow = [access for access in accesses if access[2] < case.load_bits]
    if main:
        narrow = [access for access in narrow if any(first <= access[0] <= last for first, last in main)]
    else:
        loads = [access for access in narrow if not access[1]]
        narrow = [access for access in narrow if access[1]] + loads[case.few_loads :]
    if narrow:
        finding.faults.append(
            f"{len(narrow)} narrow global accesses, such as {' '.join(narrow[0][3].split())}"
        )


def examine(target: str, case: Case, kept: dict[str, dict]) -> tuple[str, Finding]:
    """(key of the finding, finding) of one case; a compiler's error is a finding too."""
    try:
        kernel = compile_for(target, case)
        key = f"{VERSION} {kernel.hash} {case.is_aligned} {case.load_bits} {case.few_loads}"
        return key, Finding(**kept[key]) if key in kept else inspect(target, case, kernel)
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return "", Finding(faults=[f"does not compile: {text[:200]}"])


def examine_target(arguments: tuple[str, int, int, bool, dict]) -> list[tuple[str, str, str, Finding]]:
    """Every ``step``-th case of one target: (kernel, label, key, finding) each."""
    target, start, step, is_quick, kept = arguments
    own = [case for case in cases(target) if case.is_quick or not is_quick][start::step]
    return [(case.kernel, case.label, *examine(target, case, kept)) for case in own]


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
    targets = args.target or list(TARGETS)
    step = args.processes
    jobs = [(target, part, step, args.quick, kept) for target in targets for part in range(step)]
    rows: dict[tuple[str, str], list[tuple[str, Finding]]] = defaultdict(list)
    with ProcessPoolExecutor(args.processes) as pool:
        for job, results in zip(jobs, pool.map(examine_target, jobs), strict=True):
            for kernel, label, key, finding in results:
                rows[kernel, job[0]].append((label, finding))
                if key:
                    kept[key] = asdict(finding)
                if args.verbose:
                    numbers = finding.registers, finding.shared, finding.tensor_core
                    print(job[0], kernel, label, *numbers, flush=True)
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(kept))

    print(f"{'kernel':18} {'target':8} {'compiled':>8} {'registers':>9} {'shared KiB':>10}  tensor cores")
    faults = []
    for (kernel, target), findings in sorted(rows.items()):
        good = [finding for _, finding in findings if not finding.faults]
        most = max((finding.registers for _, finding in findings), default=0)
        shared = max((finding.shared for _, finding in findings), default=0) / 1024
        cores = "/".join(sorted({finding.tensor_core for _, finding in findings} - {""})) or "-"
        print(f"{kernel:18} {target:8} {len(good):>4}/{len(findings):<3} {most:>9} {shared:>10.0f}  {cores}")
        faults += [f"{target} {kernel} {label}: {'; '.join(f.faults)}" for label, f in findings if f.faults]
    total = sum(map(len, rows.values()))
    seconds = time.monotonic() - start
    print(f"{total} compilations, {len(faults)} at fault, {seconds:.0f} s, triton {triton.__version__}")
    print("\n".join(faults))
    return 1 if faults or not total else 0


if __name__ == "__main__":
    sys.exit(main())
