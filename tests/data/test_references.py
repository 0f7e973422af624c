"""Questions and references come back by the ids of the rows that were prepared."""

from __future__ import annotations

import json
from pathlib import Path

from zhibei.config.run import DataSection
from zhibei.data.references import read_questions


def test_every_kind_of_record_gives_its_question_and_its_result(tmp_path: Path) -> None:
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([{"instruction": f"Add {i} and 1.", "output": f"{i + 1}"} for i in range(3)]))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}) + "\n")
    held = tmp_path / "held.json"
    held.write_text(json.dumps([{"instruction": "Held?", "output": "yes"}]))
    data = DataSection(sources=[str(asked), str(pairs)], validation=str(held))
    ids = {f"{asked}#1", f"{pairs}#0", f"{held}#0"}
    found = read_questions(data, ids)
    assert set(found) == ids
    assert (found[f"{asked}#1"].text, found[f"{asked}#1"].reference) == ("Add 1 and 1.", "2")
    assert found[f"{pairs}#0"].reference == "Hello."
    assert found[f"{held}#0"].reference == "yes"
