"""A run file is changed where the value stands; comments, order and layout stay, and the text is read back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhibei.config.edit import CannotEdit, edited, path_of
from zhibei.config.yaml_tree import parse

FILE = """\
# my run
model:
  path: llama  # the base
  precision: "bf16"   # fast

data:
  sources:
    - path: a.json
      limit: 10   # for a try
    - b.json
  # trailing comment
sft: {epochs: 3, global_batch: 8}  # flow
lora:
"""


def value(text: str) -> object:
    return parse(text, source="test").value


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"model.precision": "fp16"}, ["  precision: fp16   # fast"]),
        ({"data.sources[0].limit": None}, ["      limit: null   # for a try"]),
        ({"data.sources[0].weight": 2.0}, ["      limit: 10   # for a try", "      weight: 2.0", "    - b.json"]),
        ({"data.max_tokens": 512}, ["    - b.json", "  max_tokens: 512", "  # trailing comment"]),
        ({"sft.epochs": 1}, ["sft: {epochs: 1, global_batch: 8}  # flow"]),
        ({"sft.save_every": 5}, ["sft: {epochs: 3, global_batch: 8, save_every: 5}  # flow"]),
        ({"lora.rank": 8}, ["lora:", "  rank: 8"]),
        ({"log.every": 5}, ["lora:", "", "log:", "  every: 5"]),
        ({"seed": 7}, ["lora:", "seed: 7"]),
    ],
)
def test_only_the_lines_of_the_change_differ(changes: dict[str, object], lines: list[str]) -> None:
    new = edited(FILE, changes)
    assert "\n".join(lines) in new
    kept = [line for line in FILE.splitlines() if "#" in line]
    assert all(line.split("#")[1] in new for line in kept)


def test_a_list_is_replaced_as_a_whole() -> None:
    assert "  sources:\n    [c.json]\n  # trailing comment\n" in edited(FILE, {"data.sources": ["c.json"]})


@pytest.mark.parametrize("text", ["a: 1", "a: 1\n", "a: 1  # x\n\n# end", "\n---\na: 1\n"])
def test_a_missing_key_is_added_whatever_the_file_ends_with(text: str) -> None:
    assert value(edited(text, {"sft.epochs": 2})) == {"a": 1, "sft": {"epochs": 2}}


def test_line_ends_of_windows_stay() -> None:
    assert edited("a: 1\r\nb: 2\r\n", {"a": 3, "c": 4}) == "a: 3\r\nb: 2\r\nc: 4\r\n"


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("x: &one {a: 1}\ny: *one\n", {"y.a": 2}),
        ("x: &one 1\ny: *one\n", {"y": 2}),
        ("data: {sources: [a.json]}\n", {"data.sources[0].limit": 5}),
        ("data: {sources: [a.json]}\n", {"data.sources[3]": "b"}),
        ("[1, 2]\n", {"a": 1}),
        ("sft: {epochs: }\n", {"sft.epochs.x": 1}),
    ],
)
def test_what_cannot_be_changed_in_place_is_refused(text: str, changes: dict[str, object]) -> None:
    with pytest.raises(CannotEdit):
        edited(text, changes)


def test_an_alias_keeps_its_anchor_untouched() -> None:
    text = "x: &one\n  a: 1\ny:\n  <<: *one\n  b: 2\n"
    assert value(edited(text, {"y.a": 5})) == {"x": {"a": 1}, "y": {"a": 5, "b": 2}}


def test_paths_are_read() -> None:
    assert path_of("data.sources[0].limit") == ("data", "sources", 0, "limit")


SCALARS = st.one_of(st.integers(-5, 5), st.booleans(), st.none(), st.text("ab: #'\"\n", max_size=6))


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.dictionaries(st.sampled_from("xyz"), SCALARS, min_size=1), min_size=1),
    st.sampled_from("abcde"),
    st.sampled_from("xyzw"),
    SCALARS,
)
def test_any_change_of_any_block_file_says_what_was_asked(
    sections: dict[str, dict[str, object]], section: str, key: str, new: object
) -> None:
    from zhibei.config.resolve import yaml_value

    lines = []
    for name, fields in sections.items():
        lines += [f"{name}:  # about {name}", *(f"  {k}: {yaml_value(v)}  # {k}" for k, v in fields.items()), ""]
    changed = edited("\n".join(lines), {f"{section}.{key}": new})
    assert value(changed) == {**sections, section: {**sections.get(section, {}), key: new}}
    assert changed.count("# about") == len(sections)
