"""``--push-to-hub``: the output folder to a repository of the Hugging Face Hub, by its own client."""

from collections.abc import Callable
from glob import escape
from pathlib import Path
from shlex import quote
from threading import Thread
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id

from mica.cli.adapt.folder import results
from mica.cli.output import explained
from mica.errors import UsageError

_PATIENCE = 20.0  # seconds


def check(repository: str) -> None:
    """Ask the hub, before any work, who the token belongs to; creates nothing.

    Raises UsageError if the name is not that of a repository, if there is no token, or if the hub does not
    accept it or cannot be reached.
    """
    option = f"--push-to-hub {repository}"
    with explained(f"{option}: must be NAME or OWNER/NAME"):
        validate_repo_id(repository)
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{option}: not possible while HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UsageError(f"{option}: no token: run `hf auth login` or set HF_TOKEN")
    with explained(option):  # the errors of the client's HTTP library are others in each major version
        user = within(_PATIENCE, HfApi().whoami, "no answer from the Hub")
    authentication = user.get("auth") or {}
    token = authentication.get("accessToken") or {}
    if token.get("role") == "read":
        raise UsageError(f"{option}: the token of {user.get('name')} can only read: use one that can write")


def within(seconds: float, function: Callable[[], Any], otherwise: str) -> Any:
    """``function()``, if it returns within so many seconds; it goes on in a thread. Else TimeoutError.

    The client has no time limit of its own: where packets are dropped silently that of the system holds,
    which is minutes.
    """
    returned = []
    errors = []

    def call():
        try:
            returned.append(function())
        except Exception as error:
            errors.append(error)

    thread = Thread(target=call, daemon=True)  # the process ends whether or not it has returned
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not returned:
        raise TimeoutError(f"{otherwise} within {seconds:g} s")
    return returned[0]


def push(output: Path, repository: str) -> str:
    """Upload the adapter in ``output`` and what describes it; return the repository's address.

    A repository that does not exist is made, and is private: what was trained on may be so too, and it can
    be published later. One that exists stays as it is. Only on the main process.

    Raises UsageError if the upload fails; it says how to repeat it, and ``output`` is unchanged.
    """
    patterns = []
    for name in results(output):
        pattern = escape(name)
        if (output / name).is_dir():
            pattern += "/*"
        patterns.append(pattern)
    include = " ".join(f"--include {quote(pattern)}" for pattern in patterns)
    again = f"hf upload {repository} {output} . --private {include}"
    kept = f"; everything is in {output}; upload it with: {again}"
    with explained(f"--push-to-hub {repository}: not uploaded", kept=kept):
        api = HfApi()
        name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name,
            folder_path=output,
            allow_patterns=patterns,
            commit_message="MiCA adapter",
        )
    return getattr(done, "repo_url", None) or f"{constants.ENDPOINT}/{name}"
