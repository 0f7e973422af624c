"""The plan's sums equal what autograd keeps, what optimisers hold, and what was measured on a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.memory import with_prediction
from benchmarks.records import RESULTS, read
from tests.plan.test_shapes import CASES, on_meta
from zhibei.plan.activations import Execution, layer_bytes
from zhibei.plan.holdings import holdings_of
from zhibei.plan.job import Job, Rows, adapted_names, passes_of, rows_of_lengths
from zhibei.plan.memory import predict
from zhibei.plan.shapes import read_shape

TOKENS, ROW = 256, 64
FAMILIES = (
    "llama", "llama with its own head width", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "phi", "gpt2", "opt",
    "gpt_neox", "starcoder2", "cohere", "olmo", "olmo2", "granite", "gpt_bigcode",
)  # fmt: skip
LLAMA_7B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip


def measured(grid: str) -> list:
    return [record for record in read(RESULTS / "memory.json") if record["settings"]["grid"] == grid]


@pytest.mark.parametrize(("grid", "fewest"), [("grid", 40), ("held-out", 14), ("blind", 18)])
def test_every_measured_configuration_is_predicted_within_six_percent(grid, fewest):
    records = measured(grid)
    assert len(records) >= fewest
    errors = {json.dumps(record["settings"]): with_prediction(record)["error_percent"] for record in records}
    assert {settings: error for settings, error in errors.items() if abs(error) > 6} == {}


def test_loading_and_saving_are_predicted_too():
    for record in (*measured("grid"), *measured("held-out")):
        predicted = with_prediction(record)["predicted"]
        for phase in ("load", "steady", "save"):
            assert predicted[phase] == pytest.approx(record["measured"][phase]["allocated_gib"], rel=0.05), record


def kept_by_autograd(case: str, *, layers: int, checkpointing: str = "none", adapters: bool = False) -> tuple:
    """(bytes that autograd keeps for a tiny model of the family in bf16, its shape)."""
    import torch
    from torch.nn.attention import varlen
    from transformers import AutoConfig, AutoModelForCausalLM

    from zhibei.model import attention
    from zhibei.model.language_model import LanguageModel
    from zhibei.model.savings import checkpoint_activations

    def forward(query, key, value, *_args, **_options):
        sums = torch.zeros(query.shape[1], query.shape[0])
        return torch.zeros_like(query), sums, torch.zeros(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    attention.register()
    family, settings = CASES[case]
    settings = {key: value for key, value in settings.items() if key not in ("qk_layernorm", "use_qk_norm")}
    layer_name = "n_layer" if "n_layer" in settings else "num_hidden_layers"
    settings = {**settings, layer_name: layers}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0)
    config = AutoConfig.for_model(family, **settings)
    torch.set_default_dtype(torch.bfloat16)
    try:
        hf = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    hf.set_attn_implementation(attention.VARLEN)
    if adapters:
        import peft

        config_of_adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        hf = peft.get_peft_model(hf, config_of_adapters, autocast_adapter_dtype=False)
    model = LanguageModel(hf.train(), attention_name=attention.VARLEN, longest_row=ROW)
    checkpoint_activations(model, checkpointing)
    own = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(_batch())
    return sum(size for size, _ in kept.values()), read_shape(json.loads(config.to_json_string()))


def _batch():
    import torch

    class Packed:
        tokens_BT = torch.arange(TOKENS)[None] % 300
        positions_BT = torch.arange(ROW).repeat(TOKENS // ROW)[None]
        mask_BT = None
        borders = torch.arange(0, TOKENS + 1, ROW, dtype=torch.int32)
        row_lengths = (ROW,) * (TOKENS // ROW)

    return Packed()


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("case", FAMILIES)
def test_a_layer_keeps_what_the_plan_says(case, adapters):
    (two, _), (three, shape) = (kept_by_autograd(case, layers=layers, adapters=adapters) for layers in (2, 3))
    targets = frozenset(adapted_names(shape, "all-linear")) if adapters else frozenset()
    how = Execution(is_compiled=False, trains_weights=not adapters, adapted=targets, rank=8)
    assert (three - two) / TOKENS == pytest.approx(layer_bytes(shape, how).total, rel=0.02)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_full_checkpointing_keeps_the_inputs_of_layers(case):
    (two, _), (three, shape) = (kept_by_autograd(case, layers=n, checkpointing="full") for n in (2, 3))
    assert (three - two) / TOKENS == layer_bytes(shape, Execution(checkpointing="full", is_compiled=False)).total


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimisers_hold_what_the_plan_says(optimizer, precision):
    import torch

    from zhibei.config.run import SftSection
    from zhibei.train.optimizer import make_optimizer

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    config, model = on_meta("llama", CASES["llama"][1])
    parameters = {name: torch.nn.Parameter(torch.zeros(p.shape, dtype=dtype)) for name, p in model.named_parameters()}
    made = make_optimizer(parameters, SftSection(optimizer=optimizer))
    made.step({name: torch.ones_like(p) for name, p in parameters.items()}, learning_rate=1e-3, scale=1.0)
    real = sum(tensor.numel() * tensor.element_size() for tensor in made.tensors().values())
    shape = read_shape(config)
    held = holdings_of(shape, Job(64, optimizer=optimizer, precision=precision))
    # The plan rounds every tensor up as the GPU's allocator does.
    assert real == pytest.approx(held.masters + held.states, abs=1024 * len(parameters))


def test_the_guides_rule_of_thumb():
    """2 GB per billion parameters in 16 bit, 8 bytes per parameter for AdamW."""
    shape = read_shape(LLAMA_7B)
    held = holdings_of(shape, Job(1024))
    assert held.weights == pytest.approx(2 * shape.num_parameters, rel=1e-3)
    assert held.states == pytest.approx(8 * shape.num_parameters, rel=1e-3)
    quantised = holdings_of(shape, Job(1024, method="lora", quantize="int8", targets=("q_proj",)))
    assert quantised.weights < 0.6 * held.weights


@pytest.mark.parametrize("change", [
    {"checkpointing": "full"}, {"checkpointing": "selective"}, {"pass_tokens": 4096}, {"offload": "optimizer"},
    {"method": "lora", "targets": ("q_proj", "v_proj")}, {"optimizer": "adamw_8bit", "precision": "bf16"},
    {"num_gpus": 4, "gpus_per_node": 4, "sharding": "full_shard"},
    {"num_gpus": 4, "gpus_per_node": 4, "sharding": "shard_grad_op"},
])  # fmt: skip
def test_what_is_said_to_save_memory_saves_memory(change):
    shape, job = read_shape(LLAMA_7B), Job(8192)
    assert predict(shape, replace(job, **change)).peak_gib < predict(shape, job).peak_gib


def test_what_the_other_stages_hold_beside_supervised_training():
    shape = read_shape(LLAMA_7B)
    job = Job(2048, method="lora", targets=("q_proj",))
    sft, ppo, reward = (predict(shape, replace(job, stage=stage)) for stage in ("sft", "ppo", "reward"))
    assert ppo.peak_gib > sft.peak_gib
    # A reward model has no head that continues text, and no logits.
    head_gib = 2 * 32000 * 4096 / 2**30
    assert reward.peak_gib < sft.peak_gib - head_gib
    separate = predict(shape, replace(job, stage="ppo", ppo_models="separate"))
    assert separate.peak_gib > ppo.peak_gib + 12
    full = replace(job, method="full", targets=(), stage="ppo", ppo_models="separate")
    # Beside the policy a reference, and a critic with master weights and states, but for those of a head it has not.
    weights_gib, plain = 12.5, predict(shape, replace(full, stage="sft")).phase("steady").gib
    learning = predict(shape, full).phase("steady").gib
    assert learning == pytest.approx(plain + weights_gib + 6 * (weights_gib - head_gib) + head_gib, rel=0.01)


def test_answers_under_way_are_a_phase_of_their_own():
    shape = read_shape(LLAMA_7B)
    job = Job(2048, row_tokens=1024, method="lora", targets=("q_proj",), stage="grpo", max_new_tokens=512)
    many = predict(shape, replace(job, rollout_batch=256))
    few = predict(shape, replace(job, rollout_batch=4))
    cache_gib = 2 * 2 * 4096 * 32 * 1024 / 2**30
    written = [plan.phase("answers").causes["KV cache"] / 2**30 for plan in (few, many)]
    assert written == pytest.approx([4 * cache_gib, 256 * cache_gib])
    assert many.phase("steady").gib == few.phase("steady").gib
    assert "answers" not in [phase.name for phase in predict(shape, replace(job, stage="dpo")).phases]


def test_an_engine_beside_the_policy_takes_its_share_and_writes_outside_of_ours():
    shape = read_shape(LLAMA_7B)
    job = Job(2048, row_tokens=1024, method="lora", targets=("q_proj",), stage="grpo", rollout_batch=256)
    own, beside = predict(shape, job), predict(shape, replace(job, engine_bytes=40 * 2**30))
    assert beside.phase("steady").gib == pytest.approx(own.phase("steady").gib + 40)
    assert not beside.phase("answers").causes.get("KV cache")
    assert beside.phase("answers").gib < own.phase("answers").gib + 40


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_reward_model_is_a_whole_model_beside_the_policy(stage):
    shape = read_shape(LLAMA_7B)
    job = Job(2048, stage=stage, method="lora", targets=("q_proj",))
    judged = predict(shape, replace(job, has_reward_model=True))
    assert judged.peak_gib == pytest.approx(predict(shape, job).peak_gib + 2 * shape.num_parameters / 2**30, rel=0.01)


def test_a_reference_costs_no_second_model():
    shape, job = read_shape(LLAMA_7B), Job(2048)
    # Log-probabilities take more of a chunk of logits than the cross-entropy, and that is all.
    chunk_gib = 2048 * 32000 * 32 / 2**30
    assert abs(predict(shape, replace(job, stage="dpo")).peak_gib - predict(shape, job).peak_gib) < chunk_gib


def test_rows_of_known_lengths_make_smaller_passes_than_full_ones():
    rows = rows_of_lengths([100, 200, 300] * 100, global_batch=12)
    largest, passes = passes_of(rows, 1024, global_batch=12)
    assert largest <= 1024
    assert passes >= 2
    assert passes_of(Rows(300, 300.0), 1024, global_batch=12) == (900, 4)


def test_planning_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, zhibei.cli.plan, zhibei.plan.settle; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
