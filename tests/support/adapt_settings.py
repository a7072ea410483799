"""The settings of a run of ``mica adapt``, as its modules get them, for a tiny model."""

from argparse import Namespace
from pathlib import Path

from mica.cli.adapt import config

_TINY = {
    "dtype": "float32",
    "held_out": 0.1,
    "sequence_length": 32,
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
    "steps": 10,
    "epochs": None,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "log_steps": 5,
    "save_steps": 5,
}


def settings(output: Path = Path("unused"), **changed) -> Namespace:
    """All settings, resolved; ``changed`` win. Four blocks of 32 tokens a step, ten steps."""
    given = Namespace(model="model", text=["text.txt"], output=output, recipe="paper")
    values = vars(config.resolve(given).args) | _TINY
    unknown = changed.keys() - values.keys()
    assert not unknown, unknown
    return Namespace(**{**values, **changed})
