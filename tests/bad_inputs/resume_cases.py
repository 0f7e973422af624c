"""Runs that are continued although something under them has changed. Knows only what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.model_cases import change_json, change_tensors
from tests.bad_inputs.output_cases import finish_run
from tests.bad_inputs.place import Place, alpaca_rows
from tests.bad_inputs.scenario import Build, Scenario


def stopped(change: Callable[[Place, Path], object]) -> Build:
    """A run that was stopped after two of three saved steps, and then `change(place, run_dir)`."""

    def build(place: Place) -> None:
        place.set("sft.save_every", 1)
        run_dir = finish_run(place)
        shutil.rmtree(run_dir / "model")
        shutil.rmtree(sorted((run_dir / "checkpoints").iterdir())[-1])
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line).get("step", 0) <= 2]
        (run_dir / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
        change(place, run_dir)
        place.verb = "resume"

    return build


def newest_checkpoint(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").iterdir())[-1]


def _half_checkpoint(place: Place, run_dir: Path) -> None:
    """A newer checkpoint that was being written when the machine went down."""
    newest = newest_checkpoint(run_dir)
    half = newest.with_name("step-000003")
    shutil.copytree(newest, half)
    largest = max((path for path in half.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def _changed_rows(place: Place, run_dir: Path) -> None:
    rows = alpaca_rows()
    rows[17]["output"] = "Something else."
    place.rows = rows


def _changed_tokenizer(place: Place, run_dir: Path) -> None:
    path = place.model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[:-5]
    path.write_text(json.dumps(content), encoding="utf-8")


RESUME_CASES = [
    Scenario(
        "s1_killed_mid_save",
        "The newest checkpoint is half-written; the one before it is sound.",
        stopped(_half_checkpoint),
        value="step-000003",
        where=r"step-000003|runs/tried",
        remedy="step-000002|goes on|resumed",
        may=("handled",),
        proof=lambda place: (place.folder / "runs" / "tried" / "model" / "model.safetensors").is_file(),
    ),
    Scenario(
        "s2_changed_data",
        "A record was changed since the run began.",
        stopped(_changed_rows),
        value="rows|data|prepared",
        where=r"rows\.json|manifest\.json|runs/tried",
        remedy="to do:.*",
    ),
    Scenario(
        "s3_changed_tokenizer",
        "The tokenizer was changed since the run began.",
        stopped(_changed_tokenizer),
        value="tokenizer",
        where=r"tokenizer|manifest\.json|runs/tried",
        remedy="to do:.*",
    ),
]


def scale_base(place: Place, run_dir: Path) -> None:
    """Other base weights under the same name."""
    change_tensors(place.model, lambda tensors: tensors["model.norm.weight"].mul_(1.5))


def rename_template(place: Place, run_dir: Path) -> None:
    """resolved.yaml names another template than the run began with."""
    path = run_dir / "resolved.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("template: alpaca", "template: vicuna"), encoding="utf-8")


def change_seed(place: Place, run_dir: Path) -> None:
    path = run_dir / "resolved.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("seed: 1", "seed: 2"), encoding="utf-8")


def foreign_manifest(place: Place, run_dir: Path) -> None:
    change_json(run_dir / "manifest.json", run_id="another-run")


RESUME_VARIANTS = [
    Scenario(
        "v_s_changed_base",
        "Other base weights under the same path.",
        stopped(scale_base),
        value="base|weights",
        where=r"model|manifest\.json|runs/tried",
        remedy="to do:.*",
    ),
    Scenario(
        "v_s_changed_template",
        "Another template than the run began with.",
        stopped(rename_template),
        value="template",
        where=r"manifest\.json|runs/tried|data\.template",
        remedy="to do:.*",
    ),
    Scenario(
        "v_s_other_seed",
        "Another seed: rows would come in another order.",
        stopped(change_seed),
        value="seed",
        where=r"manifest\.json|runs/tried",
        remedy="to do:.*",
    ),
    Scenario(
        "v_s_other_run",
        "The manifest of another run.",
        stopped(foreign_manifest),
        value="another-run",
        where=r"runs/tried|manifest",
        remedy="to do:.*",
    ),
]
