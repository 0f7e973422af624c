"""The progress line on recorded lists of records, in every mode."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from zhibei.cli.progress import Pace, ProgressLine, as_duration


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def train(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "time": 0.0, "epoch": step / 20, "loss": loss, "grad_norm": 1.0,
        "learning_rate": 2e-5, "tokens": 4096, "supervised_tokens": 900, "tokens_per_s": 12345.6, "seconds": 1.0,
        "peak_gib": None, "host_gib": 3.25, "micro_batches": 2,
    }  # fmt: skip


def play(mode: Any, records: list[dict[str, Any]], *, seconds_per_record: float = 1.0) -> str:
    stream, clock = io.StringIO(), Clock()
    with ProgressLine(mode, stream=stream, clock=clock) as line:
        for record in records:
            line(record)
            clock.now += seconds_per_record
    return stream.getvalue()


STARTED = {
    "kind": "event",
    "step": 0,
    "event": "started",
    "text": "all weights learn",
    "total_steps": 40,
    "total_rows": 320,
}
HELDOUT = {"kind": "heldout", "step": 20, "loss": 1.5, "perplexity": 4.4817, "is_best": True}
FINISHED = {"kind": "event", "step": 40, "event": "finished", "text": "the model is in model/"}
RUN = [STARTED, *map(train, range(1, 21)), HELDOUT, *map(train, range(21, 41)), FINISHED]


def test_plain_lines_are_sparse_and_complete() -> None:
    lines = play("plain", RUN).splitlines()
    steps = [line.split("/")[0] for line in lines if "/40" in line]
    assert steps == ["step 1", "step 11", "step 20", "step 21", "step 31", "step 40"]
    assert lines[0] == "started: all weights learn; 40 steps, 320 rows"
    assert "step 20: held-out loss 1.5000, perplexity 4.48, best so far" in lines
    assert lines[-1] == "step 40: finished: the model is in model/"
    assert lines[2] == (
        "step 11/40  epoch 0.55  loss 1.0000  (this step 1.0000)  12,346 tokens/s  lr 2.00e-05  "
        "memory 3.2 GiB  29 s left"
    )


def test_plain_output_has_no_control_characters() -> None:
    assert all(character == "\n" or character.isprintable() for character in play("plain", RUN))


@pytest.mark.parametrize("mode", ["plain", "quiet"])
def test_text_of_a_record_cannot_move_the_cursor(mode: Any) -> None:
    stopped = {"kind": "event", "step": 7, "event": "stopped", "text": "row\x1b[2J\r\nof text"}
    assert play(mode, [stopped]) == "step 7: stopped: row [2J  of text\n"


def test_quiet_shows_only_what_went_wrong() -> None:
    assert play("quiet", RUN) == ""
    stopped = {"kind": "event", "step": 7, "event": "stopped", "text": "loss is not finite"}
    assert play("quiet", [*RUN[:5], stopped]) == "step 7: stopped: loss is not finite\n"


def test_json_mode_gives_back_every_record() -> None:
    assert [json.loads(line) for line in play("json", RUN).splitlines()] == RUN


def test_json_mode_stays_json_when_the_loss_is_not_a_number() -> None:
    (line,) = play("json", [train(1, float("nan"))]).splitlines()
    assert json.loads(line)["loss"] is None
    assert "NaN" not in line


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    assert "(this step nan)" in play("plain", [train(1, float("nan"))])


def test_the_smoothed_loss_is_the_bias_corrected_average() -> None:
    # weights 0.1 and 0.09 for the newer and the older loss, divided by their sum
    lines = play("plain", [STARTED, train(1, 3.0), train(2, 1.0)]).splitlines()
    assert "loss 3.0000  (this step 3.0000)" in lines[1]
    assert f"loss {(0.09 * 3.0 + 0.1 * 1.0) / 0.19:.4f}  (this step 1.0000)" in lines[2]


def test_the_base_model_is_not_called_the_best() -> None:
    printed = play("plain", [{"kind": "heldout", "step": 0, "loss": 4.5, "perplexity": 90.0, "is_best": True}])
    assert printed == "before training, held-out loss 4.5000, perplexity 90.00\n"


def test_live_mode_keeps_the_lasting_lines() -> None:
    text = play("live", RUN)
    assert "held-out loss 1.5000, perplexity 4.48, best so far" in text
    assert "finished: the model is in model/" in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_live_line_fits_the_terminal(width: int) -> None:
    line = ProgressLine("live", stream=io.StringIO(), clock=Clock())
    for record in RUN[1:20]:
        line._console.width = width
        line(record)
        assert len(line._line) <= width
        assert line._line.startswith("step")
    line.close()


def test_records_without_any_field_do_not_break_it() -> None:
    records: list[dict[str, Any]] = [{}, {"kind": "train"}, {"kind": "heldout"}, {"kind": "event"}, {"kind": "new"}]
    for mode in ("plain", "quiet", "json", "live"):
        play(mode, records)


def test_time_left_survives_slow_first_steps_and_counts_evaluations() -> None:
    pace = Pace()
    now = 0.0
    for step in range(1, 65):
        now += 90.0 if step <= 3 else 2.0
        if step in (20, 40):
            pace.interruption()
            now += 30.0
        pace.step(step, now)
    # 2 s a step, and 2 x 30 s of evaluation spread over the 63 steps seen
    assert pace.seconds_left(100) == pytest.approx(100 * (2 + 60 / 63))


def test_time_left_is_unknown_before_three_steps() -> None:
    pace = Pace()
    for step in range(1, 4):
        pace.step(step, float(step))
    assert pace.seconds_left(10) is None
    pace.step(4, 4.0)
    assert pace.seconds_left(10) == 10.0


def test_steps_logged_every_tenth_give_the_same_pace() -> None:
    pace = Pace()
    for step in range(10, 60, 10):
        pace.step(step, float(step) * 3)
    assert pace.seconds_left(7) == pytest.approx(21.0)


def test_preparation_shows_rows_and_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressLine("plain", stream=stream, clock=clock) as line:
        for num_rows in range(0, 5001, 100):
            line.rows(num_rows, 5000)
            clock.now += 0.5
    assert stream.getvalue().splitlines() == [
        "preparing rows 0/5,000",
        "preparing rows 2,000/5,000   200 rows/s",
        "preparing rows 4,000/5,000   200 rows/s",
        "preparing rows 5,000/5,000   200 rows/s",
    ]


def test_what_preparation_says_is_a_lasting_line() -> None:
    stream = io.StringIO()
    with ProgressLine("plain", stream=stream, clock=Clock()) as line:
        line.rows(0, "prepared rows found in /cache/abc")
        line.rows(100, "preparing rows")
    assert stream.getvalue() == "note: prepared rows found in /cache/abc\npreparing rows 100\n"
    stream = io.StringIO()
    ProgressLine("json", stream=stream, clock=Clock()).rows(0, "prepared rows found")
    assert json.loads(stream.getvalue())["text"] == "prepared rows found"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7300, "2 h 1 min"), (200000, "2 d 7 h")],
)
def test_durations_read_like_durations(seconds: float, text: str) -> None:
    assert as_duration(seconds) == text


def test_a_policy_shows_its_reward_and_how_far_it_has_gone() -> None:
    started = {"kind": "event", "event": "started", "step": 0, "text": "", "total_steps": 2}
    figures = {
        "reward_mean": 0.25,
        "kl": 0.125,
        "entropy": 2.0,
        "length_mean": 12.0,
        "clip_share": 0.05,
        "seconds": 3.0,
    }
    records = [
        started,
        {"kind": "evaluation", "step": 0, "reward_mean": 0.2, "is_best": True},
        {"kind": "iteration", "step": 1, "seconds": 3.0, **figures},
        {"kind": "iteration", "step": 2, "seconds": 3.0, **figures},
        {"kind": "evaluation", "step": 2, "reward_mean": 0.5, "is_best": True},
    ]
    lines = play("plain", records).splitlines()
    assert "before training, held-out reward 0.2000" in lines
    assert "step 1/2  reward 0.2500  KL 0.125  entropy 2.000  length 12.0  clipped 5.0%  seconds 3.0" in lines
    assert "step 2: held-out reward 0.5000, best so far" in lines
    assert [json.loads(line)["kind"] for line in play("json", records).splitlines()][2] == "iteration"
    assert play("quiet", records) == ""
