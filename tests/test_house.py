"""The rules of the house: how long files are, who imports whom, and which names are public."""

import argparse

import pytest

import mica
import mica.fast
import mica.ops
import mica.subspace
from mica.cli import parser
from tests.support.imports import MODULES, ROOT, circular, imported, mirrored, private_uses, tree
from tests.support.processes import printed_by

# What a user's script may rest on. A name that goes is a breaking change, a new one a promise.
PUBLIC = {
    mica: ["MinorSubspace", "__version__", "minor_subspace"],
    mica.subspace: ["MinorSubspace", "minor_subspace"],
    mica.ops: [
        "call_counts",
        "mica_experts_linear",
        "mica_linear",
    ],
    mica.fast: [
        "Explanation",
        "MergeReport",
        "call_counts",
        "clear_caches",
        "disable",
        "disabled",
        "enable",
        "explain",
        "is_enabled",
        "merge_report",
        "uninstall",
    ],
}
OPTIONS = {
    "run": "-m --explain --no-lora --compute-dtype --device --recompute --memory -c script arguments",
    "adapt": "--model --adapter --method --dtype --quantize --trust-remote-code "
    "--text --text-field --dataset-config --held-out --held-out-text --retain "
    "--sequence-length --packing --recipe --rank --alpha --target-modules --experts "
    "--dropout --train-embeddings --embedding-learning-rate --keep-best --patience "
    "--steps --epochs --batch-size --gradient-accumulation-steps --learning-rate --scheduler --warmup-ratio "
    "--weight-decay --max-grad-norm --optimizer --gradient-checkpointing --memory --seed "
    "--eval-steps --eval-blocks --log-steps --report-to "
    "--output --save-steps --resume --config",
    "compare": "--model --text --retain --sequence-length --rank --batch-size "
    "--methods --rates --budget --steps --seeds --output --resume",
    "transfer": "--adapter --to --output --dtype --trust-remote-code",
    "inspect": "model --rank --target-modules --dtype --json --trust-remote-code",
    "fits": "model --tokens --batch-size --rank --target-modules --dropout --dora --dtype "
    "--trust-remote-code --bits --loss --memory --json",
    "doctor": "",
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_names(module):
    assert sorted(module.__all__) == PUBLIC[module]
    assert all(hasattr(module, name) for name in PUBLIC[module])


def test_command_line():
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    options = {
        name: {(action.option_strings or [action.dest])[0] for action in command._actions[1:]}
        for name, command in commands.choices.items()
    }
    assert options == {name: set(words.split()) for name, words in OPTIONS.items()}


def test_a_reader_can_hold_a_file():
    """About 400 lines are read in one sitting; a file that needs many more holds more than one concept."""
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > 500} == {}


def test_no_private_name_of_another_module_is_used():
    """But by a test: that of mica.x, tests.mica.test_x or test_x_y, may look into mica.x."""
    faults = []
    for module in MODULES:
        tested = mirrored(module) if module.startswith("tests.") else ""
        uses = private_uses(tree(module))
        faults += [(module, use) for use in uses if not tested.startswith(use.rpartition(".")[0])]
    assert not faults


def test_no_import_circle():
    """In the product not by imports within functions either."""
    assert not circular(MODULES, at_import=True)
    assert not circular([module for module in MODULES if module.startswith("mica")])


def test_imports_go_downwards():
    """kernels <- solver, operators <- mica.fast <- mica.cli; the product knows neither tests nor bench."""
    product = [module for module in MODULES if module.startswith("mica")]
    upwards = [
        (module, other) for module in product for other in imported(module) if _layer(other) > _layer(module)
    ]
    assert not upwards


def _layer(module: str) -> int:
    if not module.startswith("mica"):
        return 4
    part = f"{module}.".split(".")[1]
    return {"kernels": 0, "fast": 2, "cli": 3, "__main__": 3}.get(part, 1)


def test_the_solver_needs_neither_peft_nor_triton():
    """Nor do the operators on the reference path: they are not even imported."""
    code = """
import sys
import torch
import mica.ops, mica.paths.reference_path
from mica import minor_subspace
certified = minor_subspace(torch.randn(8, 8), 2).certified
print(certified, [name for name in ("peft", "triton", "transformers") if name in sys.modules])
"""
    assert printed_by(code, cwd=ROOT).strip() == "True []"
