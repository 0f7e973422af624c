"""How much each input column of a model's matrices matters, from text of the user's: the importance matrix.

For a layer that reads x [tokens, width] the figure of column c is mean(x[:, c] ** 2): an error in a weight of that
column moves the output by that much. The file is llama.cpp's own (GGUF, keys `imatrix.*`): both read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.export.gguf.quantizer import import_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
FEWEST_TOKENS = 1000
"""Below this the figures are those of a few sentences."""


@dataclass(frozen=True)
class Importance:
    """Mean squares of each matrix's inputs, by llama.cpp's tensor name, and what they were taken from."""

    means: Mapping[str, np.ndarray]
    num_tokens: int
    num_rows: int
    source: str
    notes: tuple[str, ...] = ()

    def as_metadata(self) -> dict[str, Any]:
        """What a file that was written with it says about it, under llama.cpp's names."""
        return {
            "quantize.imatrix.dataset": self.source,
            "quantize.imatrix.entries_count": len(self.means),
            "quantize.imatrix.chunks_count": self.num_rows,
        }

    def require_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError when it was made from another model."""
        for name, mean in self.means.items():
            if name not in shapes or shapes[name][-1] != len(mean):
                has = f"rows of {shapes[name][-1]} values" if name in shapes else "no such tensor"
                raise UserError(
                    f"the importance matrix has {len(mean)} columns for {name}, and the model {has}",
                    expected="a matrix that was made from this model or one of the same shape",
                    fix="make it again from this model",
                    where=self.source,
                )

    def save(self, path: Path) -> None:
        """Write it as llama.cpp's imatrix file. Raises UserError when the name is taken."""
        if path.exists():
            raise UserError(
                "the file exists already",
                expected="a new name; nothing that exists is overwritten",
                fix="choose another name, or remove the file first",
                where=str(path),
            )
        writer = import_gguf().GGUFWriter(path, "imatrix")
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", [self.source])
        writer.add_uint32("imatrix.chunk_count", self.num_rows)
        writer.add_uint32("imatrix.chunk_size", max(1, self.num_tokens // max(1, self.num_rows)))
        for name, mean in self.means.items():
            sums = (mean.astype(np.float64) * self.num_tokens).astype(np.float32)
            writer.add_tensor(name + SUMS, sums.reshape(1, -1))
            writer.add_tensor(name + COUNTS, np.full((1, 1), self.num_tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_importance(path: Path) -> Importance:
    """An importance matrix from llama.cpp's or our file. Raises UserError when it is none."""
    reader_of = import_gguf().GGUFReader
    try:
        reader = reader_of(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: np.array(tensor.data, dtype=np.float32).reshape(-1) for tensor in reader.tensors}
    except Exception as problem:  # the reader raises whatever numpy and struct raise for a broken file
        raise UserError(
            f"not a readable GGUF file: {problem}",
            expected="an importance matrix as llama.cpp's llama-imatrix or zhibei writes it (GGUF)",
            fix="make it again; the older .dat form can be converted with llama-imatrix",
            where=str(path),
        ) from None
    sums = {name.removesuffix(SUMS): values for name, values in tensors.items() if name.endswith(SUMS)}
    if fields.get("general.type") != "imatrix" or not sums:
        raise UserError(
            "this GGUF file is no importance matrix",
            expected="general.type imatrix and tensors that end with .in_sum2",
            fix="name the imatrix file, not the model",
            where=str(path),
        )
    counts = {name: float(tensors[name + COUNTS].sum()) for name in sums}
    means = {name: values / max(1.0, counts[name]) for name, values in sums.items()}
    named = fields.get("imatrix.datasets") or [str(path)]
    return Importance(
        means=means,
        num_tokens=int(max(counts.values())),
        num_rows=int(fields.get("imatrix.chunk_count") or 0),
        source=", ".join(str(one) for one in (named if isinstance(named, list) else [named])),
    )


def measure_importance(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    source: str,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> Importance:
    """Run rows of token ids through a causal model of transformers and take the mean squares of what each matrix reads.

    Raises UserError when no row has a token, or when an activation is not finite.
    """
    import torch

    hf = getattr(model, "hf", model)
    layers = int(hf.config.num_hidden_layers)
    names = _linear_names(hf, layers)
    sums = {new: torch.zeros(module.in_features, dtype=torch.float64) for module, new in names}

    def listen(new: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums[new] += values.to(torch.float32).square().sum(dim=0).double().cpu()

        return hook

    num_tokens = 0
    handles = [module.register_forward_pre_hook(listen(new)) for module, new in names]
    device = next(hf.parameters()).device
    was_training = hf.training
    hf.eval()
    try:
        with torch.no_grad():
            for number, row in enumerate(rows, start=1):
                if row:
                    hf(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
                    num_tokens += len(row)
                progress("importance matrix", number, len(rows))
    finally:
        hf.train(was_training)
        for handle in handles:
            handle.remove()
    return _as_importance(sums, num_tokens, num_rows=len(rows), source=source)


def _as_importance(sums: Mapping[str, Any], num_tokens: int, *, num_rows: int, source: str) -> Importance:
    if not num_tokens:
        raise UserError(
            "no text to take an importance matrix from",
            expected=f"at least {FEWEST_TOKENS} tokens of text that is like what the model is for",
            fix="name the file the model was trained on",
            where=source,
        )
    means = {name: (values / num_tokens).numpy().astype(np.float32) for name, values in sums.items()}
    broken = [name for name, mean in means.items() if not np.isfinite(mean).all()]
    if broken:
        raise UserError(
            f"what {broken[0]} reads is NaN or infinite on this text",
            expected="finite activations",
            fix="zhibei verify tells whether the weights are finite; load the model in bf16 or fp32",
            where=source,
        )
    notes = ()
    if num_tokens < FEWEST_TOKENS:
        notes = (f"the importance matrix comes from {num_tokens} tokens only; {FEWEST_TOKENS} and more are advised",)
    return Importance(means=means, num_tokens=num_tokens, num_rows=num_rows, source=source, notes=notes)


def _linear_names(hf: Any, num_layers: int) -> list[tuple[Any, str]]:
    """Every linear layer inside of the blocks, with its name in llama.cpp; the head too where it is its own."""
    import torch

    gguf = import_gguf()
    kind = getattr(hf.config, "model_type", "")
    from zhibei.export.gguf.families import family_of

    family = family_of(hf.config.to_dict(), where=kind)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, num_layers)
    is_tied = bool(getattr(hf.config, "tie_word_embeddings", False))
    found = []
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) and not (name == "lm_head" and is_tied):
            new = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            if new is not None:
                found.append((module, new))
    return found
