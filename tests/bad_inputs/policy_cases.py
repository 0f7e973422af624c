"""Rewards, reward models and prompts that no policy can learn from. Knows only what is broken."""

from __future__ import annotations

import json
from typing import Any

from tests.bad_inputs.pair_cases import pairs
from tests.bad_inputs.place import Place, pair_rows
from tests.bad_inputs.scenario import Build, Scenario

FUNCTION = "def score(prompts, answers, references):\n    {0}\n"
VARIED = "return [float(sum(map(ord, answer)) % 7) for answer in answers]"


def rewarded(stage: str, body: str = VARIED, **settings: Any) -> Build:
    """A small run of a policy whose reward is a function with this body; `sections__field` sets fields."""

    def build(place: Place) -> None:
        place.rows = [{"prompt": row["prompt"]} for row in pair_rows()]
        del place.values["sft"]
        place.set("stage", stage)
        place.set("model.method", "lora")
        place.set("data.max_tokens", 200)
        place.set(
            stage,
            {
                "global_batch": 8,
                "minibatches": 1,
                "max_steps": 4,
                "max_new_tokens": 8,
                "learning_rate": 1e-5,
                "evaluate_every": 0,
                "save_every": 0,
                "sample_tokens": 0,
                "reward": "python:rewards.py:score",
            },
        )
        if stage == "grpo":
            place.set("grpo.answers_per_prompt", 4)
        for key, value in settings.items():
            place.set(key.replace("__", "."), value)
        place.folder.mkdir(parents=True, exist_ok=True)
        (place.folder / "rewards.py").write_text(FUNCTION.format(body), encoding="utf-8")
        source = str(place.values[stage].get("reward", ""))
        if source.startswith("python:rewards.py"):  # functions are found from where the command runs
            place.set(f"{stage}.reward", source.replace("rewards.py", str(place.folder / "rewards.py")))

    return build


def judged(stage: str, **manifest: Any) -> Build:
    """The reward is a reward model, made here, whose manifest says otherwise in the fields given."""

    def build(place: Place) -> None:
        from tests.bad_inputs.trial import try_command

        rewarded(stage)(place)
        (place.folder / "pairs.json").write_text(json.dumps(pair_rows()), encoding="utf-8")
        _ = place.model
        values = {
            **{name: place.values[name] for name in ("runs", "seed", "device", "log")},
            "name": "judge",
            "stage": "reward",
            "model": {"path": "model"},
            "data": {**place.values["data"], "sources": ["pairs.json"]},
            "reward": {"global_batch": 8, "max_steps": 2, "learning_rate": 1e-4, "save_every": 0},
        }
        (place.folder / "judge.json").write_text(json.dumps(values), encoding="utf-8")
        seen = try_command(["train", "judge.json"], place.folder)
        assert seen.exit_code == 0, seen.text
        file = place.folder / "runs" / "judge" / "manifest.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        for path, value in manifest.items():
            *parents, last = path.split("__")
            inner = content
            for name in parents:
                inner = inner[name]
            inner[last] = value
        file.write_text(json.dumps(content), encoding="utf-8")
        place.set(f"{stage}.reward", None)
        place.set(f"{stage}.reward_model", "runs/judge")

    return build


def after_sft(stage: str, change: Any) -> Build:
    """A policy that goes on from a supervised run made here, with `change(place)` after it."""

    def build(place: Place) -> None:
        from tests.bad_inputs.trial import try_command

        place.values["sft"] |= {"max_steps": 1, "warmup_steps": 0}
        place.set("name", "before")
        place.write()
        seen = try_command(["train", "run.yaml"], place.folder)
        assert seen.exit_code == 0, seen.text
        rewarded(stage)(place)
        for name in ("rows.json", "run.yaml"):
            (place.folder / name).unlink()
        place.set("name", "tried")
        place.set("model.path", "runs/before")
        change(place)

    return build


def _another_tokenizer(place: Place) -> None:
    """The same words under exchanged ids, in the folder that the supervised run wrote."""
    file = place.folder / "runs" / "before" / "model" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content), encoding="utf-8")


def _long(number_of_long: int) -> Any:
    def change(place: Place) -> None:
        assert place.rows is not None
        for row in place.rows[:number_of_long]:
            row["prompt"] = row["prompt"] * 60

    return change


def _with(stage: str, change: Any, **settings: Any) -> Build:
    def build(place: Place) -> None:
        rewarded(stage, **settings)(place)
        change(place)

    return build


def records(place: Place) -> list[dict[str, Any]]:
    """The metrics of the run that was tried."""
    lines = (place.folder / "runs" / "tried" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


RESUMABLE = r"runs(/tried.*)?"
REWARD = r"(grpo|ppo)\.reward"

POLICY_VARIANTS = [
    Scenario(
        "v_q_reward_nan",
        "A reward that is not a number.",
        rewarded("grpo", "return [float('nan')] * len(answers)"),
        value=r"\bnan\b.*answer 0",
        where=REWARD,
        remedy="to do:.*resumed",
        leaves=RESUMABLE,
    ),
    Scenario(
        "v_q_reward_infinite",
        "A reward without bound.",
        rewarded("ppo", "return [1.0, float('inf')] + [0.0] * (len(answers) - 2)"),
        value=r"\binf\b.*answer 1",
        where=REWARD,
        remedy="to do:.*resumed",
        leaves=RESUMABLE,
    ),
    Scenario(
        "v_q_reward_raises",
        "A reward function that raises.",
        rewarded("grpo", "raise KeyError('no judge')"),
        value=r"KeyError.*no judge.*rewards\.py, line 2",
        where=REWARD,
        remedy="to do:.*resumed",
        leaves=RESUMABLE,
    ),
    Scenario(
        "v_q_reward_hangs",
        "A reward function that does not come back.",
        rewarded("grpo", "import time; time.sleep(30)", grpo__reward_seconds=1),
        value=r"within 1 s",
        where=REWARD,
        remedy="to do:.*resumed",
        leaves=RESUMABLE,
    ),
    Scenario(
        "v_q_reward_too_few",
        "Fewer rewards than answers.",
        rewarded("grpo", "return [1.0]"),
        value=r"1 rewards for \d+ answers",
        where=REWARD,
        remedy="to do:.*resumed",
        leaves=RESUMABLE,
    ),
    Scenario(
        "v_q_reward_not_there",
        "A reward function that the file does not have.",
        rewarded("grpo", grpo__reward="python:rewards.py:scores"),
        value="scores",
        where=REWARD,
        remedy="to do:.*name",
    ),
    Scenario(
        "v_q_reward_constant",
        "Every answer gets the same reward: there is nothing to compare.",
        rewarded("grpo", "return [1.0] * len(answers)"),
        value="one and the same reward",
        where=REWARD,
        remedy=r"to do:.*reward_std",
        may=("stopped late",),
    ),
    Scenario(
        "v_q_reward_constant_ppo",
        "PPO with the same reward for every answer: only the KL is left to learn from.",
        rewarded("ppo", "return [1.0] * len(answers)"),
        value="no signal.*same reward, 1",
        where="step 3",
        remedy="tells answers apart",
        may=("handled",),
        proof=lambda place: any(record.get("watchdog") == "no_signal" for record in records(place)),
    ),
    Scenario(
        "v_q_groups_without_variance",
        "Some groups whose answers all have one reward.",
        rewarded("grpo", "return [float(i) if i < 4 else 1.0 for i in range(len(answers))]"),
        value="groups of equal rewards left out 4",
        where="step 4/4",
        remedy="",
        may=("handled",),
        proof=lambda place: [r["excluded_groups"] for r in records(place) if r["kind"] == "iteration"] == [1] * 4,
    ),
    Scenario(
        "v_q_prompts_beyond_window",
        "Prompts longer than data.max_tokens, all of them.",
        _with("grpo", _long(60)),
        value=r"too long 60|60 too long",
        where=r"rows\.json",
        remedy="to do:.*max_tokens.*never cut",
    ),
    Scenario(
        "v_q_some_prompts_beyond_window",
        "Three prompts longer than data.max_tokens.",
        _with("ppo", _long(3)),
        value=r"3 of 60 prompts.*too long 3",
        where=r"rows\.json",
        remedy="",
        may=("handled",),
        proof=lambda place: _in_ledger(place, "too_long") == 3,
    ),
    Scenario(
        "v_q_answers_beyond_positions",
        "The longest prompt with the longest answer is longer than the model's positions.",
        rewarded("ppo", ppo__max_new_tokens=250),
        value=r"\b250\b",
        where=r"run\.yaml:\d+",
        remedy="to do:.*max_new_tokens: at most 128",
    ),
    Scenario(
        "v_q_judge_of_another_template",
        "A reward model that learned from another template.",
        judged("ppo", template__sha256="0" * 64),
        value="alpaca",
        where=r"ppo\.reward_model",
        remedy="to do:.*template",
    ),
    Scenario(
        "v_q_judge_of_another_tokenizer",
        "A reward model with other words.",
        judged("grpo", tokenizer__sha256="0" * 64),
        value="another tokenizer",
        where=r"grpo\.reward_model",
        remedy="to do:.*reward model",
    ),
    Scenario(
        "v_q_judge_that_guesses",
        "A reward model that orders its own held-out pairs no better than a coin.",
        judged("ppo", finished__heldout__accuracy=0.51),
        value="51 %",
        where=r"ppo\.reward_model",
        remedy=r"to do:.*min_reward_accuracy",
    ),
    Scenario(
        "v_q_template_of_sft",
        "Another template than the supervised run before.",
        after_sft("grpo", lambda place: place.set("data.template", "coati")),
        value="coati.*alpaca|alpaca.*coati",
        where=r"data\.template|run\.yaml:\d+",
        remedy="to do:.*alpaca",
    ),
    Scenario(
        "v_q_tokenizer_of_sft",
        "Two words of the tokenizer exchanged after the supervised run.",
        after_sft("grpo", _another_tokenizer),
        value="tokenizer",
        where=r"runs/before",
        remedy="to do:.*",
    ),
    Scenario(
        "v_q_columns_exchanged",
        "Pairs whose chosen and rejected columns are exchanged, which their margins say.",
        pairs("reward", lambda rows: [row.update(margin=-1.0) for row in rows], reward__margin=True),
        value=("60.*negative", "exchange"),
        where=r"rows\.json, record 0",
        remedy="to do:.*exchange",
    ),
]


def _in_ledger(place: Place, reason: str) -> int:
    lines = (place.folder / "runs" / "tried" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["reason"] == reason for line in lines)
