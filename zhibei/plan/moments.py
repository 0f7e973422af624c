"""The moments at which a training step's memory can peak: loss, its backward, a layer's backward, the update.

Each is a mapping from cause to bytes that comes on top of what is held anyway. Found by replaying the allocator's
record of real steps (`benchmarks/memory.py --explain`); the code it follows is named at each function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zhibei.plan.activations import NORMS, Execution, layer_bytes, style_of
from zhibei.plan.heads import ENDS, head_elements
from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job
from zhibei.plan.shapes import ModelShape

ELEMENTS_PER_UPDATE = 2**28  # train/optimizer.py
Causes = dict[str, float]


@dataclass(frozen=True, slots=True)
class Moment:
    """A name a person understands, and the bytes by cause."""

    name: str
    causes: Causes

    @property
    def total(self) -> float:
        return sum(self.causes.values())


def moments_of(shape: ModelShape, job: Job, held: Holdings) -> Iterator[Moment]:
    """All moments of the last pass of a step (the heaviest one: earlier passes have left their gradient sums)."""
    kept = kept_bytes(shape, job)
    forward, backward = ENDS[job.stage]
    # Gradients that lie there while a pass is under way: sums of earlier passes, or fp32 gradients being added to.
    earlier = held.gradient_sums if job.item_bytes != 4 else held.gradients * (job.num_passes > 1)
    base: Causes = {"gradients": earlier, **kept}
    yield Moment("loss", _plus(base, forward(shape, job, held)))
    yield Moment("backward of the loss", _plus(base, backward(shape, job, held)))
    yield Moment("backward of the last layer", _plus(base, first_backward(shape, job, held)))
    yield Moment("backward of the first layer", _plus({"gradients": earlier}, last_backward(shape, job, held)))
    yield Moment("embedding gradient", _plus({"gradients": earlier}, embedding_backward(shape, job, held)))
    yield Moment("update", update(job, held))


def _plus(base: Causes, more: Causes) -> Causes:
    return {name: base.get(name, 0.0) + more.get(name, 0.0) for name in {**base, **more}}


def kept_bytes(shape: ModelShape, job: Job) -> Causes:
    """What all layers and the final norm keep for the backward pass."""
    tokens = job.pass_tokens
    layers = layer_bytes(shape, job.execution, row_tokens=job.row_tokens).total * shape.num_layers * tokens
    return {"activations": layers + _final_norm(shape, job) + _tables(shape, job) - _not_kept(shape, job)}


def _not_kept(shape: ModelShape, job: Job) -> float:
    """Below the first adapter nothing learns: the first layer keeps neither its input nor its first norm's."""
    if not job.trains_adapters or job.checkpointing == "full":
        return 0.0
    return job.pass_tokens * shape.hidden * (job.item_bytes if job.execution.is_compiled else 4)


def _final_norm(shape: ModelShape, job: Job) -> float:
    style = style_of(shape)
    return NORMS[style.norm](shape.hidden, job.item_bytes, not job.trains_adapters) * job.pass_tokens


def _tables(shape: ModelShape, job: Job) -> float:
    """Cosine and sine of every position, once for all layers."""
    return 2 * shape.head_dim * job.item_bytes * job.pass_tokens


def _head_gradient(shape: ModelShape, job: Job, held: Holdings) -> float:
    """A tied head's gradient waits for the embedding's; with several passes others are added to the sums at once."""
    if held.frozen_head:
        return 0.0
    if job.num_passes > 1 and not shape.is_tied:
        return 0.0
    return job.item_bytes * head_elements(shape)


def working_bytes(shape: ModelShape, job: Job) -> float:
    """Buffers of one layer's backward, beyond what it had kept, in values per token: mostly gradients of MLP width."""
    how, item = job.execution, job.item_bytes
    wide = WORKING_WIDTHS[how.is_compiled, how.trains_weights, how.checkpointing]
    mlp = shape.mlp_width if not shape.num_experts else shape.experts_per_token * shape.expert_width
    # Without a gate there is one branch less, and nothing of its product.
    branches = wide if shape.is_gated else max(3, wide - 2)
    hidden = shape.hidden * (1 + (how.checkpointing == "selective"))
    return job.pass_tokens * item * (branches * mlp + hidden)


# Counted in the allocator's record of real steps: (compiled, all weights learn, checkpointing) -> widths of the MLP.
# Recomputed tensors are freed as they are used, kept ones only after the layer: full checkpointing needs fewer beside.
WORKING_WIDTHS: dict[tuple[bool, bool, str], int] = {
    (True, True, "none"): 4, (True, True, "selective"): 6, (True, True, "full"): 1,
    (True, False, "none"): 5, (True, False, "selective"): 7, (True, False, "full"): 5,
    (False, True, "none"): 3, (False, True, "selective"): 5, (False, True, "full"): 3,
    (False, False, "none"): 3, (False, False, "selective"): 5, (False, False, "full"): 3,
}  # fmt: skip


def recomputed_bytes(shape: ModelShape, job: Job) -> float:
    """With full checkpointing, one layer keeps everything again while its backward runs."""
    if job.checkpointing == "none" or (job.checkpointing == "selective" and job.is_compiled):
        return 0.0
    how = job.execution
    whole = Execution(**{**{name: getattr(how, name) for name in how.__slots__}, "checkpointing": "none"})
    every = layer_bytes(shape, whole, row_tokens=job.row_tokens).total
    present = layer_bytes(shape, how, row_tokens=job.row_tokens).total
    return max(0.0, every - present) * job.pass_tokens


def first_backward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """The last layer's backward, while all other layers still keep theirs; the final norm's are gone.

    It peaks in the MLP, before the layer's own gradients of weights are there.
    """
    return {
        "gradients": _head_gradient(shape, job, held),
        "activations": recomputed_bytes(shape, job) - _final_norm(shape, job),
        "working buffers": working_bytes(shape, job) + held.unpacked,
    }


def last_backward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """The first layer's backward, when almost all gradients are there."""
    kept = layer_bytes(shape, job.execution, row_tokens=job.row_tokens).total * job.pass_tokens
    if job.num_passes > 1:
        gradients = _head_gradient(shape, job, held)
    else:
        own = 0 if job.trains_adapters else job.item_bytes * shape.largest_layer_parameters
        embedding = 0 if held.frozen_embedding or shape.is_tied else job.item_bytes * shape.embedding_parameters
        gradients = max(0, held.gradients - own - embedding)
    return {
        "gradients": gradients,
        "activations": kept + recomputed_bytes(shape, job) + _tables(shape, job),
        "working buffers": working_bytes(shape, job) + held.unpacked,
    }


def embedding_backward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """A dense gradient of the embedding; where it is tied, beside that of the head and their sum."""
    if held.frozen_embedding:
        return {}
    dense = job.item_bytes * shape.embedding_parameters
    several = job.num_passes > 1
    gradients = held.gradients if not several else dense
    extra = dense if shape.is_tied else 0
    return {"gradients": gradients + extra, "working buffers": job.pass_tokens * (shape.hidden * job.item_bytes + 24)}


def update(job: Job, held: Holdings, *, is_first: bool = False) -> Causes:
    """The optimiser's step: all gradients, and for fp32 masters some of them in fp32 (train/optimizer.py, step).

    Masters are updated in parts of at least `ELEMENTS_PER_UPDATE` elements; in its first step the optimiser makes the
    states of a part when that part's turn comes.
    """
    gradients = held.gradient_sums or held.gradients
    if not held.states_from_first_update:
        return {"gradients": gradients}
    is_cast = job.item_bytes != 4 and not held.gradient_sums
    made, most = 0.0, (0.0, 0.0)
    for part in _parts(held.trained_sizes):
        copies = 0.0
        for elements in part:
            # `gradient.float() * scale`: both are there for a moment.
            building = copies + 4 * elements * (1 + is_cast)
            most = max(most, (made if is_first else held.states, building), key=sum)
            copies += 4 * elements
        made += held.states * sum(part) / held.trained
        # Adafactor's update of a matrix is a matrix, and so is the square of its gradient.
        inner = 4 * max(part) * 1.25 if job.optimizer == "adafactor" else 0.0
        most = max(most, (made if is_first else held.states, copies + inner), key=sum)
    return {"gradients": gradients, "optimiser states": most[0], "working buffers": most[1]}


def _parts(sizes: tuple[int, ...]) -> Iterator[list[int]]:
    part: list[int] = []
    for size in sizes:
        part.append(size)
        if sum(part) >= ELEMENTS_PER_UPDATE:
            yield part
            part = []
    if part:
        yield part
