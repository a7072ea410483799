"""`make dist`: the sdist, the wheel built from it, and README's example on that wheel in new environments.

``python tests/dist.py PYTHON ...``: with these interpreters, else this one; ``--built``: what is in dist/.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

EXAMPLE = """
import sys, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)  # no download
transformers.AutoModelForCausalLM.from_pretrained = lambda name: LlamaForCausalLM(config)
names = {}
exec(sys.argv[1], names)
import mica.fast
model, tokens = names["model"], torch.arange(16)[None]
model(input_ids=tokens, labels=tokens).loss.backward()
assert mica.fast.explain(model).counts() == {"reference": 14}
assert mica.__file__.startswith(sys.prefix), mica.__file__
print(mica.__version__, "on Python", sys.version.split()[0], "with torch", torch.__version__)
"""


def run(*command, **options) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)


def build() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(ROOT / "build/lib", ignore_errors=True)  # setuptools puts old files from there into wheels
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())


def check(python: str) -> None:
    """README's example on the wheel, in an environment made with this interpreter."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder, "Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        run(inside, "-m", "pip", "install", "-q", *DIST.glob("*.whl"))
        run(inside, "-m", "pip", "check")
        run(inside, "-c", EXAMPLE, example[1], cwd=folder)
        run(inside, "-m", "mica", "--version", cwd=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--built", action="store_true")
    args = parser.parse_args()
    if not args.built:
        build()
    for python in args.pythons:
        check(python)
