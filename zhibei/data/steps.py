"""How many optimiser steps rows make, and whether they make one at all. Knows counts, not rows or tensors."""

from __future__ import annotations

from zhibei.config.errors import UserError


def total_rows_of(num_rows: int, *, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Rows seen in the whole run, each as often as it is seen."""
    return round(epochs * num_rows) if max_steps is None else max_steps * global_batch


def num_steps_of(num_rows: int, *, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps; the stream of rows runs over epoch borders, so only the last step may be short."""
    total_rows = total_rows_of(num_rows, global_batch=global_batch, epochs=epochs, max_steps=max_steps)
    return max(1, -(-total_rows // global_batch))


def require_steps(num_rows: int, longest: int, *, global_batch: int, micro_batch_tokens: int) -> None:
    """One whole step of rows, and a forward pass that takes the longest. Raises UserError."""
    if num_rows < global_batch:
        raise UserError(
            f"{num_rows} training rows are fewer than one optimiser step takes ({global_batch})",
            expected="at least one full step of rows",
            fix=f"set sft.global_batch: {max(1, num_rows // 4)}, lower data.validation, or add rows",
            where="sft.global_batch",
            pitfall="fewer-rows-than-a-batch",
        )
    if longest > micro_batch_tokens:
        raise UserError(
            f"the longest row has {longest} tokens, one forward pass takes {micro_batch_tokens}",
            expected="micro_batch_tokens at least as large as the longest row",
            fix=f"set sft.micro_batch_tokens: {longest} or more, or lower data.max_tokens",
            where="sft.micro_batch_tokens",
        )
