"""One import package, `mica`: from a wheel and from an editable install, inside the checkout and outside.

The wheel is built from the sdist, as `make dist` does: so neither may lack a file.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
import urllib.parse
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import setuptools

from mica.cli.output import files_in
from tests.support.processes import printed_by

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import importlib.util, json, sys
if sys.argv[1:] == ["no triton"]:
    sys.modules["triton"] = None
import mica.fast, mica.kernels.runtime, kernels
print(json.dumps({
    "mica": mica.__file__,
    "runtime": mica.kernels.runtime.__file__,
    "kernels": kernels.__file__,
    "triton": "triton" in sys.modules and sys.modules["triton"] is not None,
    "enabled": mica.fast.is_enabled(),
}))
"""


def built(kind, folder, source):
    """The sdist or the wheel of a source tree, made as pip makes it, without pip."""
    build = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
    printed_by(build, folder, cwd=source)
    (file,) = folder.glob("mica_fast-*")
    return file


def kernels_of(folder):
    return {f"mica/kernels/{path.name}" for path in folder.iterdir() if path.suffix == ".py"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("sdist")
    # a copy, because setuptools leaves a build folder behind whose old files would get into later wheels
    for name in ("kernels", "mica", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    return built("sdist", folder, source)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    source = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (source,) = source.iterdir()
    return built("wheel", tmp_path_factory.mktemp("wheel"), source)


def test_sdist_holds_the_package_and_its_papers(sdist):
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members)  # mica/kernels as files, not as a link out of it
    names = {member.name.partition("/")[2] for member in members}
    assert {name.partition("/")[0] for name in names if "/" in name} == {"mica", "mica_fast.egg-info"}
    papers = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
    made = {"MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg", "setup.py"}
    assert {name for name in names if "/" not in name} == papers | made


def test_wheel_holds_one_package_and_needs_no_compiler(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mica", "mica_fast"}
    suffixes = (".py", ".cpp", ".h", ".typed")
    sources = {str(path.relative_to(ROOT)) for path in files_in(ROOT / "mica") if path.suffix in suffixes}
    sources |= kernels_of(ROOT / "kernels")
    assert {"mica/py.typed", "mica/native/mica_native.cpp"} <= sources <= names
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_the_description_is_the_readme_without_relative_links(wheel):
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    message = message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    assert message["Description-Content-Type"].startswith("text/markdown")
    description = message.get_payload(decode=True).decode()
    (repository,) = (url for url in message.get_all("Project-URL") if url.startswith("Repository, "))
    files = f"{repository.partition(', ')[2]}/blob/v{message['Version']}/"
    links = re.findall(r"\]\(([^()\s]+)\)", description)
    own = [link.removeprefix(files) for link in links if link.startswith(files)]
    assert own
    assert description.replace(files, "").strip() == (ROOT / "README.md").read_text("utf-8").strip()
    assert all((ROOT / urllib.parse.unquote(link.partition("#")[0])).exists() for link in own)
    assert not [link for link in links if not re.match(r"https?://|#", link)]


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Where the wheel is installed."""
    site = tmp_path_factory.mktemp("site")
    options = ["-q", "--no-deps", "--disable-pip-version-check", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True, capture_output=True)
    return site


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_wheel", "inside", "triton"),
    [
        pytest.param(True, False, True, id="wheel, outside the checkout"),
        pytest.param(True, True, True, id="wheel, inside the checkout"),
        pytest.param(False, True, True, id="editable install, inside"),
        pytest.param(False, False, False, id="editable install, outside, where Triton is not installed"),
    ],
)
def test_install(is_wheel, inside, triton, request, tmp_path):
    site = request.getfixturevalue("site") if is_wheel else ""
    # `python -c` puts the working directory first: inside the checkout its own source is what runs
    home = site if is_wheel and not inside else ROOT
    arguments = [] if triton else ["no triton"]
    printed = printed_by(PROBE, *arguments, cwd=ROOT if inside else tmp_path, PYTHONPATH=str(site))
    probed = json.loads(printed.splitlines()[-1])
    assert Path(probed["mica"]) == home / "mica/__init__.py"
    assert Path(probed["runtime"]).resolve() == (home / "mica/kernels/runtime.py").resolve()
    assert "site-packages" in probed["kernels"]  # Hugging Face's
    assert triton or not probed["triton"]
    assert probed["enabled"]


# -- where there are no symbolic links: Git's default on Windows, some disks, some archives ------------


@pytest.fixture
def clone(tmp_path):
    """One in which mica/kernels is a file whose text is its target."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "-c", "core.symlinks=false", "clone", "-q", ROOT, folder], check=True)
    shutil.copy(ROOT / "setup.py", folder)  # as it is now, not as it was committed
    assert (folder / "mica" / "kernels").read_text() == "../kernels"
    return folder


def test_a_wheel_from_a_clone_without_links_has_the_kernels(clone, tmp_path):
    folder = tmp_path / "wheel"
    folder.mkdir()
    names = set(zipfile.ZipFile(built("wheel", folder, clone)).namelist())
    assert kernels_of(ROOT / "kernels") <= names


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_without_the_right_to_make_links(platform, clone, monkeypatch):
    """A junction on Windows, which needs no right, and elsewhere a copy, which the next install refreshes."""
    symlink = os.symlink

    def no_right(*args, **options):
        raise OSError(22, "A required privilege is not held by the client")

    junctions = types.SimpleNamespace(CreateJunction=symlink)
    monkeypatch.setitem(sys.modules, "_winapi", junctions)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "symlink", no_right)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    kernels = clone / "mica" / "kernels"
    for _ in range(2):
        runpy.run_path(str(clone / "setup.py"))
        assert kernels.is_symlink() == (platform == "win32")
        assert kernels_of(kernels) == kernels_of(ROOT / "kernels")
        assert (kernels / "runtime.py").read_text() == (clone / "kernels" / "runtime.py").read_text()
        (clone / "kernels" / "runtime.py").write_text("# changed by a pull\n")
