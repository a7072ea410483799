"""The report of a result: its tables, what ran and what did not, and the command that writes it."""

import json
import subprocess
import sys

import pytest

from bench.report import __main__ as command
from bench.report.markdown import group_table, report
from bench.results import names
from bench.results.names import BACKWARD, BARE, COPY, DEVICE_TIME, FAST, FORWARD, GRAPH, STOCK, STOCK_16, WALL
from bench.results.schema import Group, Result, Timing
from tests.support.bench_results import a_group

MACHINE = {"cpu": "A", "device": "cpu", "threads": 2, "torch": "2.9", "commit": "abcdef", "size": "quick"}
GPU = {**MACHINE, "device": "a GPU"}
SHAPE = {"suite": "layer", "out": 64, "in": 32, "rank": 8, "dtype": "bfloat16"}


def layer(tokens, fast=2.2, facts=None, name="layer", **axes):
    medians = {BARE: 1.0, STOCK: 2.0, STOCK_16: 1.5, FAST: fast}
    return [
        a_group(
            f"{name}, {tokens} tokens, {part}",
            {**SHAPE, "tokens": tokens, "pass": part, **axes},
            medians,
            facts,
        )
        for part in (FORWARD, BACKWARD)
    ]


def text(groups, machine=MACHINE, **others):
    return report(Result(machine, groups, **others))


def headings(text):
    return [line for line in text.splitlines() if line.startswith("#")]


def test_the_table_of_layers_has_ratios_and_what_is_saved():
    saved = {STOCK: {"saved_mb": 8.0}, FAST: {"saved_mb": 4.0}}
    markdown = text(layer(512, fast=1.6) + layer(128, facts=saved))
    rows = [line for line in markdown.splitlines() if line.startswith("| ")][-2:]
    ratios = "2.000 (2.00–2.00) | 2.200 (2.20–2.20) | 1.100 (1.10–1.10) | 0.750 (0.75–0.75)"
    assert rows[0] == f"| 128 | 64 x 32 | 8 | 2e+03 | {ratios} | 8 → 4 |"
    assert rows[1].startswith("| 512 | 64 x 32 | 8 | 2e+03 | 2.000 (2.00–2.00) | 1.600")
    assert "these compiled" not in markdown
    assert "No number" not in markdown


def test_tables_are_by_clock_the_devices_first():
    clocks = {WALL: 2.2, GRAPH: 1.5, DEVICE_TIME: 1.6}
    saved = {STOCK: {"saved_mb": 8.0}, FAST: {"saved_mb": 4.0}}  # noted once, with the wall clock
    groups = []
    for clock, fast in clocks.items():
        groups += layer(128, fast, saved if clock == WALL else None, clock=clock)
        groups.append(
            a_group(f"a step, {clock}", {"suite": "step", "clock": clock}, {STOCK: 2.0, FAST: fast})
        )
    markdown = text(groups, GPU)
    tables = [line for line in headings(markdown) if line.startswith("###")]
    of = [DEVICE_TIME, GRAPH, WALL]
    assert tables == [
        *(f"### Layers, bfloat16, forward + backward, {clock}" for clock in of),
        *(f"### a step, {clock}" for clock in of),
    ]
    rows = [line for line in markdown.splitlines() if line.startswith("| 128 |")]
    assert [row.split(" | ")[5][:5] for row in rows] == ["1.600", "1.500", "2.200"]
    assert all(row.endswith("| 8 → 4 |") for row in rows)


def test_the_table_of_a_group_has_a_row_per_implementation():
    facts = {FAST: {"saved_mb": 140.0}}
    markdown = text([a_group("a step", {"suite": "step"}, {BARE: 4.0, STOCK: 6.0, FAST: 4.5}, facts)])
    assert headings(markdown)[-2:] == ["## Step", "### a step"]
    assert "| mica.fast | 4.5 | 1.125 (1.12–1.12) | 0.750 (0.75–0.75) | 140 |" in markdown
    assert "| stock PEFT | 6 | 1.500 (1.50–1.50) | 1.000 (1.00–1.00) |  |" in markdown


def test_the_column_of_overheads_is_there_where_both_are():
    timings = {name: Timing([1.0 * i, 2.0 * i]) for i, name in enumerate((BARE, names.LORA, FAST), 1)}
    header = group_table(Group("step", {}, timings)).splitlines()[2]
    assert header.endswith("| overhead ÷ that of PEFT LoRA |")
    del timings[BARE]
    assert "overhead" not in group_table(Group("step", {}, timings))


def test_kernels_are_compared_with_a_copy():
    axes = {"suite": "kernels", "kernel": "grad_a", "tokens": 8192, "features": 4096, "rank": 16}
    groups = [
        a_group(
            f"grad_a, {clock}",
            {**axes, "dtype": "bfloat16", "clock": clock},
            {COPY: 1e-4, "64 x 64": 1.25e-4, "32 x 32": 2e-4},
            facts,
        )
        for clock, facts in ((WALL, {COPY: {"bytes": 2e8}, "64 x 64": {"bytes": 1e8}}), (DEVICE_TIME, {}))
    ]
    markdown = text(groups, GPU)
    assert headings(markdown)[-3:] == ["## Kernels", "### Device time", "### Wall clock"]
    device = markdown[markdown.index("### Device time") : markdown.index("### Wall clock")]
    shape = "grad_a | 8192 x 4096, r = 16, bfloat16"
    assert f"| {shape} | copy | 100 | 2000 | 1.000 (1.00–1.00) |" in device
    assert f"| {shape} | 64 x 64 | 125 | 800 | 0.400 (0.40–0.40) |" in device
    assert f"| {shape} | 32 x 32 | 200 |  |  |" in device


@pytest.mark.parametrize("implementation", [BARE, STOCK, FAST])
@pytest.mark.parametrize("machine", [MACHINE, GPU])
def test_an_implementation_without_a_number_leaves_the_others(implementation, machine):
    groups = layer(128)
    for group in groups:
        del group.timings[implementation]
    markdown = text(groups, machine)
    assert "| 128 | 64 x 32 | 8 |" in markdown
    assert "0.750 (0.75–0.75)" in markdown or implementation == STOCK


def test_refusals_are_listed_with_their_implementation_and_reason():
    refused = [{"group": "a", "why": "wrong"}, {"group": "b", "implementation": FAST, "why": "died"}]
    markdown = text([], refused=refused)
    assert "**No number**, and why:\n\n- a: wrong\n- b, mica.fast: died\n" in markdown


def test_stages_have_a_state_and_skipped_is_not_passed():
    counts = [
        ("passed", 5, 0, 0, "passed"),
        ("passed", 5, 0, 2, "**passed but for 2 skipped**"),
        ("passed", 0, 0, 7, "**nothing ran**"),
        ("passed", 0, 0, 0, "**nothing ran**"),
        ("failed", 3, 1, 0, "**failed**"),
        ("skipped", 0, 0, 0, "**skipped**"),
    ]
    stages = [
        {"stage": f"s{i}", "state": state, "seconds": 1.5, "passed": a, "failed": b, "skipped": c}
        for i, (state, a, b, c, _) in enumerate(counts)
    ]
    stages.append(
        {"stage": "last", "state": "hung", "was_doing": {"group": "a cell", "implementation": FAST}}
    )
    markdown = text([], stages=stages)
    for i, (_, a, b, c, state) in enumerate(counts):
        assert f"\n| s{i} | {state} | 1.5 | {a} | {b} | {c} |  |\n" in markdown
    assert "\n| last | **hung** |  |  |  |  | a cell, mica.fast |\n" in markdown
    assert "## What ran" not in text([])


def test_checks_that_did_not_pass_are_named_with_why():
    outcomes = {"a": ("passed", None), "b": ("failed", "0.1 is off"), "c": ("skipped", "no GPU")}
    checks = [
        {"stage": "kernels", "name": name, "outcome": outcome, **({"why": why} if why else {})}
        for name, (outcome, why) in outcomes.items()
    ]
    markdown = text([], checks=checks)
    assert "3 checks: 1 passed, 1 failed, 1 skipped." in markdown
    failed, skipped = markdown.index("**Failed**"), markdown.index("**Skipped, so")
    assert (
        failed
        < markdown.index("- kernels, b: 0.1 is off\n")
        < skipped
        < markdown.index("- kernels, c: no GPU\n")
    )
    assert "kernels, a" not in markdown
    assert "**Failed**" not in text([], checks=checks[:1])
    assert "## Checks" not in text([])


def test_the_machine_is_named_and_a_dry_run_measures_nothing():
    machine = "cpu A, device a GPU, threads 2, torch 2.9; commit abcdef, "
    markdown = text([], GPU).splitlines()
    assert markdown[2].startswith(machine)
    assert ", no bf16 instructions; commit" in text(
        [], {**GPU, "bf16 instructions": "", "instructions limited to": ""}
    )
    assert ", bf16 instructions amx, device" in text([], {**GPU, "bf16 instructions": "amx"})
    dry = text([], {**MACHINE, "device": "dry run"}).splitlines()
    assert dry[2].startswith("**A dry run")
    assert dry[2].endswith("not measurements.**")
    assert not any(line.startswith("- **") for line in dry)  # there is no summary of it
    assert "dry" not in "".join(markdown)
    assert text([], {}).splitlines()[2].startswith("The machine is unknown")


def test_targets_are_shown_for_an_accelerator_only():
    assert "## Targets" not in text(layer(128))
    for groups, machine in (([], GPU), (layer(128, clock=WALL), {})):
        markdown = text(groups, machine)
        assert "## Targets" in markdown
        assert (
            "| dA = gᵀ x: bandwidth ÷ that of a copy; from 4096 tokens | ≥ 0.8 |  | not measured |"
            in markdown
        )


@pytest.fixture
def file(tmp_path):
    Result(MACHINE, [one for tokens in (1, 2, 4) for one in layer(tokens)]).save(tmp_path / "run.json")
    return tmp_path / "run.json"


def test_the_command_writes_the_report_and_its_pictures(file, capsys):
    command.main([str(file)])
    markdown = file.with_suffix(".md").read_text()
    assert capsys.readouterr().out == markdown
    assert "](run-overhead-by-tokens.svg)" in markdown
    assert [path.name for path in file.parent.glob("*.svg")] == ["run-overhead-by-tokens.svg"]
    command.main([str(file), "--no-pictures"])
    assert "svg" not in file.with_suffix(".md").read_text()


def test_the_command_refuses_a_file_that_is_not_there(file, capsys):
    with pytest.raises(SystemExit):
        command.main([str(file.with_suffix(".jsonl"))])
    assert "there is no" in capsys.readouterr().err
    assert len(Result.load(file).groups) == 6


def test_without_matplotlib_there_is_a_report_without_pictures(file):
    program = "import sys; sys.modules['matplotlib'] = None; from bench.report.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"\n{command.NO_MATPLOTLIB}\n" in done.stdout
    assert file.with_suffix(".md").read_text() == done.stdout
    assert not [*file.parent.glob("*.svg")]


@pytest.mark.parametrize("machine", [MACHINE, None])
def test_a_journal_is_folded_into_the_result(machine, tmp_path):
    samples = [
        {
            "kind": "sample",
            "cell": group.name,
            "group": group.name,
            "axes": group.axes,
            "implementation": implementation,
        }
        | {"seconds": one.median, "facts": {}}
        for group in layer(128)
        for implementation, one in group.timings.items()
    ]
    died = {
        "kind": "refused",
        "group": "layer, 128 tokens",
        "implementation": STOCK_16,
        "why": "the process died",
    }
    file = tmp_path / "run.jsonl"
    file.write_text("\n".join(map(json.dumps, [*samples, died])) + '\n{"kind": "sam')
    if machine:
        Result(machine, []).save(tmp_path / "run.json")
    markdown = command.write(file, with_pictures=False)
    assert "| 128 | 64 x 32 | 8 | 2e+03 |" in markdown
    assert "- layer, 128 tokens, stock PEFT, adapters in the base dtype: the process died" in markdown
    assert ("cpu A" in markdown) == bool(machine)
    assert (tmp_path / "run.md").read_text() == markdown
    result = Result.load(tmp_path / "run.json")
    assert result.machine == (machine or {})
    assert [{*group.timings} for group in result.groups] == [{BARE, STOCK, FAST}] * 2
