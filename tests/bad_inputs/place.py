"""A folder with a sound tiny model, rows and run file, in which one thing can be broken. Knows no check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_model_folder

NUM_ROWS = 60
SENTENCES = ("The sum is {0}.", "It comes to {0}.", "Together they are {0}.", "{0} in all.")
RUN = {
    "name": "tried",
    "runs": "runs",
    "seed": 1,
    "device": "cpu",
    "model": {"path": "model"},
    "data": {
        "sources": ["rows.json"],
        "template": "alpaca",
        "max_tokens": 256,
        "validation": 0.2,
        "workers": 0,
    },
    "sft": {
        "global_batch": 8,
        "micro_batch_tokens": 512,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "evaluate_every": 0,
        "save_every": 0,
        "sample_tokens": 0,
    },
    "log": {"tensorboard": False},
}


def alpaca_rows(num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Sums with short, different answers: nothing that a careful reader would object to."""
    return [
        {
            "instruction": f"Add {number} and {number * 7 % 13}.",
            "input": "",
            "output": SENTENCES[number % 4].format(number + number * 7 % 13),
        }
        for number in range(num_rows)
    ]


def chat_rows(num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """The same as conversations of two turns, in the form of OpenAI's messages."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
                {"role": "user", "content": "And one more?"},
                {"role": "assistant", "content": f"Then {number + number * 7 % 13 + 1}."},
            ]
        }
        for number, row in enumerate(alpaca_rows(num_rows))
    ]


def pair_rows(num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Preference pairs: the right sum is chosen, a wrong one is rejected."""
    return [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"I think {number + 100} or so."}
        for number, row in enumerate(alpaca_rows(num_rows))
    ]


class Models:
    """Tiny model folders, each made once; a place gets its own copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, family: str = "llama", seed: int = 0) -> Path:
        folder = self.folder / f"{family}-{seed}"
        if not folder.is_dir():
            tiny_model_folder(self.folder, family, seed=seed, name=folder.name)
        return folder


@dataclass
class Place:
    """One scenario's folder. `values` becomes run.yaml, `rows` rows.json; `family` None leaves the model out."""

    folder: Path
    models: Models
    family: str | None = "llama"
    values: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(RUN)))
    rows: list[Any] | None = field(default_factory=alpaca_rows)
    run_text: str | None = None
    verb: str = "train"
    subject: str = ""
    """A recipe instead of run.yaml."""
    arguments: list[str] = field(default_factory=list)
    """What follows the run file on the command line."""
    in_process: bool = True
    """Whether the command will be tried in this process, where functions can be replaced."""
    undo: list[Callable[[], object]] = field(default_factory=list)
    """Called after the trial: rights given back, file systems let go."""

    @property
    def model(self) -> Path:
        """The folder of the model, copied here on first use."""
        folder = self.folder / "model"
        if not folder.is_dir():
            assert self.family is not None
            shutil.copytree(self.models(self.family), folder)
        return folder

    def set(self, key: str, value: Any) -> None:
        """`set("sft.learning_rate", 5)`; a value of None removes the field."""
        *parents, name = key.split(".")
        section = self.values
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value

    def write(self) -> list[str]:
        """Everything that is not there yet; the command line that is to be tried."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.family is not None:
            _ = self.model
        if self.rows is not None:
            (self.folder / "rows.json").write_text(
                json.dumps(self.rows, ensure_ascii=False, indent=1), encoding="utf-8"
            )
        text = self.run_text or yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True, width=1000)
        (self.folder / "run.yaml").write_text(text, encoding="utf-8")
        run_dir = f"{self.values['runs']}/{self.values['name']}"
        return [self.verb, self.subject or (run_dir if self.verb == "resume" else "run.yaml"), *self.arguments]
