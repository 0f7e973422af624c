"""The real files: the right reader, the number of records their manifest names, their broken lines by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, Source
from zhibei.data.convert import convert, same
from zhibei.data.readers import open_file, read_file, read_sources
from zhibei.data.records import BrokenRecord, Conversation, Preference

Shared = Callable[..., Path]
COT = "PhoebusSi+Alpaca-CoT/data/formatted_cot_data"
CHAT = "hpcaitech+ColossalAI/applications/ColossalChat"
FACTORY = "hiyouga+LLaMA-Factory/data"
JUDGE = "lm-sys+FastChat/fastchat/llm_judge/data"

FILES = [
    ("derived/alpaca_union.json", "alpaca", 18857),
    (f"{COT}/aqua_train.json", "alpaca", 2728),
    (f"{COT}/creak_train.json", "alpaca", 6915),
    (f"{COT}/ecqa_train.json", "alpaca", 7112),
    (f"{COT}/qasc_train.json", "alpaca", 1084),
    (f"{COT}/strategyqa_train.json", "alpaca", 2061),
    (
        "gururise+AlpacaDataCleaned/dataset_extensions/GPTeacher/Roleplay/roleplay-similarity_0.6-instruct-dataset.json",
        "alpaca",
        3146,
    ),
    (f"{FACTORY}/alpaca_en_demo.json", "alpaca", 999),
    (f"{FACTORY}/alpaca_zh_demo.json", "alpaca", 1000),
    (f"{FACTORY}/identity.json", "alpaca", 91),
    ("hpcaitech+ColossalAI/applications/ColossalEval/configs/gpt_evaluation/data/eval_en_examples.json", "alpaca", 25),
    ("tatsu-lab+stanford_alpaca/seed_tasks.jsonl", "self_instruct", 175),
    ("XueFuzhao+InstructionWild/data/seed_prompts_en.jsonl", "instruction_wild", 429),
    ("XueFuzhao+InstructionWild/data/seed_prompts_ch.jsonl", "instruction_wild", 429),
    ("XueFuzhao+InstructionWild/data_v2/user_1.jsonl", "instruction_wild", 429),
    ("XueFuzhao+InstructionWild/data_v2/user_2.jsonl", "instruction_wild", 248),
    ("XueFuzhao+InstructionWild/data_v2/user_3.jsonl", "instruction_wild", 201),
    ("lm-sys+FastChat/data/dummy_conversation.json", "sharegpt", 500),
    (f"{FACTORY}/glaive_toolcall_en_demo.json", "sharegpt", 300),
    (f"{FACTORY}/glaive_toolcall_zh_demo.json", "sharegpt", 300),
    (f"{CHAT}/examples/training_scripts/lora_sft_data.jsonl", "sharegpt", 10),
    (f"{CHAT}/tests/test_data/sft/test_sft_data.jsonl", "openai", 1),
    (f"{FACTORY}/v1_sft_demo.jsonl", "openai", 500),
    (f"{FACTORY}/reason_tool_use_demo_50.jsonl", "openai", 50),
    (f"{CHAT}/tests/test_data/dpo/test_dpo_data.jsonl", "preference", 1),
    (f"{FACTORY}/dpo_en_demo.json", "preference", 300),
    (f"{FACTORY}/dpo_zh_demo.json", "preference", 300),
    (f"{FACTORY}/v1_dpo_demo.jsonl", "preference", 10),
    ("anthropics+hh-rlhf/harmless-base/test.jsonl.gz", "hh_rlhf", 2312),
    (f"{CHAT}/tests/test_data/kto/test_kto_data.jsonl", "kto", 1),
    (f"{FACTORY}/kto_en_demo.json", "kto", 300),
    (f"{FACTORY}/c4_demo.jsonl", "text", 300),
    (f"{FACTORY}/wiki_demo.txt", "text", 1),
    ("karpathy+char-rnn/data/tinyshakespeare/input.txt", "text", 1),
    ("tatsu-lab+stanford_alpaca/prompt.txt", "text", 1),
    ("karpathy+llama2.c/doc/stories260K.md", "text", 1),
    (f"{JUDGE}/mt_bench/question.jsonl", "prompts", 80),
    (f"{JUDGE}/vicuna_bench/question.jsonl", "prompts", 80),
    ("openai+grade-school-math/grade_school_math/data/train.jsonl", "prompt_completion", 7473),
    ("openai+grade-school-math/grade_school_math/data/test.jsonl", "prompt_completion", 1319),
    ("hpcaitech+ColossalAI/applications/ColossalQA/data/data_sample/custom_service.json", "prompt_completion", 74),
    (
        "hpcaitech+ColossalAI/applications/ColossalQA/data/data_sample/custom_service_preprocessed.json",
        "prompt_completion",
        74,
    ),
    (
        "hpcaitech+ColossalAI/applications/ColossalQA/data/data_sample/custom_service_classification.json",
        "prompt_completion",
        15,
    ),
]

BROKEN = {
    "derived/alpaca_union.json": 9,
    "XueFuzhao+InstructionWild/data_v2/user_2.jsonl": 2,
    "XueFuzhao+InstructionWild/data_v2/user_3.jsonl": 3,
    "anthropics+hh-rlhf/harmless-base/test.jsonl.gz": 13,
    "hpcaitech+ColossalAI/applications/ColossalEval/configs/gpt_evaluation/data/eval_en_examples.json": 25,
}
"""Empty answers, invalid lines, dialogues in which the assistant speaks twice, and a file without any answers."""

NO_DATA = [
    "tloen+alpaca-lora/templates/alpaca.json",
    f"{CHAT}/conversation_template/llama2.json",
    f"{FACTORY}/dataset_info.json",
    f"{JUDGE}/judge_prompts.jsonl",
    f"{JUDGE}/mt_bench/reference_answer/gpt-4.jsonl",
    "openai+grade-school-math/grade_school_math/data/example_model_solutions.jsonl",
]


@pytest.mark.parametrize(("name", "format", "count"), FILES, ids=[name.rsplit("/", 1)[-1] for name, _, _ in FILES])
def test_the_right_reader_finds_every_record(shared: Shared, name: str, format: str, count: int) -> None:
    file = open_file(shared("data", *name.split("/")))
    records = list(file.records)
    assert file.format == format
    assert len(records) == count
    assert sum(isinstance(record, BrokenRecord) for record in records) == BROKEN.get(name, 0)


@pytest.mark.parametrize("name", NO_DATA, ids=[name.rsplit("/", 1)[-1] for name in NO_DATA])
def test_files_that_are_no_training_data_are_refused_with_their_fields(shared: Shared, name: str) -> None:
    with pytest.raises(UserError, match="no format has the fields"):
        open_file(shared("data", *name.split("/")))


@pytest.mark.parametrize(("name", "lines"), [("user_2", [134, 168]), ("user_3", [10, 121, 122])])
def test_the_invalid_lines_are_named(shared: Shared, name: str, lines: list[int]) -> None:
    path = shared("data", "XueFuzhao+InstructionWild", "data_v2", f"{name}.jsonl")
    broken = [record for record in read_file(path) if isinstance(record, BrokenRecord)]
    assert [record.origin.line for record in broken] == lines
    assert all("invalid JSON" in record.what for record in broken)
    with pytest.raises(UserError) as caught:
        list(read_sources(DataSection(sources=[str(path)])))
    assert f"{name}.jsonl, record {lines[0] - 1} (line {lines[0]})" in caught.value.where
    assert f"and {len(lines) - 1} more broken record" in caught.value.what


def test_the_broken_rows_of_a_list_are_at_the_lines_an_editor_shows(shared: Shared) -> None:
    path = shared("data", "derived", "alpaca_union.json")
    lines = path.read_text(encoding="utf-8").split("\n")
    broken = [record for record in read_file(path) if isinstance(record, BrokenRecord)]
    for record in broken:
        assert record.origin.line is not None
        assert any('"output": ""' in line for line in lines[record.origin.line - 1 : record.origin.line + 4])


def test_a_folder_of_several_sets_is_one_source(shared: Shared) -> None:
    path = shared("data", "PhoebusSi+Alpaca-CoT", "data", "formatted_cot_data")
    section = DataSection(sources=[Source(path=str(path))])
    assert sum(1 for _ in read_sources(section)) == 2728 + 6915 + 7112 + 1084 + 2061


@pytest.mark.parametrize(
    "name", [f"{FACTORY}/reason_tool_use_demo_50.jsonl", f"{FACTORY}/glaive_toolcall_en_demo.json"]
)
def test_tool_conversations_survive_a_conversion(shared: Shared, tmp_path: Path, name: str) -> None:
    source = shared("data", *name.split("/"))
    other = tmp_path / "other.jsonl"
    back = tmp_path / "back.json"
    convert(open_file(source), other, to="sharegpt" if "reason" in name else "openai")
    convert(open_file(other), back, to="openai" if "reason" in name else "sharegpt")
    before = [same(record) for record in read_file(source) if isinstance(record, Conversation)]
    assert [same(record) for record in read_file(back) if isinstance(record, Conversation)] == before


def test_dialogues_survive_as_pairs(shared: Shared, tmp_path: Path) -> None:
    source = shared("data", "anthropics+hh-rlhf", "harmless-base", "test.jsonl.gz")
    done = convert(open_file(source), tmp_path / "pairs.jsonl", to="preference", drop=True)
    convert(open_file(tmp_path / "pairs.jsonl"), tmp_path / "back.jsonl.gz", to="hh_rlhf")
    before = [same(record) for record in read_file(source) if isinstance(record, Preference)]
    assert [same(r) for r in read_file(tmp_path / "back.jsonl.gz") if isinstance(r, Preference)] == before
    assert done.num_rows == len(before) == 2312 - 13
