"""What the numbers of a log amount to, whoever wrote them; and sound numbers amount to nothing."""

from __future__ import annotations

import math

import pytest

from zhibei.doctor.log_figures import FigureWatch, record_of


def signatures(lines: list[str], *, resumed_before: int | None = None) -> list[str]:
    """The likeliest pitfall of each signature."""
    watch = FigureWatch()
    for number, line in enumerate(lines, 1):
        if number == resumed_before:
            watch.resumed(number)
        if record := record_of(number, line):
            watch.see(record)
    return [one.pitfalls[0] for one in watch.signatures()]


def losses(*values: float | str) -> list[str]:
    return [f"{{'loss': {value}, 'learning_rate': 2e-05}}" for value in values]


@pytest.mark.parametrize(
    ("line", "figures"),
    [
        ("{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 0.0}", {"loss": 0.0, "gradient": math.nan, "rate": 0.0}),
        ("{'loss': '1.25', 'grad_norm': '0.5'}", {"loss": 1.25, "gradient": 0.5}),
        ('{"kind": "train", "loss": 2.5e-1, "grad_norm": 1.0}', {"loss": 0.25, "gradient": 1.0}),
        ('{"loss": null, "not_finite": {"loss": "nan"}}', {"loss": math.nan}),
        ("step 1,010 | loss 10.4 | grad norm 1.2", {"step": 1010.0, "loss": 10.4, "gradient": 1.2}),
        ("step 5: held-out loss 1.25, perplexity 3.5", {"step": 5.0, "heldout": 1.25}),
        (" 12%|#  | 12/100 [00:10<05:00, 1.2it/s, loss=0.693, lr=1e-5]", {"loss": 0.693, "rate": 1e-5}),
        ("train/loss: 1.5 train/grad_norm: inf", {"loss": 1.5, "gradient": math.inf}),
        ("{'eval_loss': nan, 'epoch': 1.0}", {"heldout": math.nan, "epoch": 1.0}),
        ("objective/kl: -3.5", {"kl": -3.5}),
        ("actor/ppo_kl:0.0001 - closs 7", {}),
        ("weightloss: 3 lossless: 4", {}),
    ],
)
def test_figures_are_read_from_any_trainer(line: str, figures: dict[str, float]) -> None:
    record = record_of(1, line)
    found = dict(record.figures) if record else {}
    assert {key: repr(value) for key, value in found.items()} == {key: repr(value) for key, value in figures.items()}


@pytest.mark.parametrize(
    ("lines", "pitfall"),
    [
        (["{'loss': 1.2, 'grad_norm': 0.5}"] + ["{'loss': 0.0, 'grad_norm': nan}"] * 3, "nan-loss-logged-as-zero"),
        (losses(1.2, "nan", "nan"), "pure-fp16-no-master-weights-nan"),
        (["{'loss': 0.0, 'grad_norm': 0.0}"] * 4, "response-template-no-match-all-masked"),
        (losses(10.41, 10.38, 10.3, 9.9), "fsdp-init-random-instead-of-pretrained"),
        (losses(11.93, 11.9, 11.88), "fsdp-init-random-instead-of-pretrained"),
        (losses(2.27, 11.05, 10.9), "fp16-bf16-llama-neox-wrong-weights-map"),
        (losses(4.3, 2.0, 1.4, 15.0, 14.2), "lora-rank-with-fixed-lr-diverges"),
        (losses(*[0.6931] * 6), "dpo-ref-deepcopy-shares-peft"),
        (losses(*[0.69315] * 6), "dpo-ref-deepcopy-shares-peft"),
        (["{'loss': 0.6, 'rewards/margins': 0.0}"] * 5, "dpo-ref-deepcopy-shares-peft"),
        (["objective/kl: -14.5", "objective/kl: -60.1"], "ppo-negative-kl-generation-kwargs"),
        (["{'loss': 1.2}", "{'eval_loss': nan}"], "eval-nan-response-template-truncated"),
        (["loss_scale: 0.5 loss: 2.1"] * 3, "ds-loss-scale-collapse"),
        (["{'loss': 2.1, 'grad_norm': 0.0}"] * 5, "gc-lora-silent-partial-training"),
        (["{'loss': 2.1, 'learning_rate': 0.0}"] * 6, "ds-fp16-all-steps-skipped"),
    ],
)
def test_broken_figures_point_to_a_pitfall(lines: list[str], pitfall: str) -> None:
    assert signatures(lines)[0] == pitfall


@pytest.mark.parametrize(
    "lines",
    [
        losses(2.1, 1.8, 1.9, 1.4, 1.6, 1.2),
        losses(0.6931, 0.6925, 0.688, 0.67, 0.61),
        losses(0.3, 0.6, 0.2, 0.5, 0.1, 0.4),
        losses(9.2, 6.1, 4.0, 3.1),
        ["{'loss': 0.0, 'grad_norm': 0.3, 'reward': 0.5, 'kl': 0.0}"] * 8,
        ["{'loss': 1.1, 'learning_rate': 0.0}", *losses(1.0, 0.9, 0.8)],
        ["objective/kl: -0.02", "objective/kl: 0.4"],
        ["loss_scale: 65536 loss: 2.1", "loss_scale: 32768 loss: 2.0"] * 4,
    ],
)
def test_sound_figures_point_to_nothing(lines: list[str]) -> None:
    assert signatures(lines) == []


def test_a_second_run_in_the_same_log_begins_anew() -> None:
    first = [f"step {step}/100 loss {2.0 - step / 60}" for step in range(5, 100, 5)]
    second = ["step 1/50 loss 7.2", "step 2/50 loss 6.9", "step 3/50 loss 5.0", "step 4/50 loss 3.9"]
    assert signatures(first + second) == []
    assert signatures([*first, "step 99/100 loss 9.0", "step 100/100 loss 9.5", *second]) != []


def test_a_loss_that_jumps_after_a_resume_is_told_from_divergence() -> None:
    lines = losses(1.4, 0.9, 0.82, 8.7, 8.1, 7.5)
    assert signatures(lines, resumed_before=4)[0] == "lora-resume-weights-not-loaded"
    assert signatures(lines)[0] == "lora-rank-with-fixed-lr-diverges"
