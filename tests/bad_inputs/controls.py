"""Sound inputs in all their forms: none of them may be stopped or warned about. Knows no verdict."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from typing import Any

from tests.bad_inputs.adapter_cases import lora, make_adapter
from tests.bad_inputs.config_cases import settings
from tests.bad_inputs.data_cases import lines
from tests.bad_inputs.output_variants import large_model
from tests.bad_inputs.pair_cases import pairs
from tests.bad_inputs.place import Place, alpaca_rows, chat_rows
from tests.bad_inputs.resume_cases import stopped
from tests.bad_inputs.scenario import OF_A_QUANTISED_BASE, Build, Control
from tests.tiny import FAMILIES


def as_bytes(name: str, content: bytes) -> Build:
    def build(place: Place) -> None:
        place.rows = None
        place.folder.mkdir(parents=True, exist_ok=True)
        (place.folder / name).write_bytes(content)
        place.set("data.sources", [name])

    return build


def rows(make: Callable[[], list[Any]], **changes: Any) -> Build:
    def build(place: Place) -> None:
        place.rows = make()
        for key, value in changes.items():
            place.set(key.replace("__", "."), value)

    return build


def family(name: str, *, method: str = "full") -> Build:
    def build(place: Place) -> None:
        place.family = name
        place.set("model.method", method)
        place.set("data.packing", None if name != "phi" else True)

    return build


def _sharegpt() -> list[Any]:
    return [
        {"conversations": [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]}
        for row in alpaca_rows()
    ]


def _chinese() -> list[Any]:
    return [{"instruction": f"{n} 加 {n % 7}？", "input": "", "output": f"是 {n + n % 7}。"} for n in range(60)]


def _csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["instruction", "input", "output"])
    writer.writeheader()
    writer.writerows(alpaca_rows())
    return text.getvalue().encode()


def _parquet(place: Place) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.rows = None
    place.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(alpaca_rows()), place.folder / "rows.parquet")
    place.set("data.sources", ["rows.parquet"])


def _link(place: Place) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "real.jsonl").write_text(lines(alpaca_rows()), encoding="utf-8")
    (place.folder / "rows.jsonl").symlink_to("real.jsonl")
    place.rows = None
    place.set("data.sources", ["rows.jsonl"])


def _held_out_file(place: Place) -> None:
    place.rows = alpaca_rows(50)
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "exam.json").write_text(json.dumps(alpaca_rows(60)[50:]), encoding="utf-8")
    place.set("data.validation", "exam.json")


def _linked_model(place: Place) -> None:
    """As the hub's cache holds a model: links to blobs."""
    blobs = place.folder / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(place.model.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))


def _continue_adapter(place: Place) -> None:
    make_adapter(place.folder / "adapter", place.model)
    settings({"model.method": "lora", "lora.adapter": "adapter"})(place)


def _two_sources(place: Place) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "chats.json").write_text(json.dumps(chat_rows(20)), encoding="utf-8")
    place.set("data.sources", ["rows.json", {"path": "chats.json", "weight": 2}])


def _unicode_names(place: Place) -> None:
    place.rows = None
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "数据 é.jsonl").write_text(lines(alpaca_rows()), encoding="utf-8")
    settings({"name": "tried", "runs": "实验 runs", "data.sources": ["数据 é.jsonl"]})(place)


def _checked(build: Build) -> Build:
    def with_check(place: Place) -> None:
        build(place)
        place.verb = "check"

    return with_check


def nothing(place: Place) -> None:
    """The place as it is made."""


WINDOWS = lines(alpaca_rows()).replace("\n", "\r\n").encode()
LORA = {"model.method": "lora", "sft.learning_rate": 2e-4}
QLORA = {"model.method": "qlora", "sft.learning_rate": 2e-4}
EIGHT = {"data__validation": 0, "sft__global_batch": 4, "sft__evaluate_every": None}

CONTROLS = [
    Control("full", nothing),
    Control("full_check", _checked(nothing)),
    Control("lora", lora(rank=4)),
    Control("lora_named_targets", lora(rank=4, targets=["q_proj", "v_proj"])),
    Control("lora_continued", _continue_adapter),
    *[Control(f"family_{name}", family(name)) for name in FAMILIES],
    Control("family_qwen2_lora", family("qwen2", method="lora")),
    Control("messages_vicuna", rows(chat_rows, data__template="vicuna")),
    Control("sharegpt", rows(_sharegpt, data__template="vicuna")),
    Control("chinese", rows(_chinese)),
    Control("eight_rows", rows(lambda: alpaca_rows(8), **EIGHT)),
    Control("bom", as_bytes("rows.jsonl", b"\xef\xbb\xbf" + lines(alpaca_rows()).encode())),
    Control("windows_lines", as_bytes("rows.jsonl", WINDOWS)),
    Control("packed_file", as_bytes("rows.jsonl.gz", gzip.compress(lines(alpaca_rows()).encode()))),
    Control("table", as_bytes("rows.csv", _csv())),
    Control("parquet", _parquet),
    Control("linked_rows", _link),
    Control("linked_model", _linked_model),
    Control("held_out_file", _held_out_file),
    Control("no_held_out", settings({"data.validation": 0, "sft.evaluate_every": None})),
    Control("two_sources", _two_sources),
    Control("unicode_names", _unicode_names),
    Control("unpacked", settings({"data.packing": False})),
    Control("epochs", settings({"sft.max_steps": None, "sft.warmup_steps": None, "sft.epochs": 1})),
    Control("resumed", stopped(lambda place, run_dir: None)),
    Control("dpo_check", pairs("dpo")),
    Control("reward_check", pairs("reward")),
    Control("7b_qlora_on_4090", large_model("7b", "rtx4090", QLORA), OF_A_QUANTISED_BASE),
    Control("7b_lora_on_h100", large_model("7b", "h100-80g", LORA)),
    Control("7b_full_on_h200", large_model("7b", "h200", {})),
    Control("7b_lora_fp16_on_v100", large_model("7b", "v100-32g:4", {**LORA, "model.precision": "fp16"})),
]
