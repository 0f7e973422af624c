"""`zhibei quickstart --model M --data F`: the user's model on the user's rows, measured by held-out loss.

Knows the order of stages. There is no checker for foreign data, so the score is nats per held-out token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.data.prepared import PreparedRows
from zhibei.evaluate.row_losses import row_losses
from zhibei.evaluate.stats import ratio_interval
from zhibei.pipeline.outcome import Outcome
from zhibei.pipeline.place import Order, Place, take_place
from zhibei.pipeline.run_text import Settings
from zhibei.pipeline.stage import Watch, stage_record, train_stage, write_run_file
from zhibei.pipeline.summary import Stage, summary_of, write_summary
from zhibei.store.files import read_json
from zhibei.store.pipeline_dir import write_pipeline
from zhibei.store.run_dir import RunDir

MOST_RECORDS = 2000
"""A quick start reads no more of the data than this; `sft.yaml` says so and can be changed."""
MOST_TOKENS = 512
MOST_EPOCHS = 3
MOST_HELDOUT_ROWS = 200
BATCH = 16


def run_own(place: Place, order: Order, *, watch: Watch, started: float) -> Outcome:
    """Fine-tune `order.model` on `order.data` and measure both models on held-out rows.

    Raises UserError when nothing is held out, and whatever reading, preparing and training raise.
    """
    folder = place.folder.resolve()
    watch(stage_record("data", f"{order.data}, its first {MOST_RECORDS:,} records"))
    from zhibei.data.prepare import prepare
    from zhibei.text.families import find_template
    from zhibei.train.beginning import load_run_tokenizer

    settings = _settings(folder, order)
    take_place(place, order)
    run_file = write_run_file(folder / "sft.yaml", settings, about="Your model on your data.")
    run = read_run(run_file).run
    tokenizer = load_run_tokenizer(run)
    rows = prepare(run, tokenizer, find_template(run.data.template, tokenizer))
    if len(rows.heldout) == 0:
        raise UserError(
            f"none of the {len(rows.train)} rows is held out",
            expected="enough rows to hold a tenth of them out",
            fix="use at least 20 rows",
            where=order.data,
        )
    settings["sft"] |= _steps(len(rows.train), most=order.steps)
    run_file = write_run_file(folder / "sft.yaml", settings, about="Your model on your data.")

    watch(stage_record("ask base", "the model as it is, on rows it will not be trained on"))
    base = _measured("base", run.model.path, rows.heldout, tokenizer.pad_id, began=started)
    base_ended = time.monotonic()
    watch(stage_record("sft", f"learns from {len(rows.train):,} rows"))
    sft = train_stage(run_file, watch=watch)
    watch(stage_record("ask sft", "the tuned model, on the same rows"))
    tuned = _measured("sft", str(sft.path), rows.heldout, tokenizer.pad_id, began=base_ended)

    outcome = Outcome(place.folder, stages=[base, tuned], examples=_examples(sft))
    write_pipeline(folder, stages=["sft"], final="sft")
    outcome.summary = summary_of(outcome.stages, seed=order.seed, total_seconds=time.monotonic() - started)
    write_summary(folder, outcome.summary)
    return outcome


def _settings(folder: Path, order: Order) -> Settings:
    settings: Settings = {
        "name": "sft",
        "runs": str(folder),
        "seed": order.seed,
        "model": {"path": _absolute(order.model), "method": order.method},
        "data": {
            "sources": [{"path": _absolute(order.data), "limit": MOST_RECORDS}],
            "template": order.template,
            "max_tokens": min(MOST_TOKENS, _context_tokens(order.model)),
            "validation": 0.1,
            # A first try should not fail on one bad record; the ledger of the run lists what was left out.
            "on_error": "drop",
        },
        "sft": {"evaluate_rows": MOST_HELDOUT_ROWS, "keep_checkpoints": 1, "warmup_ratio": 0.1},
    }
    if order.learning_rate is not None:
        settings["sft"]["learning_rate"] = order.learning_rate
    return settings


def _steps(num_rows: int, *, most: int) -> dict[str, int]:
    """A batch that the rows fill, and as many steps as were asked for but no more than three passes."""
    batch = max(1, min(BATCH, num_rows // 4))
    num_steps = max(1, min(most, MOST_EPOCHS * num_rows // batch))
    every = max(1, num_steps // 4)
    return {"global_batch": batch, "max_steps": num_steps, "evaluate_every": every, "save_every": every}


def _measured(name: str, path: str, heldout: PreparedRows, pad_token: int, *, began: float) -> Stage:
    """Held-out loss in nats per learned token; the model is released again before the next one is loaded."""
    from zhibei.model.load import load_for_inference

    model = load_for_inference(path)
    sums, counts = row_losses(model, heldout, pad_token=pad_token, most_rows=MOST_HELDOUT_ROWS)
    loss, low, high = ratio_interval(sums.tolist(), counts.tolist())
    return Stage(name, "heldout_loss", loss, low, high, time.monotonic() - began)


def _examples(run: RunDir) -> list[dict[str, Any]]:
    """The last sample panel of the run: the same prompts to both models."""
    panels = sorted(run.samples.glob("step-*.json"))
    if not panels:
        return []
    return [
        {"question": row["prompt"], "expected": "", "answers": {"base": row["base"], "sft": row["tuned"]}, "right": {}}
        for row in read_json(panels[-1])
    ]


def _absolute(path: str) -> str:
    """Local paths are made absolute, so that the run file works from everywhere; a hub id stays what it is."""
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path


def _context_tokens(model: str) -> int:
    """Longest row the model was made for; MOST_TOKENS where its configuration names none."""
    from transformers import AutoConfig

    from zhibei.model.locate import locate

    config = AutoConfig.from_pretrained(locate(model).weights).get_text_config()
    return getattr(config, "max_position_embeddings", None) or MOST_TOKENS
