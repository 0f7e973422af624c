"""How far a merged, rewritten or quantised model may be from what it was made of, kind by kind, and why.

The figures of quantised kinds rest on llama.cpp's own measurements of LLaMA 3 8B against its FP16 logits on the test
text of Wikitext-2 (https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md, "LLaMA 3 8b
Scoreboard", revision f364eb6f). Mean KL in nats and relative change of perplexity: q8_0 0.0014 and 0.04 %, q6_K 0.0055
and 0.35 %, q5_K_M 0.0108 and 0.9 %, q4_K_M 0.031 and 2.8 %, q4_0 0.072 and 7.5 %, q3_K_M 0.10 and 11 %, q2_K 0.45 and
56 %; with an importance matrix iq4_xs 0.036, iq3_m 0.10, iq3_xxs 0.18, iq2_s 0.44. LLaMA 2 7B loses a third of that
(q8_0 0.0004, q4_K_M 0.013, q2_K 0.11). Models far smaller than both lose much more: a LLaMA of 3 million parameters,
converted as llama.cpp does it, has KL 0.0024 at q8_0, 0.054 at q5_K_M, 0.09 at q4_K_M and 0.27 at q4_0, and its
likeliest token agrees in 97, 86, 84 and 68 % (on its own words; docs/measurements.md has another text). Limits lie
beyond that: they catch a wrong layout, a lost tensor or a wrong template, which give nats and a likeliest token that
hardly ever agrees, and not the loss that a kind is known to bring.
"""

from __future__ import annotations

from dataclasses import dataclass

from zhibei.config.errors import UserError


@dataclass(frozen=True)
class Limits:
    """The worst that passes. `perplexity_change` is relative to the reference."""

    kl_mean: float
    top1_agreement: float
    perplexity_change: float
    reason: str


_SAME = "the same numbers in another file: only the order of additions may differ"
_ROUNDED = "weights rounded once to 16 bits: far below what a wrong scale, a lost adapter or a swapped matrix does"

LIMITS: dict[str, Limits] = {
    "same": Limits(1e-5, 0.995, 0.001, _SAME),
    "f32": Limits(1e-4, 0.99, 0.001, f"{_SAME}, in another program"),
    "merge": Limits(0.005, 0.97, 0.01, _ROUNDED),
    "bf16": Limits(0.005, 0.97, 0.01, _ROUNDED),
    "f16": Limits(0.005, 0.97, 0.01, _ROUNDED),
    "q8_0": Limits(0.01, 0.93, 0.02, "8-bit blocks: q8_0 costs about 0.001 nats on 8B models"),
    "q6_k": Limits(0.03, 0.90, 0.03, "6-bit blocks: about 0.005 nats on 8B models, several times that on small ones"),
    "q5_k": Limits(0.15, 0.80, 0.12, "5-bit blocks: about 0.011 nats on 8B models, several times that on small ones"),
    "q4_k": Limits(0.25, 0.75, 0.20, "4-bit blocks: about 0.03 nats on 8B models, several times that on small ones"),
    "q4_0": Limits(0.60, 0.60, 0.60, "4 bits with one scale in 32: about 0.07 nats on 8B models, more on small ones"),
    "iq4": Limits(0.50, 0.65, 0.50, "4-bit table with an importance matrix: about 0.04 nats on 8B models"),
    "q3_k": Limits(0.60, 0.60, 0.60, "3-bit blocks: about 0.1 nats on 8B models"),
    "iq3": Limits(0.80, 0.55, 0.80, "3-bit table with an importance matrix: 0.1 to 0.2 nats on 8B models"),
    "q2_k": Limits(1.20, 0.50, 1.50, "2-bit blocks: about 0.45 nats on 8B models; a lost layer still gives several"),
    "iq2": Limits(1.20, 0.50, 1.50, "2-bit table with an importance matrix: a lost layer still gives several nats"),
    "adapter": Limits(1.20, 0.55, 1.50, "a low-rank share of the difference: a rank that keeps little is far off"),
    "int8": Limits(0.05, 0.92, 0.05, "LLM.int8 keeps outliers in 16 bits: some hundredths of a nat"),
    "nf4": Limits(0.20, 0.83, 0.15, "4-bit NormalFloat: some hundredths of a nat on 7B models, more on small ones"),
}


def limits_for(kind: str) -> Limits:
    """The limits of a kind, e.g. "merge", "bf16", "q8_0", "q4_k_m", "iq4_xs". Raises UserError for an unknown one."""
    wanted = kind.lower().replace("-", "_")
    for name in (wanted, "_".join(wanted.split("_")[:2]), wanted.split("_")[0]):
        if name in LIMITS:
            return LIMITS[name]
    raise UserError(
        f"no limits are known for {kind!r}",
        expected=f"one of {', '.join(LIMITS)}, or a variant of one such as q4_k_m",
        fix="name the kind that it is compared as",
        where="--kind",
    )
