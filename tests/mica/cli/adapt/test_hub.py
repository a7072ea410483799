"""--push-to-hub, without a hub: what is asked, what is sent, and what an error says."""

import threading
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from mica.cli import record
from mica.cli.adapt import hub
from mica.errors import UsageError


@pytest.fixture
def at_hub(offline, monkeypatch):
    """A hub that is there, and a token; ``at_hub(...)`` changes what it says of whom the token belongs to."""

    def change(token="token", role="write", error=None, offline=False):
        def whoami(self):
            if error:
                raise error
            return {"name": "me", "auth": {"accessToken": {"role": role}}}

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("mica.cli.adapt.hub.get_token", lambda: token)
        monkeypatch.setattr(HfApi, "whoami", whoami)

    change()
    return change


def test_good_name_and_token(at_hub):
    hub.check("me/adapter")
    hub.check("adapter")


@pytest.mark.parametrize("name", ["a/b/c", "me/has space", "", "-me/x", "me/x.git"])
def test_bad_name(name, at_hub):
    with pytest.raises(UsageError, match=f"^--push-to-hub {name}: must be NAME or OWNER/NAME: "):
        hub.check(name)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"role": "read"}, "the token of me can only read: use one that can write$"),
        ({"token": None}, "no token: run `hf auth login` or set HF_TOKEN$"),
        ({"error": OSError("Name or service not known")}, "Name or service not known$"),
        ({"offline": True}, "not possible while HF_HUB_OFFLINE is set$"),
    ],
)
def test_refused_before_any_work(answer, message, at_hub):
    at_hub(**answer)
    with pytest.raises(UsageError, match=f"^--push-to-hub me/x: {message}"):
        hub.check("me/x")


def test_a_hub_that_does_not_answer_is_not_waited_for(at_hub, monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(hub, "_PATIENCE", 0.05)
    monkeypatch.setattr(HfApi, "whoami", lambda self: answered.wait(5))
    with pytest.raises(UsageError, match=r"^--push-to-hub me/x: no answer from the Hub within 0\.05 s$"):
        hub.check("me/x")
    answered.set()


def test_upload_is_private_and_of_the_adapter_only(monkeypatch, tmp_path):
    calls = {}

    def create_repo(self, name, **options):
        calls["create"] = (name, options)
        return SimpleNamespace(repo_id="me/adapter")

    def upload_folder(self, **options):
        calls["upload"] = options
        return SimpleNamespace(repo_url="https://hub/me/adapter")

    files = [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.png", "run.yaml",
        "summary.json", "additional_chat_templates/a.jinja",
    ]  # fmt: skip
    (tmp_path / "additional_chat_templates").mkdir()
    record.write(tmp_path, record.Record(files=dict.fromkeys(name.partition("/")[0] for name in files)))
    record.claim(tmp_path, "base", "merged", "runs", "checkpoint-10")
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert hub.push(tmp_path, "adapter") == "https://hub/me/adapter"
    assert calls["create"] == ("adapter", {"private": True, "exist_ok": True})
    assert (calls["upload"]["repo_id"], calls["upload"]["folder_path"]) == ("me/adapter", tmp_path)
    others = [
        "notes.txt", "photos/README.md", "adapter_notes.md", "vocab.py", "mica-run.json",
        "base/model.safetensors", "checkpoint-10/optimizer.pt", "checkpoint-10/a/b",
        "merged/model.safetensors", "runs/x/events", ".summary.json.partial",
    ]  # fmt: skip
    assert (
        list(filter_repo_objects([*files, *others], allow_patterns=calls["upload"]["allow_patterns"]))
        == files
    )


def test_an_error_is_one_line_that_says_how_to_repeat(monkeypatch, tmp_path):
    def refuse(self, *_, **__):
        raise OSError("403 Forbidden: no rights.\nmore\nlines")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UsageError) as error:
        hub.push(tmp_path, "me/x")
    said = "--push-to-hub me/x: not uploaded: 403 Forbidden: no rights.; everything is in"
    assert str(error.value).startswith(said)
    assert f"hf upload me/x {tmp_path} . --private" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
