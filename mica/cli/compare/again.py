"""How a training of a comparison is done again: by ``mica adapt``, or by PEFT and transformers."""

import json
import shlex
from pathlib import Path
from typing import Any

from mica.cli.adapt.options import OPTIONS as OF_ADAPT
from mica.cli.compare import methods, settings

Report = dict[str, Any]


def again(report: Report, row: Report) -> str:
    """The command, or the lines for PEFT, of the training in this ``row`` of ``report``, as Markdown."""
    if row["method"] == "mica":
        return f"```sh\n{_command(report, row)}\n```"
    resolved = settings.of_mica_adapt(report["settings"], Path("run"))
    args = methods.options(row["method"], resolved.args)
    return f"```python\n{_lines_of_peft(row, args)}\n```"


def _command(report: Report, row: Report) -> str:
    """`mica adapt`, which reads the same blocks in the same order."""
    words = ["mica", "adapt"]
    used = report["settings"] | {"rank": settings.value(report["settings"], "rank")}
    for name in settings.SHARED:
        if name not in used:
            continue
        option = OF_ADAPT[name]
        if option.is_switch:
            words.append(option.flag if used[name] else f"--no-{option.flag[2:]}")
        else:
            values = used[name] if option.many else [used[name]]
            words += [option.flag, *map(str, values)]
    words += ["--learning-rate", f"{row['rate']:g}", "--steps", str(row["steps"]), "--output", "run"]
    if row["stop"] < row["steps"]:
        words += ["--eval-steps", str(row["stop"]), "--keep-best"]
    return "\n".join([shlex.join(words), *_scaled(row)])


def _scaled(row: Report) -> list[str]:
    """A comment where the comparison has scaled the update back, to the limit of forgetting."""
    if row["share"] == 1:
        return []
    return [f"# and scale what it adds to the weights by {row['share']:.2f}: it forgets more than the limit"]


def _lines_of_peft(row: Report, args) -> str:
    lines = []
    if row["method"] != "full":
        targets = args.target_modules
        if targets != "all-linear":
            targets = targets.split(",")
        adapter = {
            "r": args.rank,
            "lora_alpha": args.alpha,
            "lora_dropout": args.dropout,
            "target_modules": targets,
        }
        if row["method"] == "random":
            adapter = {"init_lora_weights": "mica", **adapter}
        keywords = [f"    {line}" for line in _keywords(adapter)]
        lines += ["model = get_peft_model(", "    model,", "    LoraConfig(", *keywords, "    ),", ")"]
    if row["method"] == "random":
        lines += [
            "for layer in model.modules():",
            '    if hasattr(layer, "lora_B"):',
            '        B = layer.lora_B["default"].weight',
            "        B.data = torch.linalg.qr(torch.randn(B.shape))[0]",
        ]
    training = {
        "max_steps": row["steps"],
        "learning_rate": row["rate"],
        "lr_scheduler_type": args.scheduler,
        "warmup_steps": args.warmup_ratio,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    lines += ["arguments = TrainingArguments(", *_keywords(training), ")"]
    if row["stop"] < row["steps"]:
        lines.append(f"# stopped after step {row['stop']}")
    lines.append(f"# blocks of {args.sequence_length} tokens, recipe {args.recipe}")
    return "\n".join([*lines, *_scaled(row)])


def _keywords(values: dict[str, object]) -> list[str]:
    return [f"    {name}={json.dumps(value)}," for name, value in values.items()]
