"""Sections of the stages that learn from judged answers: reward models, and DPO with its kin. Knows values only.

The string under a field is its documentation, as in `zhibei.config.run`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from zhibei.config.training import AnsweringSection, TrainingSection

BETAS = {
    # Rafailov et al. (arXiv:2305.18290, appendix B); Azar et al. (arXiv:2310.12036, section 5.4) sweep 0.1 to 1.
    "dpo": 0.1,
    "ipo": 0.1,
    # github.com/princeton-nlp/SimPO, training_configs: 2.0 for mistral-7b-base and llama-3-8b-base (commit 3e9c4cc3).
    "simpo": 2.0,
    # Ethayarajh et al. (arXiv:2402.01306, section 4.3).
    "kto": 0.1,
}
"""What dpo.beta is where the run file leaves it open."""
REFERENCE_FREE = ("simpo", "orpo")
"""Losses that compare the policy with itself only."""


class RewardSection(TrainingSection):
    """A reward model: one score per answer, learned from pairs of answers (stage: reward)."""

    loss: Literal["log_sig", "log_exp"] = "log_sig"
    """-log sigmoid(chosen - rejected), or log(1 + exp(rejected - chosen)): Coati's two names of one and the same
    function (arXiv:2203.02155, eq. 1)."""
    margin: bool = False
    """Chosen answers must win by the margin that the data gives (arXiv:2307.09288, eq. 2); a pair without one has 0."""
    ties: Literal["equal", "as_pairs"] = "equal"
    """Pairs whose data says margin: 0. equal: judged equal, their scores are drawn together. as_pairs: like others."""
    centring: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores around 0 (arXiv:2312.09244, eq. 2); 0.01 is common, 0 off."""


class DpoSection(AnsweringSection):
    """Learning from pairs of answers, or from judged ones, without a reward model (stage: dpo)."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    """dpo: arXiv:2305.18290. ipo: arXiv:2310.12036. simpo (no reference): arXiv:2405.14734. orpo (no reference, with
    cross-entropy): arXiv:2403.07691. kto (single answers with a label; a pair is two of them): arXiv:2402.01306."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """How strongly the policy is held to its reference (simpo: the scale of its rewards). By default dpo, ipo and kto
    0.1, simpo 2. orpo has none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """loss: dpo only. The chance that a pair is labelled the wrong way round (conservative DPO)."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """loss: simpo only. By how much the chosen answer must win, in the units of beta times nats per token. 1 is what
    its authors took for llama-3-8b-base (half of beta), 1.6 for mistral-7b-base (princeton-nlp/SimPO)."""
    odds_weight: Annotated[float, Field(ge=0)] = 0.1
    """loss: orpo only. Weight of the odds ratio beside the cross-entropy of the chosen answer (lambda in the paper)."""
    good_weight: Annotated[float, Field(ge=0)] = 1.0
    """loss: kto only. Weight of answers that were labelled good."""
    bad_weight: Annotated[float, Field(ge=0)] = 1.0
    """loss: kto only. Weight of answers that were labelled bad."""
    reference: Literal["auto", "adapters_off", "precomputed"] = "auto"
    """Where the reference log-probabilities come from: the same weights with adapters off, or computed once before the
    first step and kept with the run. auto: adapters off where fresh adapters are all that learns, else precomputed."""
