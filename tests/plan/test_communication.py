"""What ranks send one another follows from the sizes, and the page about scale shows what the planner says."""

import json

import pytest

from benchmarks.scale import NODE_LINKS, PAGE, RESULTS, few_cards, records, shape_of, table, table_of_cards
from zhibei.plan.communication import seconds_of, traffic_of
from zhibei.plan.holdings import gathered_layers
from zhibei.plan.job import Job
from zhibei.plan.machines import parse_machine
from zhibei.plan.memory import predict

SHAPE = shape_of("7B")


def job(sharding: str, *, nodes: int = 1, **more) -> Job:
    return Job(4096, sharding=sharding, num_gpus=8 * nodes, gpus_per_node=8, **more)  # type: ignore[arg-type]


def test_one_gpu_sends_nothing_and_adapters_next_to_nothing():
    assert traffic_of(SHAPE, Job(4096)).total == 0
    whole = traffic_of(SHAPE, job("no_shard"))
    assert whole.added_up == pytest.approx(2 * 4 * SHAPE.num_parameters * 7 / 8)
    adapters = traffic_of(SHAPE, job("no_shard", method="lora", targets=("q_proj", "v_proj")))
    assert adapters.total < 0.01 * whole.total


def test_weights_are_gathered_once_or_twice_in_every_pass():
    once, twice = traffic_of(SHAPE, job("shard_grad_op")), traffic_of(SHAPE, job("full_shard"))
    outside = SHAPE.embedding_parameters + SHAPE.head_parameters
    assert twice.gathered - once.gathered == pytest.approx(2 * (SHAPE.num_parameters - outside) * 7 / 8)
    assert twice.scattered == once.scattered
    assert traffic_of(SHAPE, job("full_shard", num_passes=3)).total == pytest.approx(3 * twice.total)


def test_hybrid_saves_between_two_nodes_and_no_longer_between_many():
    def crossing(nodes: int, sharding: str) -> float:
        # Nothing but the link between nodes decides.
        machine = parse_machine(f"h100-80g:8x{nodes}")
        slow = type(machine)(
            **{**{name: getattr(machine, name) for name in machine.__slots__}, "node_link_gb_per_s": 0.1}
        )
        planned = job(sharding, nodes=nodes)
        return seconds_of(planned, slow, traffic_of(SHAPE, planned))

    few, many = (crossing(nodes, "hybrid") / crossing(nodes, "full_shard") for nodes in (2, 64))
    assert few == pytest.approx(0.55, abs=0.05)
    assert many == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_the_page_about_scale_is_current():
    """Slow: several hundred plans."""
    document = json.loads(RESULTS.read_text())
    assert document["plans"] == list(records())
    for link in NODE_LINKS:
        assert table(document["plans"], link) in PAGE.read_text()
    assert document["few_cards"] == list(few_cards())
    assert table_of_cards(document["few_cards"]) in PAGE.read_text()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_divided_layers_lie_whole_on_every_gpu_while_answers_are_written(quantize):
    more = {"method": "qlora" if quantize == "nf4" else "lora", "quantize": quantize, "targets": ("q_proj",)}
    planned = job("full_shard", stage="grpo", row_tokens=512, max_new_tokens=256, rollout_batch=16, **more)
    phases = {phase.name: phase.causes for phase in predict(SHAPE, planned).phases}
    layers = sum(gathered_layers(SHAPE, planned))
    outside = 2 * (SHAPE.embedding_parameters + SHAPE.head_parameters)
    assert phases["answers"]["gathered layers"] == layers + outside
    assert phases["steady"]["gathered layers"] < 0.2 * layers + outside
    assert layers == pytest.approx((0.51 if quantize == "nf4" else 2) * SHAPE.layer_parameters, rel=0.02)
