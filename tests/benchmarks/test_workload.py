"""The workload counts what the real shape has, and the clock measures whole steps."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from benchmarks.ours import OurSettings, zhibei
from benchmarks.profile_step import Kernel, shares
from benchmarks.timing import StepClock
from benchmarks.workload import Workload, random_model


def test_parameter_count_is_the_models_without_its_input_embedding() -> None:
    from transformers import LlamaForCausalLM

    for workload in (Workload(), Workload(shape="tiny")):
        with torch.device("meta"):
            model = LlamaForCausalLM(workload.config())
        counted = sum(p.numel() for name, p in model.named_parameters() if name != "model.embed_tokens.weight")
        assert workload.num_parameters() == counted
    assert round(Workload().num_parameters() / 1e9, 3) == 6.607


def test_model_tflops_by_hand() -> None:
    """6 * 6.607e9 * 10,000 tokens/s = 396.4 TFLOP/s; a frozen base needs no weight gradients: two thirds of it."""
    assert Workload().tflops(10_000, "full") == pytest.approx(396.4, abs=0.1)
    assert Workload().tflops(10_000, "lora") == pytest.approx(264.3, abs=0.1)


def test_rows_are_a_pure_function_of_the_seed_and_hold_no_padding() -> None:
    first, second = Workload().rows(2), Workload().rows(2)
    assert len(first) == 256
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert min(int(row.min()) for row in first) >= 3
    assert max(len(row) for row in first) == 512
    assert 200 < np.mean([len(row) for row in first]) < 260


def test_random_model_equals_one_built_by_transformers() -> None:
    """Made on the meta device and filled, it must have working rotary positions: same logits as the ordinary way."""
    from transformers import LlamaForCausalLM

    workload = Workload(shape="tiny")
    model = random_model(workload, dtype=torch.float32, device="cpu").eval()
    plain = LlamaForCausalLM(workload.config()).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_the_clock_takes_medians_after_the_warm_up() -> None:
    clock = StepClock(warmup=1)
    clock.seconds, clock.useful, clock.computed = [50.0, 1.0, 4.0, 2.0], [10, 10, 20, 20], [20, 20, 20, 20]
    figures = clock.figures(Workload(), "full")
    assert figures["seconds"] == 2.0
    assert figures["spread"]["seconds"] == [1.0, 4.0]
    assert figures["useful_tokens_per_s"] == 10.0  # of 10, 5 and 10
    assert figures["warmup_seconds"] == 50.0
    assert figures["padding_share"] == pytest.approx(1 - 50 / 60, abs=1e-4)
    with pytest.raises(ValueError, match="warm-up"):
        StepClock(warmup=4, seconds=[1.0] * 4).figures(Workload(), "full")


def test_the_clock_counts_from_end_to_end() -> None:
    clock = StepClock(warmup=0)
    clock.start()
    time.sleep(0.02)
    clock.step_done(useful=lambda: 1, computed=1)
    assert clock.seconds[0] >= 0.02


@pytest.mark.parametrize("packing", [True, False])
def test_our_side_counts_every_token_once(packing: bool) -> None:
    workload = Workload(shape="tiny", global_batch=4)
    settings = OurSettings("lora", micro_batch_tokens=1024, compile=False, packing=packing)
    record = zhibei(settings, workload, steps_timed=1, warmup=1)
    tokens = sum(len(row) for row in workload.rows(2))
    second_step = record["useful_tokens_per_s"] * record["seconds"]
    assert 0 < second_step < tokens
    assert record["padding_share"] >= 0
    assert record["repeats"] == 1


def test_kernels_are_sorted_into_kinds() -> None:
    names = {
        "void flash_bwd_kernel<cutlass::bf16>": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNN": "products",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
        "triton_poi_fused_mul_silu_3": "fused pointwise",
        "triton_red_fused_mean_mul_pow_rsqrt_1": "fused pointwise",
        "triton_poi_fused_add_div_mul_sqrt_0": "optimiser",
        "Memcpy DtoD (Device -> Device)": "copies and fills",
        "void at::native::elementwise_kernel<128, 4>": "pointwise",
        "ncclDevKernel": "other",
    }
    assert {name: Kernel(name, 1.0, 1).kind for name in names} == names
    found = shares([Kernel(name, 1.0, 1) for name in names], wall_milliseconds=10.0)
    assert found["no kernel"] == 1.0
    assert sum(found.values()) == 10.0
