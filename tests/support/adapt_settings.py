"""The settings of a run of ``mica adapt``, as its modules get them, for a tiny model."""

from argparse import Namespace
from pathlib import Path


def settings(output: Path, **changed) -> Namespace:
    """All settings, resolved; ``changed`` win. Four blocks of 32 tokens a step, ten steps."""
    values = {
        "model": "model",
        "adapter": None,
        "dtype": "float32",
        "quantize": None,
        "trust_remote_code": False,
        "gradient_checkpointing": False,
        "text": ["text.txt"],
        "text_field": None,
        "text_weights": None,
        "dataset_config": None,
        "held_out": 0.1,
        "held_out_text": None,
        "retain": None,
        "sequence_length": 32,
        "packing": "documents",
        "workers": None,
        "eval_blocks": 32,
        "recipe": "paper",
        "rank": 4,
        "alpha": 8,
        "target_modules": "q_proj,v_proj",
        "dropout": 0.1,
        "steps": 10,
        "epochs": None,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
        "optimizer": "adamw_torch",
        "seed": 0,
        "eval_steps": None,
        "log_steps": 5,
        "report_to": [],
        "output": output,
        "save_steps": 5,
        "resume": False,
        "overwrite": False,
        "merge": False,
        "push_to_hub": None,
        "config": None,
    }
    unknown = changed.keys() - values.keys()
    assert not unknown, unknown
    return Namespace(**{**values, **changed})
