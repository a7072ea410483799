"""What a release needs: one version everywhere, no placeholder under a tag, a workflow that can run."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.imports import ROOT

FILLED = ["pyproject.toml", "CITATION.cff", "CHANGELOG.md", "README.md", "examples/mica.ipynb"]


def read(name: str, root: Path = ROOT) -> str:
    return (root / name).read_text(encoding="utf-8")


def version(root: Path = ROOT) -> str:
    return re.search(r'^version = "(.*)"$', read("pyproject.toml", root), re.MULTILINE)[1]


def tags() -> set[str]:
    """Those of this commit, in a clone and in a workflow that a tag has started."""
    if os.environ.get("GITHUB_REF_TYPE") == "tag":
        return {os.environ["GITHUB_REF_NAME"]}
    done = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {tag for tag in done.stdout.split() if tag.startswith("v")}


def unready(tags: set[str], root: Path = ROOT) -> list[str]:
    """What must be put right before these tags are published."""
    found = [f"{tag}: the version is {version(root)}" for tag in tags if tag != f"v{version(root)}"]
    for name in FILLED if tags else []:
        words = r"\b(OWNER|ADDRESS)\b(?!:)|\(unreleased\)"  # "OWNER:" explains it
        found += [f"{name}: {line}" for line in read(name, root).splitlines() if re.search(words, line)]
    return found


def test_a_tag_has_its_version_and_no_placeholder(tmp_path, monkeypatch):
    assert not unready(tags())
    monkeypatch.setenv("GITHUB_REF_TYPE", "tag")
    monkeypatch.setenv("GITHUB_REF_NAME", "v1.3")
    (tmp_path / "examples").mkdir()
    for name in FILLED:
        (tmp_path / name).write_text('version = "1.2"\n## 1.2 (2026-01-01)\nhttps://x/mica\n')
    assert unready(tags(), tmp_path) == ["v1.3: the version is 1.2"]
    (tmp_path / "README.md").write_text("git+ADDRESS\nx/OWNER/m\n(unreleased)\n")
    assert len(unready({"v1.2"}, tmp_path)) == 3


def test_one_version_and_a_citation():
    assert re.search(r"^## (\S+) \(", read("CHANGELOG.md"), re.MULTILINE)[1] == version()
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == version()
    assert citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    assert citation["authors"]
    assert paper["authors"]
    assert paper["url"].endswith("2604.01694")


WORKFLOW = yaml.safe_load(read(".github/workflows/ci.yml"))
JOBS = WORKFLOW["jobs"]


@pytest.mark.parametrize("job", sorted(JOBS.keys() - {"publish"}))
def test_a_job_runs_what_exists(job):
    commands = "\n".join(step.get("run", "") for step in JOBS[job]["steps"])
    (targets,) = re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    assert set(re.findall(r"\bmake (\S+)", commands)) <= set(targets.split())
    assert all((ROOT / file).exists() for file in re.findall(r"\b(tests/\S+)", commands))
    assert commands
