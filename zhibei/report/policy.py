"""How a policy learned from its reward: reward, health board, time. Knows records of iterations, not their making."""

from __future__ import annotations

from typing import Any

from zhibei.report.curves import Chart, Series, draw
from zhibei.report.html import Markup, Section, both, duration, join, tag
from zhibei.report.inputs import RunInputs, finite
from zhibei.report.training import series_of, tile

# field of the record -> titles and units, English and Chinese
BOARD: dict[str, tuple[str, str, str, str]] = {
    "kl": ("KL to the reference (k1)", "与参考模型的 KL（k1）", "nats per token", "nats / 词元"),
    "kl_k3": ("KL to the reference (k3)", "与参考模型的 KL（k3）", "nats per token", "nats / 词元"),
    "entropy": ("Entropy", "熵", "nats per token", "nats / 词元"),
    "clip_share": ("Clipped tokens", "被裁剪的词元", "share", "占比"),
    "explained_variance": ("Variance the critic explains", "价值模型解释的方差", "share", "占比"),
    "length_mean": ("Length of answers", "回答长度", "tokens", "词元"),
    "length_correlation": ("Reward against length", "奖励与长度的相关", "correlation", "相关系数"),
    "ended_share": ("Answers that end by themselves", "自行结束的回答", "share", "占比"),
    "repeated_share": ("Repeated pieces of 4 tokens", "重复的 4 词元片段", "share", "占比"),
    "excluded_groups": ("Groups with equal rewards", "奖励全同的组", "groups", "组"),
    "grad_norm": ("Gradient norm before clipping", "梯度范数（裁剪前）", "L2 norm", "L2 范数"),
    "learning_rate": ("Learning rate", "学习率", "learning rate", "学习率"),
}
ITERATION = ("iteration", "迭代次数")


def health_board(inputs: RunInputs) -> Section:
    """Tiles with the ends of the reward, its curve, and one small chart per figure of the board."""
    marks = [
        (event["step"], f"{event['event']} at {event['step']:,}", f"第 {event['step']:,} 次迭代：{event['event']}")
        for event in inputs.events
        if event.get("event") in ("resumed", "rolled back") and isinstance(event.get("step"), int)
    ]
    steps, rewards = series_of(inputs.iterations, "reward_mean")
    series = [Series("answers that are learned from", "用于学习的回答", "smooth", steps, rewards)]
    steps, rewards = series_of(inputs.evaluations, "reward_mean")
    series.append(Series("held-out prompts", "留出的提示", "heldout", steps, rewards, has_points=len(steps) <= 200))
    kept = kept_evaluation(inputs)
    best = None if kept is None else (int(kept["step"]), _number(kept, "reward_mean"))
    reward = draw(Chart("Mean reward", "平均奖励", "reward", "奖励", series, marks, best, across=ITERATION))
    small = []
    for name, titles in BOARD.items():
        steps, values = series_of(inputs.iterations, name)
        if steps:
            curve = [Series(titles[0], titles[1], "smooth", steps, values)]
            small.append(draw(Chart(*titles, curve, marks, width=480, height=260, across=ITERATION)))
    body = tag("dl", join(_tiles(inputs)), class_="tiles")
    body += tag("div", reward, class_="full") + tag("div", join(small), class_="charts")
    return Section("Reward and health board", "奖励与健康面板", body)


def kept_evaluation(inputs: RunInputs) -> dict[str, Any] | None:
    """The evaluation of the model that the run wrote, where it is not the one after the last iteration."""
    written = [
        event["model_step"] for event in inputs.events if event.get("event") == "finished" and "model_step" in event
    ]
    if not written or not inputs.evaluations or inputs.evaluations[-1].get("step") == written[-1]:
        return None
    return next((record for record in inputs.evaluations if record.get("step") == written[-1]), None)


def _tiles(inputs: RunInputs) -> list[Markup]:
    first, last = inputs.iterations[0], inputs.iterations[-1]
    tiles = [tile("iterations", "迭代次数", f"{last['step']:,}")]
    for english, chinese, records in (
        ("mean reward", "平均奖励", [first, last]),
        ("held-out reward at the end", "结束时的留出集奖励", [*inputs.evaluations[:1], *inputs.evaluations[-1:]]),
    ):
        ends = [value for value in (finite(record.get("reward_mean")) for record in records) if value is not None]
        if len(ends) == 2:
            small = both(f"{ends[0]:.3f} at the beginning", f"开始时为 {ends[0]:.3f}")
            tiles.append(tile(english, chinese, f"{ends[1]:.3f}", small=small))
    kept = kept_evaluation(inputs)
    if kept is not None:
        small = both(f"step {kept['step']:,}, which was written", f"第 {kept['step']:,} 次迭代，即写出的模型")
        tiles.append(
            tile("held-out reward of the model", "模型的留出集奖励", f"{_number(kept, 'reward_mean'):.3f}", small=small)
        )
    answers = sum(int(_number(record, "answers")) for record in inputs.iterations)
    tokens = sum(int(_number(record, "tokens")) for record in inputs.iterations)
    tiles.append(tile("answers", "回答数", f"{answers:,}", small=both(f"{tokens:,} tokens", f"{tokens:,} 词元")))
    for name, english, chinese in (
        ("writing_seconds", "writing answers", "生成回答用时"),
        ("reward_seconds", "rewards", "计算奖励用时"),
        ("scoring_seconds", "reference and critic", "参考与价值模型用时"),
        ("learning_seconds", "learning", "学习用时"),
    ):
        tiles.append(tile(english, chinese, duration(sum(_number(record, name) for record in inputs.iterations))))
    return tiles


def _number(record: dict[str, Any], name: str) -> float:
    return finite(record.get(name)) or 0.0
