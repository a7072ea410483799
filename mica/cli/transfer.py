"""``mica transfer``: merge the update of an adapter into a sibling of the model that it was trained on."""

from argparse import Namespace
from contextlib import suppress
from importlib.metadata import version

from mica.cli.arguments import a_path, a_source, add_command, add_dtype_options, example
from mica.cli.folder import check_new, exclusive, undo_on_error
from mica.cli.output import check_folder, dtype_name, explained, tell, write_folder
from mica.cli.record import Record
from mica.errors import UsageError

_NEEDS_BASE = "its update can only be computed with the base"


def add_parser(commands) -> None:
    """Declare ``mica transfer`` on an argparse subparsers object."""
    parser = add_command(
        commands,
        "transfer",
        run,
        help="merge an adapter into the chat model of its base",
        description="Merge what a MiCA, LoRA or DoRA adapter has added to its base model into another model "
        "made from the same base, like its instruction-tuned one. Nothing is trained. Writes a plain model "
        "with MODEL's tokenizer and chat template.",
        epilog=example(
            "mica transfer --adapter run --to HuggingFaceTB/SmolLM2-135M-Instruct --output chat",
            says="The adapter in run, trained on SmolLM2-135M, is merged into the chat model made from it.",
        ),
    )
    add = parser.add_argument
    add("--adapter", required=True, type=a_path, metavar="DIR", help="folder of mica adapt, or of PEFT")
    add(
        "--to",
        required=True,
        type=a_source,
        metavar="MODEL",
        help="Hub id, checkpoint folder or GGUF file; not quantised",
    )
    add("--output", required=True, type=a_path, metavar="DIR", help="folder for the model: new or empty")
    add_dtype_options(parser, dtype="dtype of the merged weights; auto: that of MODEL, float32 for GGUF")


def run(args: Namespace) -> int:
    """Run the command: everything is checked before the weights are read, and the output is written whole.

    DoRA's lengths and trained embeddings take the place of the base's: what MODEL gets of them is the
    difference to the adapter's base. A note says so if the adapter does not tell what that was.

    Raises UsageError if --adapter is no plain MiCA, LoRA or DoRA adapter, or replaces other modules than
    embeddings; if its base is needed, and cannot be loaded or has changed; if MODEL is quantised, has another
    architecture than the base, does not fit the adapter (`SavedAdapter.check_fit`), or gives a common token
    another id; and if the output is not new or empty, or cannot be written.
    """
    from mica.cli.adapt import saved_adapter
    from mica.cli.loading import find_source, quieten_libraries

    quieten_libraries()
    saved = saved_adapter.read(args.adapter)
    source = find_source(args.to, args.trust_remote_code, "--to ")
    check_folder("--output", args.output)
    check_new("--output", args.output)
    with exclusive(args.output), undo_on_error(args.output):
        check_new("--output", args.output)
        return _transfer(args, saved, source)


def _transfer(args: Namespace, saved, source) -> int:
    """Merge and write, once the output is ours."""
    import mica.fast
    from mica.cli.adapt import base, card, embeddings

    mica.fast.enable(lora=True)  # merged in float32, rounded once and measured
    config = saved.config
    is_dora = saved.method == "dora"
    model, tokenizer = _load(args, saved, source)
    saved.check_fit(model, f"--to {args.to}")
    updates = {}
    trained_on = None
    if config.modules_to_save:
        embeddings.check_adapter(model, saved, f"--to {args.to}")
    if config.modules_to_save or is_dora:
        dtype = base.read_facts(args.adapter).get("base_dtype")
        trained_on = _base(args, saved, dtype)
        saved.check_fit(trained_on, f"its base {config.base_model_name_or_path}")
    if config.modules_to_save:
        updates = embeddings.update(saved, trained_on, dtype)

    peft_model = saved.load(model)
    embeddings.add(peft_model, updates)
    with explained(f"--adapter {args.adapter}", ValueError):  # a merged weight that is not finite
        if is_dora:
            merged = peft_model.unload()
            report = _add_dora(saved, trained_on, merged)
        else:
            merged = peft_model.merge_and_unload(safe_merge=True)
            report = mica.fast.merge_report(merged)
    facts = {
        "name": args.output.resolve().name,
        "model": args.to,
        "adapter": str(args.adapter),
        "base": config.base_model_name_or_path,
        "method": saved.method,
        "layers": len(saved.layers),
        "embeddings": bool(updates),
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dtype": dtype_name(merged.dtype),
        "merge_report": str(report),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }

    record = Record(args.output)
    write_folder(
        args.output,
        merged.save_pretrained,
        tokenizer.save_pretrained,
        record=record,
        card=str(card.transfer_card(facts)),
    )
    record.forget()  # nothing goes on in this folder
    print(f"merged model  {args.output}\n              {report}")
    return 0


def _load(args: Namespace, saved, source):
    """MODEL and its tokenizer, after the checks that need no weights; prints how they agree with the base."""
    import torch

    from mica.cli.loading import load_config, load_model

    if not source.is_gguf:
        their_config = load_config(source)
        if getattr(their_config, "quantization_config", None) is not None:
            raise source.error("is quantised: give the checkpoint it was made from")
        _check_architecture(args, saved, their_config.model_type)
    tokenizer, agreement = _tokenizer(args, saved, source)
    print(agreement)
    # On the CPU: one sum per weight is not worth the transfer to the device and back.
    model = load_model(source, args.dtype, torch.device("cpu"))
    print(_check_architecture(args, saved, model.config.model_type))
    return model, tokenizer


def _base(args: Namespace, saved, dtype: str | None):
    """The base of the adapter on the CPU, in the ``dtype`` in which its run has loaded it; None: unknown."""
    import torch

    from mica.cli.adapt import base
    from mica.cli.loading import Source, load_model

    name = saved.config.base_model_name_or_path or "without a name"
    is_same = base.is_trained_on(args.adapter, name)
    if is_same is None:
        tell(
            f"mica transfer: note: --adapter {args.adapter}: cannot check that its base {name} "
            "is what it was trained on"
        )
    elif not is_same:
        raise saved.error(
            f"its base {name} is not what it was when training began; "
            f"{_NEEDS_BASE} of the run: put that back there"
        )
    source = Source(name, name, {"trust_remote_code": args.trust_remote_code}, option="")
    try:
        return load_model(source, dtype or "auto", torch.device("cpu"))
    except UsageError as error:
        raise saved.error(f"{_NEEDS_BASE}: {error}") from error


def _add_dora(saved, base, model):
    """Add to the layers of ``model`` what DoRA changes in those of ``base``, in float32, and rounded once.

    Returns the `mica.fast.MergeReport`. Raises ValueError as PEFT's merge for a weight that is not finite.
    """
    from peft.tuners.lora import LoraLayer

    import mica.fast
    from mica.fast.merge.merging import stats_of

    report = mica.fast.MergeReport()
    for name, layer in saved.load(base.float()).get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        before = layer.get_base_layer().weight.data.clone()
        layer.merge(safe_merge=True)
        update = layer.get_base_layer().weight.data - before
        weight = model.get_submodule(name).weight.data
        summed = weight.float() + update
        new = summed.to(weight.dtype)
        report.layers[name] = stats_of(weight, new, update, new.float() - summed)
        weight.copy_(new)
    return report


def _check_architecture(args: Namespace, saved, theirs: str) -> str:
    """Compare MODEL's ``model_type`` with that of the adapter's base; a line on the outcome.

    The base's is in summary.json, which `mica adapt` writes, else in its configuration. Layers of the same
    names and shapes do not make a model its sibling.

    Raises UsageError if they differ.
    """
    ours = _architecture_of_base(args, saved)
    if ours is None:
        return f"architecture  {theirs}, not compared: no base found"
    if ours != theirs:
        raise UsageError(
            f"--to {args.to}: its model type is {theirs}, that of the adapter's base is {ours}: "
            "the update fits only models made from the same base"
        )
    return f"architecture  {theirs}, as the adapter's base"


def _architecture_of_base(args: Namespace, saved) -> str | None:
    from mica.cli.adapt.base import read_facts
    from mica.cli.loading import Source, load_config

    model_type = read_facts(args.adapter).get("model_type")
    if model_type is not None:
        return model_type
    base = saved.config.base_model_name_or_path
    if not base:
        return None
    source = Source(base, base, {"trust_remote_code": args.trust_remote_code})
    try:
        return load_config(source).model_type
    except UsageError:  # it is not here any more
        return None


def _tokenizer(args: Namespace, saved, source):
    """MODEL's tokenizer, and a line on how it agrees with that of the adapter.

    A chat model may have tokens of its own, but what the adapter was trained on must have the same ids.
    """
    from mica.cli.loading import load_tokenizer

    tokenizer = load_tokenizer(source)
    theirs = tokenizer.get_vocab()
    ours = _vocabulary_of_adapter(args, saved)
    common = ours.keys() & theirs.keys()
    moved = [token for token in common if ours[token] != theirs[token]]
    if moved or not common:
        others = f"{len(moved)} of {len(common)} common tokens have other ids"
        if moved:
            first = min(moved, key=ours.get)
            others += f": {first!r} is {ours[first]} there and {theirs[first]} here"
        raise UsageError(f"--to {args.to}: its tokenizer is not that of the adapter: {others}")
    new = len(theirs) - len(common)
    return tokenizer, (
        f"tokenizers    {len(common):,} tokens in common, with the same ids; {new:,} only in {args.to}"
    )


def _vocabulary_of_adapter(args: Namespace, saved) -> dict[str, int]:
    """Token -> id in the tokenizer of the adapter's folder, or else of its base.

    Raises UsageError if neither has one.
    """
    from transformers import AutoTokenizer

    base = saved.config.base_model_name_or_path
    places = [str(args.adapter)]
    if base:
        places.append(base)
    for place in places:
        with suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code).get_vocab()
    raise saved.error(f"has no tokenizer, and neither has its base {base}: put the base's into the folder")
