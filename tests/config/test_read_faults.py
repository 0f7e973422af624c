"""Bad run files: each fault names file, line, column, field, what came, and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.read import read_run

GOOD = "model:\n  path: m\ndata:\n  sources: [a.json]\n"


def fault_of(text: str | bytes, tmp_path: Path, overrides: tuple[str, ...] = ()) -> UserError:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_run(path, overrides)
    return caught.value


# (what is wrong, the text after GOOD's four lines, line:column, a word of `what`, a word of the remedy)
FAULTS = [
    ("mistyped key", "sft:\n  learning_rat: 1\n", "6:3", "sft.learning_rat", "sft.learning_rate"),
    ("mistyped section", "lorra:\n  rank: 8\n", "5:1", "lorra", "did you mean lora?"),
    (
        "key of another section",
        "learning_rate: 1e-4\n",
        "5:1",
        "learning_rate",
        "belongs in sft: write sft.learning_rate",
    ),
    ("key of another section, nested", "log:\n  epochs: 1\n", "6:3", "log.epochs", "write sft.epochs"),
    ("key no one knows", "sft:\n  zzqx: 1\n", "6:3", "sft.zzqx", "remove it"),
    ("wrong type", "sft:\n  global_batch: many\n", "6:17", "sft.global_batch is the text 'many'", "whole number"),
    ("number in quotes", 'sft:\n  learning_rate: "1e-4"\n', "6:18", "sft.learning_rate", "without quotes"),
    ("fraction of a whole", "sft:\n  global_batch: 1.5\n", "6:17", "the number 1.5", "whole number of at least 1"),
    (
        "whole number with a point",
        "sft:\n  global_batch: 128.0\n",
        "6:17",
        "sft.global_batch",
        "write sft.global_batch: 128",
    ),
    ("true as a number", "sft:\n  global_batch: true\n", "6:17", "sft.global_batch is true", "whole number"),
    ("bad choice", "sft:\n  schedule: cosin\n", "6:13", "sft.schedule", "did you mean sft.schedule: cosine?"),
    ("negative rate", "sft:\n  learning_rate: -1e-4\n", "6:18", "the number -0.0001", "above 0 and below 1"),
    ("zero batch", "sft:\n  global_batch: 0\n", "6:17", "sft.global_batch is the number 0", "at least 1"),
    ("not a number", "sft:\n  learning_rate: .nan\n", "6:18", "sft.learning_rate", "above 0"),
    ("yes for true", "sft:\n  keep_best: yes\n", "6:14", "the text 'yes'", "write sft.keep_best: true"),
    ("off for false", "sft:\n  keep_best: off\n", "6:14", "the text 'off'", "write sft.keep_best: false"),
    ("number as text", "name: 7\n", "5:7", "name is the number 7", 'name: "7"'),
    ("list where a section belongs", "sft:\n  - epochs: 1\n", "6:3", "sft is a list", "mapping"),
    ("text where a section belongs", "sft: fast\n", "5:6", "sft is the text 'fast'", "mapping"),
    (
        "one item where a list belongs",
        "lora: {modules_to_save: lm_head}\n",
        "5:25",
        "lora.modules_to_save",
        "[lm_head]",
    ),
    ("null", "runs:\n", "5:6", "runs is nothing", "remove runs"),
    ("duplicate key", "name: a\nname: b\n", "6:1", "name appears twice (first in line 5)", "remove one"),
    ("duplicate nested key", "sft:\n  epochs: 1\n  epochs: 2\n", "7:3", "sft.epochs appears twice", "remove one"),
    ("tab", "sft:\n\tepochs: 1\n", "6:1", "tab", "spaces"),
    ("open quote", 'name: "a\n', "5:7", "not valid YAML", "close the quotes"),
    ("open bracket", "lora: {targets: [q_proj\n", "5:17", "not valid YAML", "close the quotes or brackets"),
    ("colon in text", "name: a: b\n", "5:8", "not valid YAML", "quotes"),
    ("second document", "---\nname: b\n", "5:1", "second YAML document", "one document"),
    ("unknown alias", "name: *who\n", "5:7", "not valid YAML", "anchor"),
    ("alias of itself", "lora: &x {targets: *x}\n", "5:7", "an alias contains itself", "write the value out"),
    ("Python object", "name: !!python/object/apply:os.getcwd []\n", "5:7", "!!python/object", "remove the tag"),
    ("wrong tag", "seed: !!int x\n", "5:7", "'x' is not of type int", "remove the tag"),
    ("key that is a list", "? [a, b]\n: 1\n", "5:3", "a key must be plain text", "text as the key"),
    ("merge of a text", "sft: {<<: fast}\n", "5:11", "merge a mapping", "merge a mapping"),
    ("folder in the name", "name: a/b\n", "5:1", "name does not fit", "runs: path/to/folder"),
    ("unknown recipe", "recipe: alpaca-8b\n", "5:9", "alpaca-8b", "did you mean alpaca-7b?"),
]


@pytest.mark.parametrize(
    ("text", "place", "what", "fix"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS]
)
def test_fault_names_place_field_and_remedy(text: str, place: str, what: str, fix: str, tmp_path: Path) -> None:
    fault = fault_of(GOOD + text, tmp_path)
    assert fault.where == f"{tmp_path}/run.yaml:{place}"
    assert what in fault.what
    assert fix in fault.fix
    assert fault.exit_code == 2


def test_healthy_file_has_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    assert read_run(path).run.model.path == "m"


@pytest.mark.parametrize(
    ("text", "place", "what", "fix"),
    [
        ("", "1:1", "empty", "model: {path: ...}"),
        ("# only a comment\n", "1:1", "empty", "recipe: alpaca-7b"),
        ("- a\n- b\n", "1:1", "the run file is a list", "mapping"),
        ("just words\n", "1:1", "the run file is the text", "section:"),
        (b"name: a\nruns: \xff\xfe\n", "2:7", "0xff is not UTF-8", "iconv"),
        ("name: 中\n".encode("gb18030") + b"\xd6\xd0\xff\n", "1:7", "not UTF-8", "UTF-8"),
        (b"PK\x03\x04\n\0\0\0", "2:1", "binary", "not a model or data file"),
        ("name: a\x07b\n", "1", "is not allowed in YAML", "remove"),
    ],
    ids=["empty", "comments only", "list", "text", "not UTF-8", "GB18030", "binary", "control character"],
)
def test_files_that_are_no_run_file(text: str | bytes, place: str, what: str, fix: str, tmp_path: Path) -> None:
    fault = fault_of(text, tmp_path)
    assert fault.where == f"{tmp_path}/run.yaml:{place}"
    assert what in fault.what
    assert fix in fault.fix + fault.expected


def test_missing_parts_are_named_with_an_example(tmp_path: Path) -> None:
    fault = fault_of("seed: 1\n", tmp_path)
    assert isinstance(fault, SeveralErrors)
    assert {part.what for part in fault.errors} == {"model is missing", "data is missing"}
    assert all(part.where == f"{tmp_path}/run.yaml" for part in fault.errors)
    assert "data: {sources: [alpaca_data.json]}" in str(fault)


def test_empty_list_of_sources(tmp_path: Path) -> None:
    fault = fault_of("model: {path: m}\ndata:\n  sources: []\n", tmp_path)
    assert (fault.where, fault.what) == (f"{tmp_path}/run.yaml:3:12", "data.sources is empty")


@pytest.mark.parametrize(
    ("source", "column", "what", "fix"),
    [
        ("{path: a.json, wieght: 2}", 28, "data.sources[0].wieght", "data.sources[0].weight?"),
        ("{path: 3}", 20, "data.sources[0].path is the number 3", "quotes"),
        ("{weight: 2}", None, "data.sources[0].path is missing", "path"),
        ("3", 13, "data.sources[0] is the number 3", "mapping"),
        ("{path: a.json, split: test}", 28, "data.sources[0].split has no effect", "remove it"),
    ],
)
def test_faults_inside_a_source_name_its_number(
    source: str, column: int | None, what: str, fix: str, tmp_path: Path
) -> None:
    fault = fault_of(f"model: {{path: m}}\ndata:\n  sources: [{source}]\n", tmp_path)
    assert fault.where == f"{tmp_path}/run.yaml" + (f":3:{column}" if column else "")
    assert what in fault.what
    assert fix in fault.fix


def test_all_faults_of_a_file_come_together_in_reading_order(tmp_path: Path) -> None:
    text = "model:\n  path: 5\n  methd: lora\ndata:\n  sources: [a]\n  packing: no\nsft:\n  schedule: cosin\nlog: []\n"
    fault = fault_of(text, tmp_path, ("sft.learning_rat=3",))
    assert isinstance(fault, SeveralErrors)
    assert [part.where.removeprefix(f"{tmp_path}/run.yaml:") for part in fault.errors] == [
        "2:9",
        "3:3",
        "6:12",
        "8:13",
        "9:6",
        "command line: sft.learning_rat",
    ]
    assert all(str(part) in str(fault) for part in fault.errors)
    assert [part["where"] for part in fault.as_dict()["errors"]] == [part.where for part in fault.errors]


def test_folder_and_missing_files_name_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    assert "folder" in caught.value.what
    assert "train.yaml" in caught.value.fix
    with pytest.raises(UserError) as caught:
        read_run(tmp_path / "trian.yaml")
    assert caught.value.fix == f"did you mean {tmp_path}/train.yaml?"
    with pytest.raises(UserError) as caught:
        read_run(tmp_path / "nowhere" / "a.yaml")
    assert f"folder {tmp_path}/nowhere does not exist" in caught.value.fix
    with pytest.raises(UserError) as caught:
        read_run("alpaca-lora7b")
    assert "did you mean the recipe alpaca-lora-7b?" in caught.value.fix


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "run.yaml").write_text(GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        read_run(tmp_path / "run.yaml")


def test_nested_aliases_cannot_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    fault = fault_of("\n".join(lines), tmp_path)
    assert "more than 100,000 values" in fault.what
