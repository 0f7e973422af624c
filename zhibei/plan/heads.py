"""What the end of a forward pass holds: cross-entropy, log-probabilities of given tokens, or a score. Knows no layers.

Each function gives bytes by cause, beyond what the layers keep. `zhibei/losses/tokens.py` computes the gradient of the
cross-entropy in the forward pass, `zhibei/losses/logps.py` that of log-probabilities in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job
from zhibei.plan.shapes import ModelShape

LOSS_CHUNK = 2048  # losses/tokens.py, chunk_tokens
# losses/logps.py: fp32 copies of a chunk of logits at the heaviest line, besides the raw logits in the model's type.
# Forward: log p, p and their product. Backward: logits, log p, p, the gradient, and two of the entropy's term.
LOGP_FORWARD, LOGP_BACKWARD = 3 * 4, 6 * 4
Causes = dict[str, float]


def cross_entropy_forward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Hidden states and their gradient, the head's gradient in fp32, one chunk of logits."""
    tokens, width, item = job.pass_tokens, shape.hidden, job.item_bytes
    head = 0 if held.frozen_head else 4 * head_elements(shape)
    rows = min(LOSS_CHUNK, tokens)
    # The product that is added to the head's gradient is made while logits and gradient of its chunk are there.
    product = 0 if held.frozen_head else item * (head_elements(shape) + 2 * rows * shape.vocabulary)
    chunk = max(chunk_bytes(shape, job), product)
    return {"activations": 2 * item * tokens * width, "loss": head + chunk}


def cross_entropy_backward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """The head's gradient in fp32, scaled in place, and that in the model's type (losses/tokens.py, scaled)."""
    copies = job.item_bytes * job.pass_tokens * shape.hidden
    head = 0 if held.frozen_head else (4 + (job.item_bytes if job.item_bytes != 4 else 0)) * head_elements(shape)
    return {"activations": copies, "loss": head}


def chunk_bytes(shape: ModelShape, job: Job) -> float:
    """Logits of one chunk and what is made of them (losses/tokens.py, _chunk_loss_and_gradient).

    Compiled: the logits, the gradient, and the gradient of the chunk before, in the model's type. Not compiled: fp32
    logits, exponentials, and the one-hot term twice, besides logits and the earlier gradient in the model's type.
    """
    rows = min(LOSS_CHUNK, job.pass_tokens)
    has_earlier = job.pass_tokens > LOSS_CHUNK
    item = job.item_bytes
    compiled = item * (2 + has_earlier)
    plain = 16 + item * (1 + has_earlier) - (4 if item == 4 else 0)
    return (compiled if job.is_compiled else plain) * rows * shape.vocabulary


def logps_forward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Hidden states, and one chunk of logits with what is made of them."""
    tokens, item = job.pass_tokens, job.item_bytes
    chunk = (item + LOGP_FORWARD) * min(LOSS_CHUNK, tokens) * shape.vocabulary
    return {"activations": item * tokens * shape.hidden, "loss": chunk}


def logps_backward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Hidden states and their gradient, one chunk, and the head's gradient in fp32 with the product that is added."""
    tokens, item = job.pass_tokens, job.item_bytes
    chunk = (item + LOGP_BACKWARD) * min(LOSS_CHUNK, tokens) * shape.vocabulary
    head = 0 if held.frozen_head else (4 + item) * head_elements(shape)
    return {"activations": 2 * item * tokens * shape.hidden, "loss": chunk + head}


def score_forward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Hidden states; of a row only the last one is read."""
    return {"activations": job.item_bytes * job.pass_tokens * shape.hidden}


def score_backward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Hidden states and a gradient of all of them, which is 0 but for the last token of each row."""
    return {"activations": 2 * job.item_bytes * job.pass_tokens * shape.hidden}


def head_elements(shape: ModelShape) -> int:
    return shape.vocabulary * shape.hidden


End = Callable[[ModelShape, Job, Holdings], Causes]
CROSS_ENTROPY: tuple[End, End] = (cross_entropy_forward, cross_entropy_backward)
LOGPS: tuple[End, End] = (logps_forward, logps_backward)
ENDS: Mapping[str, tuple[End, End]] = {
    "sft": CROSS_ENTROPY, "raft": CROSS_ENTROPY, "reward": (score_forward, score_backward),
    "dpo": LOGPS, "ppo": LOGPS, "grpo": LOGPS,
}  # fmt: skip
"""Forward and backward of each stage's loss."""
