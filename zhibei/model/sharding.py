"""One model divided among ranks with PyTorch's FSDP2. Knows modules and ranks, not losses or loops.

Decoder layers and the body are units of `fully_shard`; embedding and head are divided beside them, because losses read
the head's weight without running it, and because tied ones are one tensor. Gradients are sums over ranks: what a step's
loss is a mean of is divided once, by the step.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from zhibei.config.distributed import Sharding
from zhibei.config.errors import UserError
from zhibei.model.language_model import LanguageModel
from zhibei.model.quantized import described, put_described, quantised_layers
from zhibei.model.ranks import Place, Ranks, divide_after_looking, units_of, whole


def mesh_of(how: Sharding, ranks: Ranks, device: torch.device) -> DeviceMesh:
    """The ranks in a row; for `hybrid` nodes by ranks within a node: shards stay inside, copies lie across."""
    if how != "hybrid":
        return _mesh(device, {"shard": ranks.world})
    if ranks.world % ranks.per_node or ranks.world == ranks.per_node:
        raise UserError(
            f"hybrid sharding over {ranks.world} ranks, {ranks.per_node} of them on this node",
            expected="two or more nodes with equally many ranks",
            fix="set distributed.sharding: full_shard",
            where="distributed.sharding",
        )
    return _mesh(device, {"replicate": ranks.world // ranks.per_node, "shard": ranks.per_node})


def _mesh(device: torch.device, sizes: dict[str, int]) -> DeviceMesh:
    made = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    # torch's caches keep every mesh until the interpreter is taken down, and since 2.13 a mesh keeps its groups.
    atexit.register(getattr(made, "_pg_registry", {}).clear)
    return made


def shard(
    model: LanguageModel,
    how: Sharding | Literal["auto"],
    *,
    ranks: Ranks,
    device: torch.device,
    compute_dtype: torch.dtype,
    offload: bool = False,
) -> None:
    """Divide the model in place; `no_shard`, and `auto` of one process alone, leave every rank its whole copy.

    Parameters that learn become fp32 (they are their own masters); products run in `compute_dtype`. Rank 0's weights
    are what counts: the others' may lie on the meta device. `offload`: what a rank holds lies in host memory between
    uses. Raises UserError for adapters that hold whole modules (lora.modules_to_save).
    """
    if how in ("auto", "no_shard") or not ranks.are_several:
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    embedding: Any = model.inner.get_input_embeddings()
    _require_plain(embedding, model)
    model.learning_adapters = _learning_adapters(model)
    for parameter in model.hf.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _agree_on_packed_layers(model, ranks)
    held = {name: tensor.data for name, tensor in all_tensors(model.hf).items()} if ranks.is_first else {}
    is_tied = embedding.weight is model.head.weight
    model.hf.to("meta")
    mesh = mesh_of(how, ranks, device)
    beside = [embedding] if is_tied or not _is_own_head(model) else [embedding, model.head]
    divided = {parameter for module in beside for parameter in _divide(module, mesh)}
    if is_tied:
        model.head.weight = embedding.weight
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "reshard_after_forward": how != "shard_grad_op",
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for layer in model.layers():
        fully_shard(layer, **options)
    fully_shard(model.body, ignored_params=divided, **options)
    for unit in units_of(model.hf):
        # Sums, not means: the step divides, and gloo has no other reduction.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if how == "shard_grad_op":
        divide_after_looking(model.body)
    model.hf.to_empty(device="cpu" if offload else device)
    if is_tied:
        model.head.weight = embedding.weight
    fill(model, held, ranks=ranks, device=device)
    model.place = Place(device, compute_dtype, divides_after_forward=how != "shard_grad_op")
    embedding.forward = functools.partial(_embed, embedding, compute_dtype)
    if _is_own_head(model):
        model.head.forward = functools.partial(_project, model.head, compute_dtype)


def _learning_adapters(model: LanguageModel) -> tuple[str, ...]:
    """The adapters of whose parameters any requires gradients."""
    if model.hf is model.inner:
        return ()
    learning = model.trainable()
    return tuple(name for name in model.hf.peft_config if any(f".{name}." in parameter for parameter in learning))


def _agree_on_packed_layers(model: LanguageModel, ranks: Ranks) -> None:
    """Every rank has packed layers where rank 0 has them."""
    told = ranks.from_first(described(model.hf) if ranks.is_first else None)
    if not ranks.is_first:
        put_described(model.hf, told)
    for layer in quantised_layers(model.hf).values():
        layer.make_dividable()


def _is_own_head(model: LanguageModel) -> bool:
    """Whether the head is the language model's; a score head is small, and every rank keeps it whole."""
    return model.head is model.inner.get_output_embeddings()


def _require_plain(embedding: Any, model: LanguageModel) -> None:
    own = model.inner.get_output_embeddings()
    if type(embedding).__name__ == "ModulesToSaveWrapper" or type(own).__name__ == "ModulesToSaveWrapper":
        raise UserError(
            "lora.modules_to_save names embedding or head, and the model is divided among ranks",
            expected="adapters only, or whole copies on every rank",
            fix="set distributed.sharding: no_shard, or remove lora.modules_to_save",
            where="lora.modules_to_save",
        )


def _divide(module: Any, mesh: DeviceMesh) -> Iterator[torch.nn.Parameter]:
    """Make the parameters of a module (on the meta device) divided ones along their first dimension."""
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for name, parameter in list(module.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
        divided = torch.nn.Parameter(spread, requires_grad=parameter.requires_grad)
        module.register_parameter(name, divided)
        yield divided


def all_tensors(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once, in the order of the modules."""
    return {**dict(hf.named_parameters()), **dict(hf.named_buffers())}


def fill(model: LanguageModel, held: dict[str, torch.Tensor], *, ranks: Ranks, device: torch.device) -> None:
    """Give every rank its part of rank 0's tensors, one tensor at a time: no other rank ever holds the model."""
    with torch.no_grad():
        for name, tensor in all_tensors(model.hf).items():
            if ranks.is_first:
                sent = held.pop(name).to(device).contiguous()
            else:
                sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            ranks.same_as_first(sent)
            if isinstance(tensor, DTensor):
                start, stop = rows_held(tensor)
                tensor.to_local().copy_(sent[start:stop])
            else:
                tensor.copy_(sent)


def rows_held(divided: DTensor) -> tuple[int, int]:
    """First row and one past the last that this rank holds, as torch.chunk divides them."""
    mesh = divided.device_mesh
    size, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    chunk = -(-divided.shape[0] // size)
    start = min(index * chunk, divided.shape[0])
    return start, min(start + chunk, divided.shape[0])


def _embed(module: Any, dtype: torch.dtype, tokens_BT: torch.Tensor) -> torch.Tensor:
    # The row of the padding token learns nothing, as with whole weights.
    weight_VD = _beside(module, "weight", dtype)
    found = torch.nn.functional.embedding(tokens_BT, weight_VD, padding_idx=module.padding_idx)
    scale = getattr(module, "embed_scale", None)  # Gemma's embedding multiplies
    return found if scale is None else found * scale.to(found.dtype)


def _project(module: Any, dtype: torch.dtype, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, _beside(module, "weight", dtype), _beside(module, "bias", dtype))


def _beside(module: Any, name: str, dtype: torch.dtype) -> Any:
    """A parameter of embedding or head, put together now, or held whole already (`LanguageModel.gathered`)."""
    held = module.__dict__.get("held_whole", {}).get(name)
    parameter = getattr(module, name)
    return held if held is not None or parameter is None else whole(parameter, dtype)
