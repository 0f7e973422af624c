"""One optimiser step: count, forward, backward, divide once, clip, update. Knows batches and losses, not files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from zhibei.config.errors import RunStopped, UserError
from zhibei.data.batches import Batch
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import ALONE, Ranks, own_part
from zhibei.train.optimizer import Optimizer

LossSum = Callable[[LanguageModel, Batch], torch.Tensor]
"""The sum of a loss over the units of a batch."""
StepLoss = Callable[[LanguageModel, Batch], torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""The same, optionally with named sums over the units, which become figures of the step."""
FIRST_SCALE = 2.0**16
GROW_AFTER_STEPS = 1000
SMALLEST_SCALE = 2.0**-4
SHOWN_NAMES = 8
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StepRecord:
    """What one step did. `loss` is the mean per unit (learned token, pair, judged answer) of the whole step, in nats;
    `figures` are means per unit too."""

    loss: float
    grad_norm: float
    num_units: int
    num_tokens: int
    num_micro_batches: int
    was_skipped: bool = False
    num_learned_tokens: int = 0
    own_seconds: float = 0.0
    """What this rank's own passes took, before it waited for the gradients of the others; 0 for one rank."""
    figures: Mapping[str, float] = field(default_factory=dict)


class NonFiniteStep(RunStopped):
    """Loss, gradients or weights of a step are NaN or infinite. `row_numbers` are the step's rows.

    `was_applied`: the update itself made the weights so; otherwise nothing was updated.
    """

    def __init__(self, what: str, row_numbers: list[int], *, was_applied: bool = False) -> None:
        super().__init__(
            what,
            expected="finite loss and gradients",
            fix="lower the learning rate or raise warm-up; with fp16 use bf16 or fp32; look at the named rows with "
            "zhibei data show; the last checkpoint can be resumed",
        )
        self.row_numbers, self.was_applied = row_numbers, was_applied


class LossScale:
    """Dynamic loss scale for fp16 (arXiv:1710.03740): halved when gradients overflow, doubled after many good steps."""

    def __init__(self, *, enabled: bool) -> None:
        self.value = FIRST_SCALE if enabled else 1.0
        self.enabled = enabled
        self.good_steps = 0

    def overflowed(self) -> bool:
        """Halve. False when the scale is so small already that overflow is not the cause."""
        if not self.enabled or self.value <= SMALLEST_SCALE:
            return False
        self.value, self.good_steps = self.value / 2, 0
        return True

    def went_well(self) -> None:
        self.good_steps += 1
        if self.enabled and self.good_steps % GROW_AFTER_STEPS == 0:
            self.value *= 2


class Stepper:
    """Holds the model, the optimiser and the loss scale between steps.

    The step's loss is one mean over all units of the step, however they are cut into micro-batches:
    losses return sums, and the division happens here, once, before backward.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        loss_sum: StepLoss,
        *,
        max_grad_norm: float,
        parameters: Mapping[str, torch.nn.Parameter] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`parameters` are what learns, where gradients appear. By default what the optimiser updates; of a divided
        model that is only the parts which this rank holds."""
        self.model, self.optimizer, self.loss_sum = model, optimizer, loss_sum
        self.parameters = dict(optimizer.parameters if parameters is None else parameters)
        self.max_grad_norm, self.ranks = max_grad_norm, ranks
        self.scale = LossScale(enabled=model.dtype == torch.float16)
        self._sums: dict[str, torch.Tensor] = {}
        self._is_summing = False
        self._reached: dict[tuple[str, ...], torch.Tensor] = {}
        self._checksums_at_start: torch.Tensor | None = None
        self.effective_steps = 0
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._sum_in_fp32(name))

    def step(self, micro_batches: Sequence[Batch], *, learning_rate: float) -> StepRecord:
        """Forward and backward of every micro-batch, then one update.

        Raises NonFiniteStep before anything is updated when loss or gradients are not finite, and UserError when
        the step has nothing to learn.
        """
        counted = (
            sum(batch.num_units for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.num_learned for batch in micro_batches),
        )
        num_units, num_tokens, num_learned = (int(number) for number in self.ranks.sum_on_host(*counted))
        if num_units == 0:
            raise UserError(
                "no token of a whole optimiser step is learned",
                expected="at least one supervised token per step",
                fix="look at the mask with: zhibei data show",
                where="data.supervise",
            )
        started = time.monotonic()
        # Gradients of ranks are added in fp32 like those of passes.
        self._is_summing = len(micro_batches) > 1 or self.ranks.are_several
        total = torch.zeros((), device=self.model.device)
        figures: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            outcome = self.loss_sum(self.model, batch.to(self.model.device))
            batch_sum, sums = outcome if isinstance(outcome, tuple) else (outcome, {})
            for name, value in sums.items():
                figures[name] = figures[name] + value.detach() if name in figures else value.detach()
            if not batch_sum.requires_grad:
                raise nothing_learns()
            (batch_sum * (self.scale.value / num_units)).backward()
            total += batch_sum.detach()
        own_seconds = self._own_seconds(started)
        gradients = self._gradients()
        if not gradients:
            raise nothing_learns()
        norms_N = self._norms(gradients)
        self._note_reached(tuple(gradients), norms_N)
        norm = torch.linalg.vector_norm(norms_N) / self.scale.value
        # The one wait for the device in a step: a bad step must be seen before it is applied.
        sums = torch.stack([total, *(value.float() for value in figures.values())])
        means = self.ranks.sum(sums) / num_units
        loss, *others, grad_norm = torch.cat([means, norm[None]]).tolist()
        record = StepRecord(
            loss=loss,
            grad_norm=grad_norm,
            num_units=num_units,
            num_tokens=num_tokens,
            num_micro_batches=len(micro_batches),
            num_learned_tokens=num_learned,
            own_seconds=own_seconds,
            figures=dict(zip(figures, others, strict=True)),
        )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._bad_step(record, micro_batches)
        clip = min(1.0, self.max_grad_norm / (grad_norm + 1e-6)) if self.max_grad_norm else 1.0
        self.optimizer.step(gradients, learning_rate=learning_rate, scale=clip / self.scale.value)
        self._forget_gradients()
        self.scale.went_well()
        self.effective_steps += learning_rate > 0
        return record

    def _own_seconds(self, started: float) -> float:
        """Seconds since then, once the device is done. Among divided layers ranks wait for one another all the time, so
        that this tells them apart only where each holds the whole model."""
        if not self.ranks.are_several:
            return 0.0
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.monotonic() - started

    def _note_reached(self, names: tuple[str, ...], norms_N: torch.Tensor) -> None:
        """Remember on the device which gradients were ever more than zero; read only by `look`."""
        reached_N = norms_N > 0
        before = self._reached.get(names)
        self._reached[names] = reached_N if before is None else before | reached_N

    def remember_weights(self) -> None:
        """Take the weights of now as those that `look` compares with."""
        self._checksums_at_start = checksums(self.optimizer.parameters)

    def look(self) -> dict[str, Any]:
        """What the parameters have seen since this process began. Waits for the device.

        `effective_steps` counts updates with a rate above 0; `without_gradient` names parameters that never had a
        gradient other than zero; `unchanged` counts parameters whose bits are as `remember_weights` saw them.
        """
        reached = {
            name
            for names, flags_N in self._reached.items()
            for name, flag in zip(names, flags_N.tolist(), strict=True)
            if flag
        }
        without = [name for name in self.optimizer.parameters if name not in reached]
        now = checksums(self.optimizer.parameters)
        if self._checksums_at_start is None:
            raise RuntimeError("remember_weights comes before look")
        return {
            "effective_steps": self.effective_steps,
            "parameters": len(self.optimizer.parameters),
            "without_gradient": len(without),
            "without_gradient_names": without[:SHOWN_NAMES],
            "unchanged": int((now == self._checksums_at_start).sum()),
        }

    def _sum_in_fp32(self, name: str) -> Callable[[torch.Tensor], None]:
        """Several passes are summed in fp32 (bf16 sums lose small gradients); each gradient is freed once added."""

        def hook(parameter: torch.Tensor) -> None:
            if not self._is_summing or parameter.grad is None:
                return
            if name in self._sums:
                self._sums[name].add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None

        return hook

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Summed over ranks: of divided parameters, this rank's part (divided already while it was summed)."""
        plain = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        found = {**plain, **self._sums}
        # Ranks that saw other rows may lack other gradients; all of them must add the same ones in the same order.
        if self.ranks.are_several and found:
            for name, parameter in self.parameters.items():
                if not isinstance(parameter, DTensor):
                    held = found.get(name)
                    held = torch.zeros_like(parameter, dtype=torch.float32) if held is None else held.float()
                    found[name] = self.ranks.sum(held)
        return {name: own_part(gradient) for name, gradient in found.items()}

    def _norms(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        """Euclidean norm of each gradient; squares of divided ones are added over the ranks that hold parts."""
        norms_N = gradient_norms(gradients)
        mesh = next((p.device_mesh for p in self.parameters.values() if isinstance(p, DTensor)), None)
        if mesh is None:
            return norms_N
        is_part_N = torch.tensor([isinstance(self.parameters[name], DTensor) for name in gradients])
        is_part_N = is_part_N.to(norms_N.device, non_blocking=True)
        squares_N = norms_N.square() * is_part_N
        torch.distributed.all_reduce(squares_N, group=mesh.get_group(mesh.ndim - 1))
        return torch.where(is_part_N, squares_N.sqrt(), norms_N)

    def _forget_gradients(self) -> None:
        self._sums = {}
        for parameter in self.parameters.values():
            parameter.grad = None

    def _bad_step(self, record: StepRecord, micro_batches: Sequence[Batch]) -> StepRecord:
        self._forget_gradients()
        if math.isfinite(record.loss) and self.scale.overflowed():
            return StepRecord(**{**vars(record), "was_skipped": True})
        what = "loss" if not math.isfinite(record.loss) else "gradient norm"
        raise NonFiniteStep(
            f"the {what} is {record.loss if what == 'loss' else record.grad_norm}", rows_of(micro_batches)
        )

    def require_finite_weights(self, micro_batches: Sequence[Batch]) -> None:
        """Raises NonFiniteStep, naming the rows of the step just done, when the update left NaN or infinite weights:
        they must not get into a checkpoint, where the next loss would be the first to show them."""
        for name, parameter in self.optimizer.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteStep(
                    f"the update left non-finite weights in {name}", rows_of(micro_batches), was_applied=True
                )

    def state(self) -> dict[str, Any]:
        """Plain values that a checkpoint needs besides tensors."""
        return {"loss_scale": self.scale.value, "loss_scale_good_steps": self.scale.good_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.scale.value = float(state["loss_scale"])
        self.scale.good_steps = int(state["loss_scale_good_steps"])


def rows_of(micro_batches: Sequence[Batch]) -> list[int]:
    """Numbers of the rows of a step."""
    return sorted({number for batch in micro_batches for number in batch.row_numbers})


def gradient_norms(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of each gradient, summed in fp32 whatever its dtype."""
    return torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients.values()])


def checksums(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One number per parameter that changes when any of its bits does (but for sums that cancel)."""
    sums = []
    for parameter in parameters.values():
        flat = parameter.detach().reshape(-1)
        bits = flat.view(INTEGERS[flat.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums)


def nothing_learns() -> RunStopped:
    """The loss does not depend on any parameter that should learn."""
    return RunStopped(
        "the loss reaches no parameter that should learn: there is no gradient at all",
        expected="a gradient for every parameter that learns",
        fix="set model.activation_checkpointing: none; with adapters, look at lora.targets; then report this family",
        where="model",
    )
