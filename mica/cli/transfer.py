"""``mica transfer``: merge the update of an adapter into a sibling of the model that it was trained on."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from mica.cli import lock, record
from mica.cli.arguments import a_path, a_source, add_command, add_dtype_options, example
from mica.cli.output import (
    OLD,
    PARTIAL,
    beside,
    check_folder,
    dtype_name,
    explained,
    restore,
    shown,
    write_folder,
)
from mica.errors import UsageError


def add_parser(commands) -> None:
    """Declare ``mica transfer`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "transfer", run),
        help="merge an adapter into the chat model of its base",
        description="Merge the update s·B·A of a MiCA adapter, trained on a base model, into another model "
        "made from the same base, like its instruction-tuned one. Nothing is trained or computed again: "
        "B stays that of the base. Writes a plain model with MODEL's tokenizer and chat template.",
        epilog=example(
            "mica transfer --adapter run --to HuggingFaceTB/SmolLM2-135M-Instruct --output chat",
            says="The adapter in run, trained on SmolLM2-135M, is merged into the chat model made from it.",
        ),
    )
    add = parser.add_argument
    add("--adapter", required=True, type=a_path, metavar="DIR", help="output folder of mica adapt")
    add(
        "--to",
        required=True,
        type=a_source,
        metavar="MODEL",
        help="Hub id, checkpoint folder or GGUF file; not quantised",
    )
    add("--output", required=True, type=a_path, metavar="DIR", help="folder for the model, made if needed")
    add("--overwrite", action="store_true", help="replace what mica transfer has written to --output")
    add_dtype_options(parser, dtype="dtype of the merged weights; auto: that of MODEL, float32 for GGUF")


def run(args: argparse.Namespace) -> int:
    """Run the command: all checks before the weights are read, the output whole or not at all.

    Only a folder that `mica transfer` has written is replaced, as its record says (see `mica.cli.record`).

    To trained embeddings, what was added to those of the adapter's base is added. A note says where the
    adapter does not tell what they were.

    Raises UsageError if --adapter is no MiCA adapter, replaces other modules than embeddings, or has trained
    them and its base cannot be loaded or is another one by now, if MODEL is of another architecture than its
    base, lacks one of its layers or has it in another shape, is quantised, or gives a common token another
    id, and if the output cannot be written.
    """
    from mica.cli.adapt import adapter
    from mica.cli.loading import find_source, quieten_libraries

    quieten_libraries()
    config = adapter.read_adapter_config(args.adapter)
    with _named(args):
        source = find_source(args.to, args.trust_remote_code)
        check_folder("--output", args.output, args.to)
    target = Path(os.path.realpath(args.output))
    _check_place(args, target, source, config)
    with _held(args, target):
        _check_output(args, target)
        return _transfer(args, config, source, target)


def _check_place(args: argparse.Namespace, target: Path, source, config) -> None:
    """Raise UsageError if --output cannot be replaced by a new folder, or holds what is read here."""
    if target in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(target):
        what = "cannot be replaced by a new folder while it is in use: name one in it"
        raise UsageError(f"--output {args.output}: {what}")
    read = {"--to": [source.location], "--adapter": [str(args.adapter)]}
    if config.base_model_name_or_path:
        read["the base of --adapter"] = [config.base_model_name_or_path]
    lost = record.removed_input(read, target, [target])
    if lost:
        raise UsageError(f"--output {args.output}: is the folder of {lost[0]}, or contains it")


@contextmanager
def _named(args: argparse.Namespace) -> Iterator[None]:
    """Errors about a model are about --to."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace(f"--model {args.to}: ", f"--to {args.to}: ", 1)) from error


@contextmanager
def _held(args: argparse.Namespace, target: Path) -> Iterator[None]:
    """Keep other processes from the output, and see to what a killed one has left beside it.

    The lock is beside it too, as the whole folder is renamed. Raises UsageError if another process holds it.
    """
    made = [path for path in target.parents if not path.exists()]
    name = beside(target, "lock").name.removeprefix(".")
    try:
        with ExitStack() as stack:
            with explained(f"--output {args.output}: cannot be made", OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.held(target.with_name(record.OWN + name)))
            for path in (beside(target, PARTIAL), beside(target, OLD)):
                if not _is_ours(path):
                    what = f"{shown(path.name)} beside it was not written by {record.TRANSFER}: move it away"
                    raise UsageError(f"--output {args.output}: {what}")
            with explained(f"--output {args.output}: cannot be restored", OSError):
                restore(target)
            yield
    except lock.HeldError as error:
        what = "another process writes to it; wait for it or stop it"
        raise UsageError(f"--output {args.output}: {what}") from error
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _is_ours(path: Path) -> bool:
    """Whether nothing is at ``path``, or an empty folder, or one that only `mica transfer` has written to.

    A folder whose record names no files yet was interrupted, as was one whose record was just being written.
    """
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_dir():
        return False
    found = record.read(path)
    if found is None:
        return all(entry.name.startswith(record.OWN) for entry in path.iterdir())
    if found.command != record.TRANSFER:
        return False
    return not found.files or not record.others(path, found)


def _check_output(args: argparse.Namespace, target: Path) -> None:
    """Raise UsageError if a new folder must not take the place of what is at --output."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    found = record.read(target)
    if found is None or found.command != record.TRANSFER:
        what = f"is not empty, and {record.TRANSFER} has not written it: name another folder"
        raise UsageError(f"--output {args.output}: {what}")
    others = record.others(target, found)
    if others:
        stranger = others[0]
    else:
        stranger = record.stranger(target, found, found.files)
    if stranger is not None:
        name = shown(os.path.relpath(target / stranger, target))
        what = f"{name} in it was not written by {record.TRANSFER}: move it away, or name another folder"
        raise UsageError(f"--output {args.output}: {what}")
    if not args.overwrite:
        raise UsageError(f"--output {args.output}: is not empty: --overwrite replaces what is in it")
    for path in record.present(target, found):
        why = record.why_not_removable(path)
        if why:
            raise UsageError(f"--output {args.output}: cannot be replaced: {why}")


def _transfer(args: argparse.Namespace, config, source, target: Path) -> int:
    """Merge and write, once the output is ours."""
    from peft import PeftModel

    from mica.cli.adapt import adapter, card, embeddings, result

    layers = adapter.adapted_layers(args.adapter)
    model, tokenizer = _load(args, config, source)
    adapter.check_fit(model, config, args.adapter, "--adapter", f"--to {args.to}")
    updates = {}
    if config.modules_to_save:
        updates = _embedding_updates(args, config, model)

    peft_model = PeftModel.from_pretrained(model, args.adapter, config=config)
    embeddings.add(peft_model, updates)
    merged, report = result.merged_model(peft_model, f"--adapter {args.adapter}")
    facts = {
        "name": target.name,
        "model": args.to,
        "adapter": str(args.adapter),
        "base": config.base_model_name_or_path,
        "layers": len(layers),
        "embeddings": bool(updates),
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dtype": dtype_name(merged.dtype),
        "merge_report": str(report),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }

    def sealed(scratch: Path) -> None:
        record.sign(scratch)
        _check_output(args, target)  # again: merging has taken its time, and this is replaced next

    write_folder(
        "--output",
        target,
        merged,
        tokenizer,
        card=str(card.transfer_card(facts)),
        begun=lambda scratch: record.write(scratch, record.Record(record.TRANSFER)),
        done=sealed,
    )
    print(f"merged model  {args.output}\n              {report}")
    return 0


def _load(args: argparse.Namespace, config, source):
    """MODEL and its tokenizer, after the checks that need no weights; prints how they agree with the base."""
    import torch

    from mica.cli.loading import load_config, load_model

    with _named(args):
        if not source.is_gguf:
            their_config = load_config(source)
            if getattr(their_config, "quantization_config", None) is not None:
                raise source.error("is quantised: give the checkpoint it was made from")
            _check_architecture(args, config, their_config.model_type)
        tokenizer, agreement = _tokenizer(args, source, config)
        print(agreement)
        # On the CPU: one sum per weight is not worth the transfer to the device and back.
        model = load_model(source, args.dtype, torch.device("cpu"))
    print(_check_architecture(args, config, model.config.model_type))
    return model, tokenizer


def _embedding_updates(args: argparse.Namespace, config, model) -> dict:
    """What training has added to the embeddings, by name; see `mica.cli.adapt.embeddings.update`."""
    from mica.cli.adapt import embeddings, trained_on

    embeddings.check_adapter(model, config, args.adapter, "--adapter", f"--to {args.to}")
    before = trained_on.embeddings_before(args.adapter)
    if before is None:
        what = f"--adapter {args.adapter} does not record what its embeddings were before training"
        assumed = f"what its base {config.base_model_name_or_path} has now is assumed"
        print(f"mica transfer: note: {what}: {assumed}", file=sys.stderr, flush=True)
    return embeddings.update(config, args.adapter, before, args.trust_remote_code)


def _check_architecture(args: argparse.Namespace, config, theirs: str) -> str:
    """Compare MODEL's ``model_type`` with that of the adapter's base; a line on the outcome.

    The base's is in summary.json, which `mica adapt` writes, else in its configuration. Layers of the same
    names and shapes do not make a model its sibling.

    Raises UsageError if they differ.
    """
    ours = _architecture_of_base(args, config)
    if ours is None:
        return f"architecture  {theirs}, not compared: no base found"
    if ours != theirs:
        types = f"its model type is {theirs}, that of the adapter's base is {ours}"
        raise UsageError(f"--to {args.to}: {types}: the update fits only models made from the same base")
    return f"architecture  {theirs}, as the adapter's base"


def _architecture_of_base(args: argparse.Namespace, config) -> str | None:
    from mica.cli.adapt import trained_on
    from mica.cli.loading import Source, load_config

    recorded = trained_on.model_type(args.adapter)
    if recorded is not None:
        return recorded
    base = config.base_model_name_or_path
    if not base:
        return None
    source = Source(base, base, {"trust_remote_code": args.trust_remote_code})
    try:
        return load_config(source).model_type
    except UsageError:  # it is not here any more
        return None


def _tokenizer(args: argparse.Namespace, source, config):
    """MODEL's tokenizer, and a line on how it agrees with that of the adapter.

    A chat model may have tokens of its own, but what the adapter was trained on must have the same ids.
    """
    from mica.cli.loading import load_tokenizer

    tokenizer = load_tokenizer(source)
    theirs = tokenizer.get_vocab()
    ours = _vocabulary_of_adapter(args, config)
    common = ours.keys() & theirs.keys()
    moved = [token for token in common if ours[token] != theirs[token]]
    if moved or not common:
        others = f"{len(moved)} of {len(common)} common tokens have other ids"
        if moved:
            first = min(moved, key=ours.get)
            others += f": {first!r} is {ours[first]} there and {theirs[first]} here"
        raise UsageError(f"--to {args.to}: its tokenizer is not that of the adapter: {others}")
    new = len(theirs) - len(common)
    gone = len(ours) - len(common)
    agreement = (
        f"tokenizers    {len(common):,} tokens in common, with the same ids; {new:,} only in {args.to}, "
        f"{gone:,} only in that of the adapter"
    )
    return tokenizer, agreement


def _vocabulary_of_adapter(args: argparse.Namespace, config) -> dict[str, int]:
    """Token -> id in the tokenizer of the adapter's folder, or else of its base.

    Raises UsageError if neither has one.
    """
    from transformers import AutoTokenizer

    from mica.cli.loading import note_hub

    base = config.base_model_name_or_path
    places = [str(args.adapter)]
    if base:
        places.append(base)
    for place in places:
        note_hub(place)
        with suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code)
            return tokenizer.get_vocab()
    what = f"has no tokenizer, and neither has its base {base}: put the base's into the folder"
    raise UsageError(f"--adapter {args.adapter}: {what}")
