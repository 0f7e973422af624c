"""All bad inputs by their groups: the 68 that other tools were measured on, and variants. Knows no verdict."""

from __future__ import annotations

from tests.bad_inputs.adapter_cases import LORA_CASES
from tests.bad_inputs.adapter_variants import LORA_VARIANTS
from tests.bad_inputs.config_cases import CONFIG_CASES, CONFIG_VARIANTS
from tests.bad_inputs.data_cases import DATA_CASES
from tests.bad_inputs.data_variants import DATA_VARIANTS
from tests.bad_inputs.model_cases import MODEL_CASES
from tests.bad_inputs.model_variants import MODEL_VARIANTS
from tests.bad_inputs.output_cases import OUTPUT_CASES
from tests.bad_inputs.output_variants import MACHINE_VARIANTS, OUTPUT_VARIANTS
from tests.bad_inputs.pair_cases import PAIR_CASES
from tests.bad_inputs.pair_variants import PAIR_VARIANTS
from tests.bad_inputs.policy_cases import POLICY_VARIANTS
from tests.bad_inputs.resume_cases import RESUME_CASES, RESUME_VARIANTS
from tests.bad_inputs.scenario import Scenario

CASES: list[Scenario] = [
    *CONFIG_CASES,
    *DATA_CASES,
    *MODEL_CASES,
    *LORA_CASES,
    *PAIR_CASES,
    *OUTPUT_CASES,
    *RESUME_CASES,
]
VARIANTS: list[Scenario] = [
    *CONFIG_VARIANTS,
    *DATA_VARIANTS,
    *MODEL_VARIANTS,
    *LORA_VARIANTS,
    *PAIR_VARIANTS,
    *POLICY_VARIANTS,
    *OUTPUT_VARIANTS,
    *RESUME_VARIANTS,
    *MACHINE_VARIANTS,
]
