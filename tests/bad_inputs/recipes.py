"""The shipped recipes on sound rows: as they are on the machine they are for, and shortened on a tiny model here."""

from __future__ import annotations

from tests.bad_inputs.output_variants import write_large_model
from tests.bad_inputs.place import SENTENCES, Place, alpaca_rows, chat_rows
from tests.bad_inputs.scenario import OF_A_QUANTISED_BASE, Build, Control
from zhibei.config.read import read_run, recipe_names

NUM_ROWS = 5000
MACHINES = {
    "alpaca-7b": "h200",
    "alpaca-13b": "h200:8",
    "alpaca-7b-v100": "v100-32g:8",
    "alpaca-lora-7b": "a100-40g",
    "alpaca-lora-7b-official": "a100-40g",
    "coati-7b-sft": "h200",
    "coati-7b-sft-lora": "a100-40g",
    "vicuna-7b": "h200",
    "vicuna-13b": "h200:8",
    "vicuna-7b-qlora": "rtx4090",
}
# What this version cannot do, and rightly says: train on more than one GPU. And a package that may be absent.
NOT_YET = {
    "alpaca-13b": ("gpu-memory-too-small",),
    "alpaca-7b-v100": ("gpu-memory-too-small",),
    "vicuna-13b": ("gpu-memory-too-small",),
    "vicuna-7b-qlora": OF_A_QUANTISED_BASE,
    "alpaca-lora-7b": OF_A_QUANTISED_BASE,
    "alpaca-lora-7b-official": OF_A_QUANTISED_BASE,
}
SHORTER = ["sft.max_steps=2", "sft.global_batch=8", "data.validation=0.1", "data.max_tokens=256", "device=cpu"]


def recipe_controls() -> list[Control]:
    """A check of every recipe on its machine, and two steps of every one that can run on a processor."""
    whole = [Control(f"recipe_{name}", as_it_is(name), NOT_YET.get(name, ())) for name in supervised()]
    needs_package = [name for name, said in NOT_YET.items() if said and said == OF_A_QUANTISED_BASE]
    short = [Control(f"recipe_{name}_tiny", shortened(name)) for name in supervised() if name not in needs_package]
    return [*whole, *short]


def supervised() -> list[str]:
    """Recipes that learn from the rows made here; those over pairs are run in tests/train/test_pairs.py."""
    return [name for name in recipe_names() if read_run(name).run.stage == "sft"]


def as_it_is(name: str) -> Build:
    """`zhibei check RECIPE` with a model of the right size and enough rows, on the machine the recipe is for."""

    def build(place: Place) -> None:
        write_large_model(place, "13b" if "13b" in name else "7b")
        place.rows = chat_rows(NUM_ROWS) if "vicuna" in name else many_sums()
        place.verb, place.subject = "check", name
        place.arguments = ["model.path=model", "data.sources=[rows.json]", "--machine", MACHINES[name]]
        if "alpaca-lora" in name:
            place.arguments += ["data.validation=200", "sft.evaluate_every=20", "sft.save_every=20"]

    return build


def shortened(name: str) -> Build:
    """`zhibei train RECIPE` for two steps on a tiny model."""

    def build(place: Place) -> None:
        place.rows = chat_rows() if "vicuna" in name else alpaca_rows()
        place.subject = name
        place.arguments = ["model.path=model", "data.sources=[rows.json]", "model.precision=fp32", *SHORTER]
        if "lora" in name:
            place.arguments += ["sft.warmup_steps=1", "sft.evaluate_every=1", "sft.save_every=1"]

    return build


def many_sums() -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Add {number} and {number * 7 % 1301}.",
            "input": "",
            "output": SENTENCES[number % 4].format(number + number * 7 % 1301),
        }
        for number in range(NUM_ROWS)
    ]
