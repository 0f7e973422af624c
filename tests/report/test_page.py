"""The page: well-formed, self-contained, escaped, true to the files, and never stopped by a missing or damaged one."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.fake_run import EVIL, fake_run
from zhibei.report.inputs import read_inputs
from zhibei.report.page import SECTIONS, TRAINING_PAGE, write_report
from zhibei.report.training import key_figures
from zhibei.store.run_dir import RunDir

VOID = {"meta", "input", "br", "img", "link"}
INPUT_OF_SECTION = {
    "verdict": "metrics.jsonl",
    "key_figures": "metrics.jsonl",
    "curves": "metrics.jsonl",
    "samples": "samples",
    "events": "metrics.jsonl",
    "proofs": "proofs.json",
    "audit": "audit.json",
    "dropped_rows": "ledger.jsonl",
    "run_file": "resolved.yaml",
    "manifest": "manifest.json",
    "check": "check.json",
    "rehearsal": "rehearsal.json",
    "plan": "plan.json",
}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return fake_run(tmp_path_factory.mktemp("runs") / "sft-01")


@pytest.fixture(scope="module")
def page(run_dir: RunDir) -> str:
    return write_report(run_dir).read_text("utf-8")


def test_every_element_is_closed(page: str) -> None:
    assert len(read(page).tags) > 200


def test_the_reader_of_this_test_notices_an_open_element() -> None:
    with pytest.raises(AssertionError):
        read("<div><p></div>")


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in read(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data", "xlink:href", "style")
            assert name != "href" or (value or "").startswith("#")
            assert not name.startswith("on")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_text_of_the_user_stays_text(page: str, run_dir: RunDir) -> None:
    reader = read(page)
    assert len(reader.scripts) == 1
    assert "pwned" not in reader.scripts[0]
    shown = "".join(reader.text)
    # event text, sample prompt and answer, audit, ledger, manifest, proof, run file
    assert shown.count(EVIL) >= 8
    assert f"<title>{run_dir.path.name}</title>" in page


def test_only_our_script_may_run(page: str) -> None:
    (policy,) = [attributes["content"] for _, attributes in read(page).tags if attributes.get("http-equiv")]
    assert "default-src 'none'" in (policy or "")
    import base64
    import hashlib

    digest = base64.b64encode(hashlib.sha256(read(page).scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in (policy or "")


def test_both_languages_are_there_in_equal_number(page: str) -> None:
    classes = [attributes.get("class") or "" for _, attributes in read(page).tags]
    assert sum("en" in one.split() for one in classes) == sum("zh" in one.split() for one in classes) > 50


def test_no_identifier_is_used_twice(page: str) -> None:
    identifiers = [attributes["id"] for _, attributes in read(page).tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_the_curve_holds_the_recorded_losses(page: str, run_dir: RunDir) -> None:
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    for kind, english in (("train", "training loss"), ("heldout", "held-out loss")):
        recorded = [(record["step"], record["loss"]) for record in records if record["kind"] == kind]
        found = re.search(rf'data-en="{english}" data-zh="[^"]*" data-steps="([^"]*)" data-values="([^"]*)"', page)
        assert found is not None
        assert [int(step) for step in found[1].split()] == [step for step, _ in recorded]
        assert [float(value) for value in found[2].split()] == pytest.approx([loss for _, loss in recorded], rel=1e-5)


def test_key_figures_are_those_of_the_records(run_dir: RunDir) -> None:
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    heldout = [record for record in records if record["kind"] == "heldout"]
    figures = key_figures(read_inputs(run_dir))
    assert figures["status"] == "finished"
    assert figures["steps"] == figures["total_steps"] == 400
    assert figures["tokens"] == sum(record["tokens"] for record in train)
    assert figures["best_heldout_loss"] == min(record["loss"] for record in heldout)
    assert figures["base_heldout_loss"] == 3.1
    assert figures["heldout_loss"] == heldout[-1]["loss"]
    assert figures["resumed_at_steps"] == [200]
    # 400 steps of 1.6 s, 30 s before and 9 s after them; the pause of two hours before the resume does not count
    assert figures["seconds"] == pytest.approx(400 * 1.6 + 30 + 9 - 1.6 + 5 - 5, abs=8)


@pytest.mark.parametrize("name", INPUT_OF_SECTION)
def test_a_section_without_its_input_says_so(name: str, tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    with_input = SECTIONS[name](read_inputs(run_dir)).body
    path = run_dir.path / INPUT_OF_SECTION[name]
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    without_input = SECTIONS[name](read_inputs(run_dir)).body
    read(without_input)
    assert without_input != with_input
    assert 'class="missing"' not in with_input
    assert 'class="missing"' in without_input or "No end recorded" in without_input


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\xfe\x00", b"[1, 2", b"null", b"[]", b"{}", b'"text"', b"[[1]]\n{", b"3"]
)
def test_damaged_files_never_stop_the_page(damage: bytes, tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    for path in sorted(run_dir.path.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            path.write_bytes(damage)
    read(write_report(run_dir).read_text("utf-8"))


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    page = write_report(RunDir(tmp_path)).read_text("utf-8")
    assert read(page)
    assert page.count('class="missing"') >= 8


def test_records_with_strange_fields_never_stop_the_page(tmp_path: Path) -> None:
    strange = [
        {"kind": "train", "step": "7", "loss": "high"}, {"kind": "train", "step": 1}, {"kind": "heldout", "step": 3},
        {"kind": "train", "step": 2, "loss": None, "time": "2026-01-02T03:04:05Z", "tokens": "many"},
        {"kind": "event"}, {"kind": "event", "event": "resumed"}, {"step": 4}, {"kind": "train", "step": 5, "time": {}},
    ]  # fmt: skip
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text("".join(json.dumps(record) + "\n" for record in strange))
    run_dir.samples.mkdir()
    (run_dir.samples / "step-000001.json").write_text('[{"prompt": 3}, 4, {"tuned": ["a"]}]')
    run_dir.proofs.write_text('[{"passed": "yes"}, {"name": {"a": 1}, "value": [1]}]')
    run_dir.ledger.write_text('{"reason": ["a"]}\n{"excerpt": {"a": 1}}\n')
    read(write_report(run_dir).read_text("utf-8"))


def test_a_torn_last_line_costs_one_record_and_is_said(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100, end="")
    whole = key_figures(read_inputs(run_dir))
    with run_dir.metrics.open("a") as file:
        file.write('{"kind": "train", "step": 101, "lo')
    torn = read_inputs(run_dir)
    assert "metrics.jsonl" in torn.problems
    assert {**key_figures(torn), "problems": {}} == {**whole, "problems": {}}
    assert "cut in the middle" in write_report(run_dir).read_text("utf-8")


def test_a_run_that_was_killed_is_not_called_finished(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100, end="")
    assert "No end recorded" in SECTIONS["verdict"](read_inputs(run_dir)).body
    with run_dir.metrics.open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 100, "time": 0, "event": "finished", "text": ""}) + "\n")
    assert "Finished" in SECTIONS["verdict"](read_inputs(run_dir)).body
    with run_dir.metrics.open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 50, "time": 0, "event": "resumed", "text": ""}) + "\n")
    assert "No end recorded" in SECTIONS["verdict"](read_inputs(run_dir)).body


def test_a_stopped_run_says_where_and_why(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100, end="stopped")
    body = SECTIONS["verdict"](read_inputs(run_dir)).body
    assert "verdict bad" in body
    assert "at step 100 / 100" in body
    assert "stopped &lt;script&gt;" in body


def test_a_loss_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    text = run_dir.metrics.read_text().splitlines()
    broken = {"kind": "train", "step": 101, "time": 1.79e9, "loss": None, "not_finite": {"loss": "nan"}}
    run_dir.metrics.write_text("\n".join([*text, json.dumps(broken), ""]))
    assert "training loss: not a finite number at 1 step(s): 101." in write_report(run_dir).read_text("utf-8")


def test_a_long_run_makes_a_page_below_three_megabytes(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=20_000)
    path = write_report(run_dir)
    assert path.stat().st_size < 3_000_000
    assert "of 20,000 points are drawn" in path.read_text("utf-8")


def test_every_section_is_on_the_page() -> None:
    assert sorted([*TRAINING_PAGE, "judged", "health_board", "handed_over"]) == sorted(SECTIONS)


def test_dropped_rows_are_counted_by_reason(run_dir: RunDir) -> None:
    body = SECTIONS["dropped_rows"](read_inputs(run_dir)).body
    assert '<td>too_long</td><td class="number">41</td>' in body
    assert '<td>nothing_learned</td><td class="number">1</td>' in body
    assert "data/alpaca.json, record 7 (line 43)" in body
    assert "data/alpaca.json, record 9 (line 50)" in body
    assert body.count("tokens</span>") == 5


def test_totals_of_a_finished_run_are_those_of_its_manifest(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    kept = [record for record in records if record["kind"] != "train" or record["step"] % 10 == 0]
    run_dir.metrics.write_text("".join(json.dumps(record) + "\n" for record in kept))
    logged = sum(record["tokens"] for record in kept if record["kind"] == "train")
    figures = key_figures(read_inputs(run_dir))
    assert (figures["tokens"], figures["tokens_are_estimated"]) == (logged * 10, True)
    assert "estimated: not every step was logged" in SECTIONS["key_figures"](read_inputs(run_dir)).body
    run_dir.manifest.write_text(json.dumps({"finished": {"tokens": 123, "learned_tokens": 45, "model_step": 70}}))
    figures = key_figures(read_inputs(run_dir))
    assert (figures["tokens"], figures["supervised_tokens"], figures["tokens_are_estimated"]) == (123, 45, False)


def test_an_early_stop_is_said(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    with run_dir.metrics.open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 100, "event": "early stop", "text": "no gain in 3"}) + "\n")
    body = SECTIONS["verdict"](read_inputs(run_dir)).body
    assert "Stopped early: " in body
    assert "no gain in 3" in body


def test_what_was_known_beforehand_stands_beside_what_came(run_dir: RunDir) -> None:
    inputs = read_inputs(run_dir)
    shown = {name: " ".join("".join(read(SECTIONS[name](inputs).body).text).split()) for name in ("check", "plan")}
    assert "wrong-family-template" in shown["check"]
    assert "accepted" in shown["check"]
    assert "learning-rate-too-high" in shown["check"]
    assert re.search(r"GPU memory, peak.{0,20}60.80 GiB\s*61.20 GiB", shown["plan"])
    assert re.search(r"memory between steps.{0,20}42.65 GiB\s*42.70 GiB", shown["plan"])  # without what a save needs
    run_dir_of_sound_run = RunDir(run_dir.path.parent / "sound")
    run_dir_of_sound_run.path.mkdir()
    run_dir_of_sound_run.check.write_text(json.dumps({"findings": [], "accepted": [], "checks": 127}))
    body = SECTIONS["check"](read_inputs(run_dir_of_sound_run)).body
    assert "Nothing was found by 127 checks" in body
    assert "127 项检查均未发现问题" in body
