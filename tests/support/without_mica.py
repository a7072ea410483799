"""Saved adapters in a process in which this package cannot be imported."""

import torch

from tests.support.processes import printed_by

SCRIPT = """
import sys, warnings
sys.modules["mica"] = None  # an import of it would fail
import peft, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for base, adapter, how, logits in zip(*[iter(sys.argv[2:])] * 4):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "auto":
            model = peft.AutoPeftModel.from_pretrained(adapter)
        elif how == "auto for a task":
            model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
        else:
            file = {"gguf_file": how, "dtype": torch.float32} if how.endswith(".gguf") else {}
            model = AutoModelForCausalLM.from_pretrained(base, **file)
            if how == "transformers":
                model.load_adapter(adapter)
            else:
                model = peft.PeftModel.from_pretrained(model, adapter)
    texts = [str(w.message) for w in caught if "deprecated" not in str(w.message)]
    assert not texts, texts
    with torch.no_grad():
        torch.save(model.eval()(input_ids=ids).logits, logits)
"""


def logits_without_mica(folder, ids, *loads):
    """Logits of each (base, adapter, how): "peft", "transformers", "auto", "auto for a task" or a GGUF file's
    name. PEFT must not warn of anything.
    """
    torch.save(ids, folder / "ids.pt")
    files = [folder / f"logits {number}" for number in range(len(loads))]
    arguments = [part for load, file in zip(loads, files, strict=True) for part in (*load, file)]
    printed_by(SCRIPT, folder / "ids.pt", *arguments)
    return [torch.load(file) for file in files]
