"""Prepared sets: the same whoever makes them, kept under a key that sees every change, audited as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.text.small_tokenizers import byte_level, sentencepiece_like, tokenizer_called
from tests.tiny import tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, ModelSection, RunFile
from zhibei.data import prepared_cache, workers
from zhibei.data.audit import format_audit
from zhibei.data.prepare import prepare, source_files
from zhibei.data.prepared import PreparedRows, PreparedSet
from zhibei.text.families import find_template
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.tokenizer import Tokenizer

NUM_ROWS = 60


def alpaca_rows(num_rows: int = NUM_ROWS) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {number}", "input": f"loudly {number}" if number % 3 == 0 else "", "output": f"{number}!"}
        for number in range(num_rows)
    ]


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.json", alpaca_rows())


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def run_of(path: Path | str, **data: Any) -> RunFile:
    section = DataSection(sources=[str(path)], **{"workers": 0, "validation": 0.1} | data)
    return RunFile(name="t", model=ModelSection(path="m"), data=section)


def prepared(
    path: Path | str, *, tokenizer: Tokenizer | None = None, template: str = "alpaca", **data: Any
) -> PreparedSet:
    tokenizer = tokenizer or byte_level()
    return prepare(run_of(path, **data), tokenizer, find_template(template, tokenizer))


def assert_same(left: PreparedSet, right: PreparedSet) -> None:
    for a, b in ((left.train, right.train), (left.heldout, right.heldout)):
        for name in ("tokens", "supervised", "borders"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert a.row_ids == b.row_ids
    assert left.audit == right.audit
    assert left.ledger == right.ledger


def texts(rows: PreparedRows, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(rows.tokens[a:b].tolist()) for a, b in zip(rows.borders, rows.borders[1:], strict=False)]


def learned(rows: PreparedRows, tokenizer: Tokenizer) -> list[str]:
    pairs = zip(rows.borders, rows.borders[1:], strict=False)
    return [tokenizer.decode(rows.tokens[a:b][rows.supervised[a:b]].tolist()) for a, b in pairs]


def test_rows_are_the_rendered_texts_and_their_answers(alpaca: Path) -> None:
    tokenizer = byte_level()
    found = prepared(alpaca)
    assert found.train.tokens.dtype == np.int32
    assert found.train.supervised.dtype == np.bool_
    assert found.train.borders.dtype == np.int64
    number = [int(row_id.split("#")[1]) for row_id in found.train.row_ids]
    assert learned(found.train, tokenizer) == [f"{n}!</s>" for n in number]
    assert texts(found.train, tokenizer)[0].startswith("Below is an instruction")
    assert len(found.train) + len(found.heldout) == NUM_ROWS == found.audit["rows_kept"]
    assert 0 < len(found.heldout) < NUM_ROWS / 2
    assert not set(found.train.row_ids) & set(found.heldout.row_ids)
    assert found.template == "alpaca"


def test_preparing_twice_gives_the_same_and_the_second_time_from_the_cache(alpaca: Path) -> None:
    told: list[str] = []
    tokenizer = byte_level()
    template = find_template("alpaca", tokenizer)
    first = prepare(run_of(alpaca), tokenizer, template)
    second = prepare(run_of(alpaca), tokenizer, template, progress=lambda done, text: told.append(text))
    fresh = prepare(run_of(alpaca), tokenizer, template, use_cache=False)
    assert_same(first, second)
    assert_same(first, fresh)
    assert isinstance(second.train.tokens, np.memmap)
    assert told == [f"prepared rows found in {first.folder}"]
    assert fresh.folder is None


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_number_of_workers_does_not_matter(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 50)
    monkeypatch.setattr(workers, "ROWS_PER_WORKER", 100)
    path = write(tmp_path / "many.json", [*alpaca_rows(300), {"instruction": "x", "output": "has </s> inside"}])
    tokenizer = byte_level()
    template = find_template("alpaca", tokenizer)
    alone = prepare(run_of(path, workers=0), tokenizer, template, use_cache=False)
    assert_same(alone, prepare(run_of(path, workers=num_workers), tokenizer, template, use_cache=False))
    assert alone.audit["dropped"] == {"special_token": 1}


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    """Workers are interpreters of their own, so the script is not run again in each of them."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "many.json", alpaca_rows(220))
    script = tmp_path / "script.py"
    script.write_text(
        "from zhibei.config.run import DataSection, ModelSection, RunFile\n"
        "from zhibei.data import prepare, workers\n"
        "from zhibei.text.families import find_template\n"
        "from zhibei.text.tokenizer import load_tokenizer\n"
        "workers.CHUNK_ROWS, workers.ROWS_PER_WORKER = 50, 100\n"
        f"tokenizer = load_tokenizer({str(tmp_path / 'tokenizer')!r})\n"
        f"data = DataSection(sources=[{str(path)!r}], workers=2)\n"
        "run = RunFile(name='t', model=ModelSection(path='m'), data=data)\n"
        "print(prepare.prepare(run, tokenizer, find_template('alpaca', tokenizer)).audit['rows_kept'])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "220\n", "")


def test_a_worker_that_dies_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 50)
    monkeypatch.setattr(workers, "ROWS_PER_WORKER", 100)
    monkeypatch.setattr(workers, "WORKER", "raise SystemExit(9)")
    with pytest.raises(UserError, match=r"died \(exit code 9\)") as caught:
        prepared(write(tmp_path / "many.json", alpaca_rows(300)), workers=2)
    assert "data.workers" in caught.value.fix


def test_leftovers_of_killed_runs_are_removed_when_old(alpaca: Path) -> None:
    root = prepared_cache.cache_root(None) / "prepared"
    old, young = root / ".new-abc-1", root / ".new-abc-2"
    for left in (old, young):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepared(alpaca)
    assert (old.exists(), young.exists()) == (False, True)


def test_an_error_in_a_worker_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 50)
    monkeypatch.setattr(workers, "ROWS_PER_WORKER", 100)
    rows = alpaca_rows(300)
    rows[177]["output"] = "a </s> b"
    path = write(tmp_path / "many.json", rows)
    with pytest.raises(UserError, match="special token") as caught:
        prepared(path, workers=2, special_tokens_in_text="stop")
    assert "record 177" in caught.value.where


def test_each_part_of_the_key_changes_the_key(alpaca: Path, tmp_path: Path) -> None:
    tokenizer = byte_level()
    keys = {"as it is": prepared(alpaca).key}
    keys["again"] = prepared(alpaca).key
    assert keys.pop("again") == keys["as it is"]
    changes: dict[str, dict[str, Any]] = {
        "max_tokens": {"max_tokens": 777},
        "too_long": {"too_long": "cut"},
        "supervise": {"supervise": "everything"},
        "system": {"system": "Be brief."},
        "special": {"special_tokens_in_text": "keep"},
        "validation": {"validation": 5},
        "on_error": {"on_error": "drop"},
    }
    for name, change in changes.items():
        keys[name] = prepared(alpaca, **change).key
    keys["template"] = prepared(alpaca, template="alpaca_lora").key
    keys["tokenizer"] = prepared(alpaca, tokenizer=sentencepiece_like()).key
    source = DataSection(sources=[{"path": str(alpaca), "limit": 30}], workers=0, validation=0.1)  # pyright: ignore
    limited = RunFile(name="t", model=ModelSection(path="m"), data=source)
    keys["source"] = prepare(limited, tokenizer, find_template("alpaca", tokenizer)).key
    own = JinjaTemplate("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", {"eos_token": "</s>"})
    keys["own template"] = prepare(run_of(alpaca), tokenizer, own).key
    rows = alpaca_rows()
    rows[0]["output"] = "changed"
    write(alpaca, rows)
    keys["content"] = prepared(alpaca).key
    assert len(set(keys.values())) == len(keys), keys


def test_settings_that_decide_no_row_do_not_change_the_key(alpaca: Path) -> None:
    assert prepared(alpaca).key == prepared(alpaca, workers=1, shuffle=False, packing=False).key


def test_content_of_the_same_size_is_seen(alpaca: Path) -> None:
    before = prepared(alpaca).key
    alpaca.write_text(alpaca.read_text().replace('"5!"', '"6!"'))
    assert prepared(alpaca).key != before


def test_what_another_run_has_kept_meanwhile_is_not_taken_away(alpaca: Path) -> None:
    """Two runs may find nothing and prepare alike; the second must not remove what the first is reading."""
    first = prepared(alpaca)
    assert first.folder
    before = first.folder.stat().st_ino
    prepared_cache.write_prepared(first.folder, first, facts={})
    assert first.folder.stat().st_ino == before
    (first.folder / "ledger.jsonl").unlink()
    prepared_cache.write_prepared(first.folder, first, facts={})
    assert first.folder.stat().st_ino != before
    assert prepared_cache.fault_of(first.folder) == ""


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.tokens.npy", lambda content: content[:-4]),
        ("train.supervised.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("ledger.jsonl", None),
        ("index.json", lambda content: content[: len(content) // 2]),
    ],
)
def test_a_damaged_cache_is_made_again_and_says_so(
    alpaca: Path, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    first = prepared(alpaca)
    assert first.folder
    kept = {side: np.array(getattr(first, side).tokens) for side in ("train", "heldout")}
    path = first.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    told: list[str] = []
    tokenizer = byte_level()
    template = find_template("alpaca", tokenizer)
    again = prepare(run_of(alpaca), tokenizer, template, progress=lambda done, text: told.append(text))
    assert any("damaged" in text and name in text for text in told)
    assert np.array_equal(again.train.tokens, kept["train"])
    assert np.array_equal(again.heldout.tokens, kept["heldout"])
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_does_not_cost_the_run(alpaca: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    told: list[str] = []
    tokenizer = byte_level()
    template = find_template("alpaca", tokenizer)
    run = run_of(alpaca, cache=str(tmp_path / "file"))
    found = prepare(run, tokenizer, template, progress=lambda done, text: told.append(text))
    assert_same(found, prepared(alpaca))
    assert found.folder is None
    assert any("cannot be kept" in text for text in told)


def test_nothing_half_written_is_left_behind(alpaca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies while writing leaves no folder under the key."""

    def broken(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared_cache, "write_text_atomic", broken)
        with pytest.raises(KeyboardInterrupt):
            prepared(alpaca)
    root = prepared_cache.cache_root(None) / "prepared"
    assert not root.exists() or not [path for path in root.iterdir() if path.is_dir()]
    assert prepared(alpaca).folder in list(root.iterdir())


def test_own_chat_templates_work_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 50)
    monkeypatch.setattr(workers, "ROWS_PER_WORKER", 100)
    path = write(tmp_path / "many.json", alpaca_rows(220))
    tokenizer = byte_level()
    native = find_template("chatml", tokenizer)
    own = JinjaTemplate(native.as_jinja(), dict(tokenizer.named_specials), marks=tokenizer.special_strings)
    plain = prepare(run_of(path), tokenizer, native, use_cache=False)
    for num_workers in (0, 2):
        found = prepare(run_of(path, workers=num_workers), tokenizer, own, use_cache=False)
        assert np.array_equal(found.train.tokens, plain.train.tokens)
        assert np.array_equal(found.train.supervised, plain.train.supervised)


def test_long_rows_are_dropped_cut_or_stop(tmp_path: Path) -> None:
    rows = alpaca_rows(20)
    rows[7]["output"] = "word " * 400
    path = write(tmp_path / "long.json", rows)
    dropped = prepared(path, max_tokens=300)
    assert [(e["row"], e["action"], e["reason"]) for e in dropped.ledger] == [(f"{path}#7", "dropped", "too_long")]
    assert dropped.audit["dropped"] == {"too_long": 1}
    cut = prepared(path, max_tokens=300, too_long="cut")
    assert cut.audit["rows_cut"] == 1
    assert cut.audit["terminators_supervised"] == cut.audit["terminators"] - 1 == 19
    place = [*cut.train.row_ids, *cut.heldout.row_ids].index(f"{path}#7")
    lengths = [*cut.train.lengths, *cut.heldout.lengths]
    assert lengths[place] == 300 == max(lengths)
    with pytest.raises(UserError, match=r"the row has .* tokens") as caught:
        prepared(path, max_tokens=300, too_long="stop")
    assert "record 7" in caught.value.where


def test_rows_in_which_nothing_is_learned_go_into_the_ledger(tmp_path: Path) -> None:
    """Cut inside the prompt: a row without targets would only dilute the batch."""
    rows = alpaca_rows(20)
    rows[3]["instruction"] = "word " * 400
    path = write(tmp_path / "prompt.json", rows)
    found = prepared(path, max_tokens=300, too_long="cut")
    assert found.audit["dropped"] == {"nothing_learned": 1}
    assert f"{path}#3" not in [*found.train.row_ids, *found.heldout.row_ids]


def test_no_row_left_is_an_error(alpaca: Path) -> None:
    with pytest.raises(UserError, match=r"no row is left to train on: 60 read.*60 too_long"):
        prepared(alpaca, max_tokens=10)


def test_terminators_that_are_never_learned_are_an_error(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}", "output": "word " * 400} for n in range(20)]
    with pytest.raises(UserError, match="never learn to stop"):
        prepared(write(tmp_path / "long.json", rows), max_tokens=300, too_long="cut")


def test_special_tokens_in_text(tmp_path: Path) -> None:
    rows = alpaca_rows(20)
    rows[4]["output"] = "say <|im_end|> now"
    rows[5]["input"] = "</s>"
    path = write(tmp_path / "special.json", rows)
    dropped = prepared(path)
    assert [entry["row"] for entry in dropped.ledger] == [f"{path}#4", f"{path}#5"]
    assert dropped.audit["rows_with_special_tokens_in_text"] == 2
    kept = prepared(path, special_tokens_in_text="keep")
    assert kept.audit["rows_kept"] == 20
    assert kept.audit["rows_with_special_tokens_in_text"] == 2
    with pytest.raises(UserError, match="special token") as caught:
        prepared(path, special_tokens_in_text="stop")
    assert "record 4" in caught.value.where


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_conversations_a_template_cannot_express(tmp_path: Path) -> None:
    rows = [chat(("user", f"q{n}"), ("assistant", "b")) for n in range(9)]
    rows.append(chat(("user", "time?"), ("assistant", "clock()"), ("tool", "noon"), ("assistant", "Noon.")))
    path = write(tmp_path / "odd.json", rows)
    with pytest.raises(UserError, match="cannot express") as caught:
        prepared(path, template="vicuna", validation=0.0)
    assert "record 9" in caught.value.where
    found = prepared(path, template="vicuna", validation=0.0, on_error="drop")
    assert found.audit["dropped"] == {"template": 1}
    assert prepared(path, template="chatml", validation=0.0).audit["rows_kept"] == 10


def test_broken_records_are_in_the_ledger_with_field_and_remedy(tmp_path: Path) -> None:
    rows: list[Any] = alpaca_rows(20)
    rows[6] = {"instruction": "x", "output": ""}
    path = write(tmp_path / "broken.json", rows)
    found = prepared(path, on_error="drop")
    (entry,) = found.ledger
    assert (entry["row"], entry["reason"], entry["field"]) == (f"{path}#6", "broken", "output")
    assert found.audit["rows_read"] == 20
    assert found.audit["rows_kept"] == 19


def test_plain_text_is_cut_into_chunks_without_losing_a_token(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    document = "The user said hello to the world. " * 60
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {document}"}) + "\n" for n in range(4)))
    found = prepared(path, tokenizer=tokenizer, max_tokens=100, validation=0.0)
    whole = [tokenizer.encode(f"<s>{n} {document}</s>") for n in range(4)]
    assert found.train.tokens.tolist() == [token for ids in whole for token in ids]
    assert found.train.lengths.max() <= 100
    assert found.train.lengths.min() > 50, "chunks are of nearly equal length"
    assert found.train.row_ids[:2] == [f"{path}#0:0", f"{path}#0:1"]
    assert not found.train.supervised[found.train.borders[:-1]].any()
    assert found.train.supervised.sum() == len(found.train.tokens) - len(found.train)
    assert found.audit["bos_per_row"] == {"min": 1, "max": 1}
    assert found.audit["dropped"] == {}


def test_a_validation_file_is_held_out_and_its_rows_are_not_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", alpaca_rows(30))
    held = write(tmp_path / "held.json", alpaca_rows(60)[28:33])
    found = prepared(train, validation=str(held))
    assert found.heldout.row_ids == [f"{held}#{n}" for n in range(5)]
    assert found.train.row_ids == [f"{train}#{n}" for n in range(28)]
    assert found.audit["dropped"] == {"in_validation": 2}
    assert found.audit["duplicates"]["across_train_and_heldout"] == 0


def test_equal_rows_stay_on_one_side(tmp_path: Path) -> None:
    rows = alpaca_rows(40)
    found = prepared(write(tmp_path / "twice.json", [*rows, *rows]), validation=0.3)
    sides = {}
    for side in ("train", "heldout"):
        for row_id in getattr(found, side).row_ids:
            sides.setdefault(int(row_id.split("#")[1]) % 40, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert found.audit["duplicates"] == {"rows_said_before": 40, "across_train_and_heldout": 0}


def test_the_run_s_system_prompt_is_for_conversations_without_one(alpaca: Path) -> None:
    tokenizer = byte_level()
    found = prepared(alpaca, system="Be brief.")
    assert all(text.startswith("Be brief.\n\n###") for text in texts(found.train, tokenizer))
    assert all(text.startswith("### Instruction") for text in texts(prepared(alpaca, system="").train, tokenizer))


def test_the_audit_counts_every_row(alpaca: Path) -> None:
    found = prepared(alpaca, tokenizer=sentencepiece_like())
    audit = json.loads(json.dumps(found.audit, allow_nan=False))
    assert audit["rows_read"] == audit["rows_kept"] == audit["answers"] == audit["terminators"] == NUM_ROWS
    assert audit["terminators_supervised"] == NUM_ROWS
    assert audit["bos_per_row"] == {"min": 1, "max": 1}
    assert audit["tokens"] == len(found.train.tokens) + len(found.heldout.tokens)
    assert audit["tokens_supervised"] == found.train.supervised.sum() + found.heldout.supervised.sum()
    assert sum(one["rows"] for one in audit["lengths"]["histogram"]) == NUM_ROWS
    assert audit["prompts_compared"] == {"equal": 51, "merged": 0, "different": 0}
    lines = format_audit(audit)
    assert "60 read, 60 kept" in lines
    assert "100.00% keep and learn" in lines


def test_border_merges_are_counted_and_said(tmp_path: Path) -> None:
    """Stanford's prompt ends in ':', and this tokenizer has a token ':)'."""
    tokenizer = byte_level()
    assert tokenizer.id_of(":)") is not None
    rows = [{"instruction": f"i{n}", "output": ") yes" if n % 4 == 0 else "yes"} for n in range(40)]
    found = prepared(write(tmp_path / "colon.json", rows))
    assert found.audit["rows_with_border_merges"] == found.audit["border_merges"] == 10
    assert found.audit["prompts_compared"] == {"equal": 30, "merged": 10, "different": 0}
    assert any("10 rows (25.0%) one token holds the end of the prompt" in notice for notice in found.audit["notices"])
    healthy = prepared(tmp_path / "colon.json", template="alpaca_lora")
    assert healthy.audit["border_merges"] == 0
    assert healthy.audit["prompts_compared"] == {"equal": 40, "merged": 0, "different": 0}
    assert not any("one token holds" in notice for notice in healthy.audit["notices"])


def test_the_real_alpaca_rows(shared: Callable[..., Path]) -> None:
    path = shared("data", "hiyouga+LLaMA-Factory", "data", "alpaca_en_demo.json")
    for name, template in (("llama2", "alpaca"), ("llama3", "llama3")):
        found = prepared(path, tokenizer=tokenizer_called(name), template=template, on_error="drop")
        assert found.audit["bos_per_row"] == {"min": 1, "max": 1}
        assert found.audit["terminators_supervised_share"] == 1.0
        assert found.audit["prompts_compared"]["different"] == 0
        assert found.audit["rows_kept"] + sum(found.audit["dropped"].values()) == found.audit["rows_read"]


def test_source_files_are_named_with_the_hash_of_their_content(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "held.json").write_text("[]")
    data = DataSection(sources=[str(tmp_path / "a.json")], validation=str(tmp_path / "held.json"))
    assert source_files(data) == [
        {
            "path": str(tmp_path / name),
            "bytes": 2,
            "sha256": "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
        }
        for name in ("a.json", "held.json")
    ]
