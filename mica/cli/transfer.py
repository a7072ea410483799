"""``mica transfer``: merge the update of an adapter into a sibling of the model that it was trained on."""

import argparse
import os
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from mica.cli.arguments import a_path, add_command, add_dtype_options
from mica.cli.output import check_folder, dtype_name, write_folder
from mica.errors import UsageError


def add_parser(commands) -> None:
    """Declare ``mica transfer`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "transfer", run),
        help="merge an adapter into the chat model of its base",
        description="Merge the update s·B·A of a MiCA adapter, trained on a base model, into another model "
        "made from the same base, like its instruction-tuned one. Nothing is trained or computed again: "
        "B stays that of the base. Writes a plain model with MODEL's tokenizer and chat template.",
    )
    add = parser.add_argument
    add("--adapter", required=True, type=a_path, metavar="DIR", help="output folder of mica adapt")
    add("--to", required=True, metavar="MODEL", help="Hub id, checkpoint folder or GGUF file; not quantised")
    add("--output", required=True, type=a_path, metavar="DIR", help="folder for the model, made if needed")
    add("--overwrite", action="store_true", help="replace what is in the folder of --output")
    add_dtype_options(parser, dtype="dtype of the merged weights; auto: that of MODEL, float32 for GGUF")


def run(args: argparse.Namespace) -> int:
    """Run the command: all checks before the weights are read, the output whole or not at all.

    To trained embeddings, what was added to those of the adapter's base is added. A note says where the
    adapter does not tell what they were.

    Raises UsageError if --adapter is no MiCA adapter, replaces other modules than embeddings, or has trained
    them and its base cannot be loaded or is another one by now, if MODEL is of another architecture than its
    base, lacks one of its layers or has it in another shape, is quantised, or gives a common token another
    id, and if the output cannot be written.
    """
    import torch
    from peft import PeftModel

    from mica.cli.adapt import adapter, card, embeddings, result, trained_on
    from mica.cli.loading import find_source, load_config, load_model, quieten_libraries

    quieten_libraries()
    config = adapter.read_adapter_config(args.adapter)
    layers = adapter.adapted_layers(args.adapter)
    try:
        source = find_source(args.to, args.trust_remote_code)
        check_folder("--output", args.output, args.to)
        for option, path in (("--to", source.location), ("--adapter", args.adapter)):
            place = Path(path).resolve()
            if args.output.resolve() in (place, *place.parents):
                raise UsageError(f"--output {args.output}: is the folder of {option}, or contains it")
        if args.output.resolve() in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(args.output):
            what = "cannot be replaced by a new folder while it is in use: name one in it"
            raise UsageError(f"--output {args.output}: {what}")
        if args.output.is_dir() and any(args.output.iterdir()) and not args.overwrite:
            raise UsageError(f"--output {args.output}: is not empty: --overwrite replaces what is in it")
        if not source.is_gguf:
            their_config = load_config(source)
            if getattr(their_config, "quantization_config", None) is not None:
                raise source.error("is quantised: give the checkpoint it was made from")
            _check_architecture(args, config, their_config.model_type)
        tokenizer, agreement = _tokenizer(args, source, config)
        print(agreement)
        # On the CPU: one sum per weight, which is not worth a way to the device and back.
        model = load_model(source, args.dtype, torch.device("cpu"))
    except UsageError as error:
        raise UsageError(str(error).replace(f"--model {args.to}: ", f"--to {args.to}: ", 1)) from error
    print(_check_architecture(args, config, model.config.model_type))
    adapter.check_fit(model, config, args.adapter, "--adapter", f"--to {args.to}")
    updates = {}
    if config.modules_to_save:
        embeddings.check_adapter(model, config, args.adapter, "--adapter", f"--to {args.to}")
        before = trained_on.embeddings_before(args.adapter)
        if before is None:
            what = f"--adapter {args.adapter} does not say what its embeddings were before training"
            taken = f"what its base {config.base_model_name_or_path} has now is taken for it"
            print(f"mica transfer: note: {what}: {taken}", file=sys.stderr, flush=True)
        updates = embeddings.update(config, args.adapter, before, args.trust_remote_code)

    peft_model = PeftModel.from_pretrained(model, args.adapter, config=config)
    embeddings.add(peft_model, updates)
    merged, report = result.merged_model(peft_model, f"--adapter {args.adapter}")
    facts = {"name": args.output.resolve().name, "model": args.to, "adapter": str(args.adapter)}
    facts |= {"base": config.base_model_name_or_path, "layers": len(layers)}
    facts["embeddings"] = bool(updates)
    facts |= {"rank": config.r, "alpha": config.lora_alpha}
    facts |= {"dtype": dtype_name(merged.dtype), "merge_report": str(report)}
    facts["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
    text = str(card.transfer_card(facts))
    write_folder("--output", args.output, merged, tokenizer, card=text)
    print(f"merged model  {args.output}\n              {report}")
    return 0


def _check_architecture(args: argparse.Namespace, config, theirs: str) -> str:
    """Compare MODEL's ``model_type`` with that of the adapter's base; a line on the outcome.

    That is in summary.json, which `mica adapt` writes, else in the base's configuration. Layers of the same
    names and shapes are no kinship.
    """
    from mica.cli.adapt import trained_on
    from mica.cli.loading import Source, load_config

    base = config.base_model_name_or_path
    ours = trained_on.model_type(args.adapter)
    if ours is None and base:
        with suppress(UsageError):  # it is not here any more
            ours = load_config(Source(base, base, {"trust_remote_code": args.trust_remote_code})).model_type
    if ours is not None and ours != theirs:
        types = f"its model type is {theirs}, that of the adapter's base is {ours}"
        raise UsageError(f"--to {args.to}: {types}: the update fits only models made from the same base")
    return f"architecture  {theirs}, " + ("as the adapter's base" if ours else "not compared: no base found")


def _tokenizer(args: argparse.Namespace, source, config):
    """MODEL's tokenizer, and a line on how it agrees with that of the adapter.

    A chat model may have tokens of its own, but what the adapter was trained on must have the same ids.
    """
    from transformers import AutoTokenizer

    from mica.cli.loading import load_tokenizer

    theirs, base = load_tokenizer(source), config.base_model_name_or_path
    options = {"trust_remote_code": args.trust_remote_code}
    for place in filter(None, (str(args.adapter), base)):
        with suppress(OSError, ValueError):
            ours = AutoTokenizer.from_pretrained(place, **options).get_vocab()
            break
    else:
        what = f"has no tokenizer, and neither has its base {base}: put the base's into the folder"
        raise UsageError(f"--adapter {args.adapter}: {what}")
    vocabulary = theirs.get_vocab()
    common = ours.keys() & vocabulary.keys()
    moved = sorted((token for token in common if ours[token] != vocabulary[token]), key=ours.get)
    if moved or not common:
        first = f": {moved[0]!r} is {ours[moved[0]]} there and {vocabulary[moved[0]]} here" if moved else ""
        others = f"{len(moved)} of {len(common)} common tokens have other ids{first}"
        raise UsageError(f"--to {args.to}: its tokenizer is not that of the adapter: {others}")
    new, gone = len(vocabulary) - len(common), len(ours) - len(common)
    return theirs, (
        f"tokenizers    {len(common):,} tokens in common, with the same ids; {new:,} only in {args.to}, "
        f"{gone:,} only in that of the adapter"
    )
