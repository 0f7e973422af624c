"""What a healthy run file means: numbers, layers, origins, planned values, and the file that is written back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhibei.config.effects import STAGES
from zhibei.config.errors import UserError
from zhibei.config.faults import nearest_name
from zhibei.config.foreign import FOREIGN_NAMES
from zhibei.config.read import read_run
from zhibei.config.resolve import (
    LEARNING_RATES,
    plan_intervals,
    render_resolved,
    value_of,
    with_planned,
    write_resolved,
    yaml_value,
)
from zhibei.config.run import RunFile
from zhibei.config.words import describe, leaf_fields
from zhibei.config.yaml_tree import Place, parse

GOOD = "model:\n  path: m\ndata:\n  sources: [a.json]\n"


def write(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-5", 2e-5),
        ("1E+3", 1000.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("2024-05-01", "2024-05-01"),
        ("12:30:00", "12:30:00"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("-.inf", float("-inf")),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("[a.json,b.json]", ["a.json", "b.json"]),
        ("{a: 1, b: [no]}", {"a": 1, "b": ["no"]}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("中文", "中文"),
    ],
)
def test_yaml_values(text: str, value: object) -> None:
    read = parse(text, source="x").value
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merge_keys_with_own_keys_winning() -> None:
    tree = parse("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: *x\n", source="x")
    assert tree.value == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": {"p": 1, "q": 2}}
    assert tree.keys["b", "q"] == Place(2, 13)


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_every_value_written_reads_back_to_itself(value: object) -> None:
    text = f"- {yaml_value(value)}  # origin"
    assert parse(text, source="x").value == [value]
    assert "\n" not in text


@pytest.mark.parametrize("key", [key for key, _ in leaf_fields()])
def test_every_field_has_documentation(key: str) -> None:
    assert dict(leaf_fields())[key].description


def test_layers_the_later_wins_and_each_value_knows_its_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe: alpaca-lora-7b\nmodel: {path: here}\nsft:\n  epochs: 2\n  global_batch: 64\n")
    resolved = read_run(path, ["sft.global_batch=32", "data.sources=[a.json,b.json]", "sft.epsilon=1e-6"])
    run, origins = resolved.run, resolved.origins
    assert (run.model.path, origins["model.path"]) == ("here", "mine.yaml:2")
    assert (run.sft.epochs, origins["sft.epochs"]) == (2, "mine.yaml:4")
    assert (run.sft.global_batch, origins["sft.global_batch"]) == (32, "command line")
    assert (run.data.sources, origins["data.sources"]) == (["a.json", "b.json"], "command line")
    assert (run.lora.rank, origins["lora.rank"]) == (8, "recipe alpaca-lora-7b")
    assert (run.sft.beta1, origins["sft.beta1"]) == (0.9, "default")
    assert (run.name, origins["name"]) == ("mine", "planned")
    assert resolved.text == path.read_text()
    assert set(origins) == {key for key, _ in leaf_fields()}


def test_recipe_from_the_command_line() -> None:
    run = read_run("alpaca-7b", ["model.path=m", "data.sources=[a]", "name=first"]).run
    assert (run.name, run.model.path, run.data.max_tokens) == ("first", "m", 512)


@pytest.mark.parametrize(("method", "rate"), [("full", 2e-5), ("lora", 2e-4), ("qlora", 2e-4)])
def test_learning_rate_is_planned_from_the_method(method: str, rate: float, tmp_path: Path) -> None:
    resolved = read_run(write(tmp_path, GOOD), [f"model.method={method}"])
    assert (resolved.run.sft.learning_rate, resolved.origins["sft.learning_rate"]) == (rate, "planned")
    assert resolved.run.model.quantize == ("nf4" if method == "qlora" else "none")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("method", "place"), [("full", 0), ("lora", 1), ("qlora", 1)])
def test_planned_values_go_to_the_section_of_the_stage(stage: str, method: str, place: int, tmp_path: Path) -> None:
    given = [f"stage={stage}", f"model.method={method}", f"{stage}.max_steps=50"]
    resolved = read_run(write(tmp_path, GOOD), given)
    assert resolved.run.training.learning_rate == LEARNING_RATES[stage][place]
    assert resolved.run.training.evaluate_every == 5
    planned = {key for key, origin in resolved.origins.items() if origin == "planned"}
    own = {key for key in planned if key.partition(".")[0] in STAGES}
    shared = {"ppo.models"} if (stage, method) == ("ppo", "full") else set()
    shared |= {"ppo.critic_learning_rate"} if stage == "ppo" else set()
    shared |= {"dpo.beta"} if stage == "dpo" else set()
    assert own == {f"{stage}.learning_rate", f"{stage}.evaluate_every", f"{stage}.save_every"} | shared
    assert resolved.run.ppo.models == ("separate" if "ppo.models" in shared else "shared")


def test_the_effective_file_leaves_out_the_sections_of_other_stages(tmp_path: Path) -> None:
    text = render_resolved(read_run(write(tmp_path, GOOD), ["stage=dpo", "dpo.epochs=1"]))
    assert "\ndpo:\n" in text
    assert "  epochs: 1.0  # command line\n" in text
    assert text.count("epochs") == 1
    for other in ("sft", "reward", "ppo"):
        assert f"\n# {other}: not read by stage: dpo\n" in text


@pytest.mark.parametrize(
    ("value", "words"), [("rm", "write stage: reward"), ("PT", "stage: sft"), ("dop", "did you mean stage: dpo?")]
)
def test_stages_of_other_tools_lead_to_ours(value: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_run(write(tmp_path, f"stage: {value}\n{GOOD}"))
    assert words in caught.value.fix
    assert caught.value.where.endswith("mine.yaml:1:8")


def test_names_lead_to_the_section_of_the_runs_stage() -> None:
    assert nearest_name("lr", stage="dpo") == "here it is called dpo.learning_rate"
    assert nearest_name("neftune_noise_alpha", stage="dpo") == "sft.neftune_alpha"
    assert nearest_name("epochs", stage="reward") == "epochs belongs in reward: write reward.epochs"
    assert nearest_name("lr") == "here it is called sft.learning_rate"


def test_a_given_learning_rate_is_kept(tmp_path: Path) -> None:
    assert read_run(write(tmp_path, GOOD), ["sft.learning_rate=3e-4"]).run.sft.learning_rate == 3e-4


def test_intervals_are_planned_once_and_never_over_given_ones(tmp_path: Path) -> None:
    open_run = read_run(write(tmp_path, GOOD)).run
    assert plan_intervals(open_run, num_steps=100) == {"sft.evaluate_every": 10, "sft.save_every": 10}
    assert plan_intervals(open_run, num_steps=3) == {"sft.evaluate_every": 1, "sft.save_every": 1}
    given_run = read_run(write(tmp_path, GOOD), ["sft.evaluate_every=7", "sft.save_every=0"]).run
    assert plan_intervals(given_run, num_steps=100) == {}
    no_heldout = read_run(write(tmp_path, GOOD), ["data.validation=0"]).run
    assert plan_intervals(no_heldout, num_steps=100) == {"sft.save_every": 10}


def test_max_steps_lets_the_run_file_plan_the_intervals(tmp_path: Path) -> None:
    resolved = read_run(write(tmp_path, GOOD), ["sft.max_steps=50"])
    assert (resolved.run.sft.evaluate_every, resolved.origins["sft.evaluate_every"]) == (5, "planned")


def test_later_plans_change_run_and_origin_only_there(tmp_path: Path) -> None:
    before = read_run(write(tmp_path, GOOD))
    after = with_planned(before, {"sft.save_every": 40})
    changed = {key for key, _ in leaf_fields() if value_of(before.run, key) != value_of(after.run, key)}
    assert changed == {"sft.save_every"}
    assert after.origins["sft.save_every"] == "planned"
    assert before.run.sft.save_every is None


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sft.max_steps=30"],
        ["sft.warmup_steps=5", "sft.schedule=wsd"],
        ["model.method=qlora", "lora.targets=[q_proj]"],
        ["model.method=lora", "lora.adapter=some/folder"],
        ["data.sources=[{path: 'a b.json', weight: 2, columns: {output: 'the: answer'}}, c.json]"],
        ["data.packing=false", "data.group_by_length=true", "model.attention=sdpa"],
        ["data.validation=0", "data.system='yes: \"no\" # \\ 中文'"],
        ["sft.sample_prompts=['- x', 'two\\nlines']", "name='12'"],
        ["stage=reward", "reward.max_steps=9"],
        ["stage=dpo", "model.method=lora", "dpo.reference=adapters_off"],
        ["stage=ppo", "ppo.reward_model=runs/reward"],
    ],
)
def test_the_resolved_file_reads_back_to_the_same_run(overrides: list[str], tmp_path: Path) -> None:
    first = read_run(write(tmp_path, GOOD), overrides)
    path = tmp_path / "run-dir" / "resolved.yaml"
    path.parent.mkdir()
    write_resolved(first, path)
    for place in (path, path.parent):
        assert read_run(place).run.model_dump() == first.run.model_dump()
    active = [line for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    assert all("  # " in line or line.endswith(":") for line in active)


def test_resolved_file_shows_origins_and_idle_fields(tmp_path: Path) -> None:
    text = render_resolved(read_run(write(tmp_path, GOOD), ["sft.max_steps=30"]))
    assert "  max_steps: 30  # command line\n" in text
    assert "  path: m  # mine.yaml:2\n" in text
    assert "  # epochs: no effect; sft.max_steps decides how long the run is\n" in text
    assert "\n# lora: nothing here has an effect\n" in text


@pytest.mark.parametrize(
    "name", ["cutoff_len", "per_device_train_batch_size", "num_train_epochs", "lr", "lora_r", "bf16", "optim"]
)
def test_names_of_other_tools_point_to_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_run(write(tmp_path, f"{GOOD}{name}: 1\n"))
    assert caught.value.where.endswith("mine.yaml:5:1")
    assert any(key in caught.value.fix for key, _ in leaf_fields())


def test_every_foreign_name_leads_to_fields_that_exist() -> None:
    known = {key for key, _ in leaf_fields()}
    sections = {key.split(".")[0] for key in known if "." in key}
    for name, advice in FOREIGN_NAMES.items():
        assert name not in known
        named = [word.strip("(),:;") for word in advice.replace(":", " ").split() if word.split(".")[0] in sections]
        assert all(word in known for word in named if "." in word), (name, advice)
        assert nearest_name(name)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("sft.epochs", "is not a setting"),
        ("sft..epochs=1", "is not a setting"),
        ("--epochs=1", "is not a setting"),
        ("sft.epochs=[1", "not valid YAML"),
        ("sft.epochs=many", "sft.epochs is the text 'many'"),
        ("stf.epochs=1", "unknown key 'stf'"),
        ("model=big", "model is the text 'big'"),
        ("sft.lr=1e-4", "unknown key 'sft.lr'"),
    ],
)
def test_bad_settings_name_the_command_line(override: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_run(write(tmp_path, GOOD), [override])
    assert caught.value.where.startswith("command line")
    assert what in caught.value.what


def test_of_equal_settings_the_last_wins(tmp_path: Path) -> None:
    assert read_run(write(tmp_path, GOOD), ["seed=1", "seed=2"]).run.seed == 2
    with pytest.raises(UserError, match="given a value and a field"):
        read_run(write(tmp_path, GOOD), ["sft=1", "sft.epochs=2"])


def test_a_null_setting_returns_to_open(tmp_path: Path) -> None:
    resolved = read_run(write(tmp_path, GOOD + "sft: {learning_rate: 1e-3}\n"), ["sft.learning_rate=null"])
    assert resolved.run.sft.learning_rate == 2e-5


def test_an_empty_section_is_no_fault(tmp_path: Path) -> None:
    assert read_run(write(tmp_path, GOOD + "sft:\n  # epochs: 1\nlora:\n")).run.sft.epochs == 3


def test_schema_describes_each_field() -> None:
    schema = RunFile.model_json_schema()
    assert schema["$defs"]["SftSection"]["properties"]["global_batch"]["description"].startswith(
        "Rows per optimiser step"
    )
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("sft.global_batch", "a whole number of at least 1"),
        ("sft.learning_rate", "a number above 0 and below 1"),
        ("sft.warmup_ratio", "a number from 0 to 1"),
        ("sft.label_smoothing", "a number of at least 0 and below 1"),
        ("model.compile", "true or false or auto"),
        ("model.method", "one of full, lora, qlora"),
        ("data.validation", "a number from 0 to 1, a whole number of at least 2 or text"),
        ("lora.targets", "all-linear or a list, each item text"),
        ("seed", "a whole number of at least 0"),
    ],
)
def test_expectations_in_words(key: str, words: str) -> None:
    field = dict(leaf_fields())[key]
    assert describe(field.annotation, field.metadata) == words


def test_a_run_stands_for_the_adapter_that_it_wrote(tmp_path: Path) -> None:
    inner = tmp_path / "runs" / "sft" / "model"
    inner.mkdir(parents=True)
    file = write(tmp_path, GOOD + f"lora: {{adapter: {tmp_path / 'runs' / 'sft'}}}\n")
    overrides = ["model.method=lora"]
    assert read_run(file, overrides).run.lora.adapter == str(tmp_path / "runs" / "sft")  # said to hold none, later
    (inner / "adapter_config.json").write_text("{}")
    resolved = read_run(file, overrides)
    assert (resolved.run.lora.adapter, resolved.origins["lora.adapter"]) == (str(inner), "planned")
