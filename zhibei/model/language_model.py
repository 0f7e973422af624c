"""A decoder model as training sees it: a body that gives hidden states and a head. Knows batches, not loops or files.

Dimensions: B sequences, T tokens, N = B * T, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from zhibei.config.errors import UserError
from zhibei.model import attention
from zhibei.model.answering import answering, plain_model
from zhibei.model.quantized import quantised_layers
from zhibei.model.ranks import Place, current, held_whole, whole

GATHER_MARGIN = 1.2
"""Room for all layers at once, and for what sampling itself takes, as a multiple of the layers."""


class BatchLike(Protocol):
    """What the body needs of a batch (data.batches.Batch has it)."""

    # Properties, because a batch is frozen: plain attributes of a Protocol ask for ones that can be set.
    @property
    def tokens_BT(self) -> torch.Tensor: ...
    @property
    def positions_BT(self) -> torch.Tensor: ...
    @property
    def mask_BT(self) -> torch.Tensor | None: ...
    @property
    def borders(self) -> torch.Tensor | None: ...
    @property
    def row_lengths(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class HeadShape:
    """How raw head outputs become logits: `scale * x`, then `softcap * tanh(x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


class LanguageModel:
    """The border object around a transformers (and PEFT) model.

    `hf` is the outermost module (a PeftModel when adapters are present), `inner` the transformers model. `head` is
    the model's own unless another is given (the score head of a reward model).
    """

    def __init__(
        self, hf: Any, *, attention_name: str, longest_row: int, neftune_alpha: float = 0.0, head: Any = None
    ) -> None:
        self.hf = hf
        self.inner = plain_model(hf)
        self.body = self.inner.base_model
        self.head = self.inner.get_output_embeddings() if head is None else head
        if self.head is None:
            raise UserError(
                f"{type(self.inner).__name__} has no language-model head",
                expected="a causal language model",
                fix="point model.path at a decoder model such as LLaMA, Mistral, Qwen, Gemma or Phi",
                where="model.path",
            )
        self.head_shape = head_shape(self.inner.config)
        self.attention_name = attention_name
        self.longest_row = longest_row
        self.neftune_alpha = neftune_alpha
        self.place: Place | None = None
        """Set when the model is divided among ranks."""
        self.learning_adapters: tuple[str, ...] = ()
        """Of a divided model: the adapters that learn, by turns perhaps. FSDP asks once what requires gradients."""

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def device(self) -> torch.device:
        return self.head.weight.device if self.place is None else self.place.device

    @property
    def dtype(self) -> torch.dtype:
        """What the body computes in; a score head is fp32 whatever that is."""
        if self.place is not None:
            return self.place.dtype
        return self.inner.get_input_embeddings().weight.dtype

    @property
    def head_weight_VD(self) -> torch.Tensor:
        """The head's weight in what the body computes in; of a divided model put together from all ranks."""
        return self.head.weight if self.place is None else whole(self.head.weight, self.place.dtype)

    @property
    def head_bias_V(self) -> torch.Tensor | None:
        """The head's bias, likewise."""
        bias = self.head.bias
        return bias if self.place is None or bias is None else whole(bias, self.place.dtype)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that learn, by the name they have in `hf`; tied ones appear once."""
        found = {name: parameter for name, parameter in self.hf.named_parameters() if parameter.requires_grad}
        if not self.learning_adapters:
            return found
        return {name: parameter for name, parameter in found.items() if f".{self.hf.active_adapter}." in name}

    def activate(self, adapter: str) -> None:
        """Make one adapter the active one: what learns is what is in use."""
        if self.hf is not self.inner and self.hf.active_adapter != adapter:
            self.hf.set_adapter(adapter)
            self._keep_learning()

    def _keep_learning(self) -> None:
        """PEFT lets nothing but the active adapter require gradients; a divided model must stay as FSDP met it."""
        if not self.learning_adapters:
            return
        for name, parameter in self.hf.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(any(f".{adapter}." in name for adapter in self.learning_adapters))

    def num_parameters(self) -> tuple[int, int]:
        """(trainable, all); a packed matrix counts by its size, not by the bytes it lies in."""
        packed = sum(layer.in_features * layer.out_features for layer in quantised_layers(self.hf).values())
        everything = packed + sum(parameter.numel() for parameter in self.hf.parameters())
        return sum(parameter.numel() for parameter in self.trainable().values()), everything

    def hidden(self, batch: BatchLike) -> torch.Tensor:
        """Hidden states [N, D] of a batch, after the final norm."""
        inputs: dict[str, Any] = {"input_ids": batch.tokens_BT}
        if self.neftune_alpha and self.hf.training:
            inputs = {"inputs_embeds": self._noisy_embeddings(batch)}
        if batch.borders is None:
            inputs["attention_mask"] = batch.mask_BT
        elif self.attention_name == attention.VARLEN:
            inputs["borders"], inputs["longest"] = batch.borders, self.longest_row
        else:
            inputs["rows"] = attention.RowLengths(batch.row_lengths)
        output = self.body(position_ids=batch.positions_BT, use_cache=False, **inputs)
        return output.last_hidden_state.flatten(0, 1)

    def _noisy_embeddings(self, batch: BatchLike) -> torch.Tensor:
        """NEFTune (arXiv:2310.05914, alg. 1): uniform noise of size alpha / sqrt(L D), L the row length."""
        embeddings_BTD = self.inner.get_input_embeddings()(batch.tokens_BT)
        if batch.borders is None:
            lengths_BT = torch.tensor(batch.row_lengths, device=embeddings_BTD.device)[:, None].expand(
                batch.tokens_BT.shape
            )
        else:
            lengths_R = torch.tensor(batch.row_lengths, device=embeddings_BTD.device)
            lengths_BT = lengths_R.repeat_interleave(lengths_R)[None]
        size_BT = self.neftune_alpha / (lengths_BT * embeddings_BTD.shape[-1]).sqrt()
        noise_BTD = torch.empty_like(embeddings_BTD).uniform_(-1, 1)
        return embeddings_BTD + noise_BTD * size_BT[..., None].to(embeddings_BTD.dtype)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] in fp32, as the model itself would give them. For short inputs: nothing is chunked here."""
        raw_NV = torch.nn.functional.linear(hidden_ND, self.head_weight_VD, self.head_bias_V).float()
        shaped_NV = raw_NV * self.head_shape.scale
        cap = self.head_shape.softcap
        return shaped_NV if cap is None else cap * torch.tanh(shaped_NV / cap)

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The transformers model set up for generation: evaluation mode, its own attention, no compiled layers."""
        with answering(self.hf), self.gathered():
            yield self.hf

    @contextmanager
    def gathered(self, *, layer_by_layer: bool = False) -> Iterator[None]:
        """A divided model whole on every rank, for the many small passes of sampling: they need no other rank then, so
        that each may take as many as its answers do. `layer_by_layer` puts only embedding and head together: all ranks
        must then sample the same."""
        if self.place is None:
            yield
            return
        # In one order on every rank: each of them is a message among all.
        beside = [self.inner.get_input_embeddings(), self.head]
        with torch.no_grad():
            for module in beside:
                named = module.named_parameters(recurse=False)
                module.held_whole = {name: whole(parameter, self.place.dtype) for name, parameter in named}
        try:
            layers = held_whole(self.hf, divides_after_forward=self.place.divides_after_forward)
            with nullcontext() if layer_by_layer else layers:
                yield
        finally:
            for module in beside:
                del module.held_whole

    def has_room_to_gather(self) -> bool:
        """Whether all layers at once fit on every rank's GPU beside what lies there; every rank must ask."""
        if self.place is None or self.place.device.type != "cuda":
            return True
        device, ranks = self.place.device, current()
        gathered = [parameter for parameter in self.hf.parameters() if isinstance(parameter, DTensor)]
        sizes = [p.element_size() if not p.is_floating_point() else self.place.dtype.itemsize for p in gathered]
        needed = sum(size * parameter.numel() for size, parameter in zip(sizes, gathered, strict=True))
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fits = torch.cuda.mem_get_info(device)[0] + unused > GATHER_MARGIN * needed
        return ranks.sum_on_host(float(fits))[0] == ranks.world

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model: adapters off. Raises UserError when there are none to switch off."""
        if self.hf is self.inner:
            raise UserError(
                "the base model was asked for beside a fully trained one",
                expected="adapters, which can be switched off",
                fix="load the base model from its own path",
            )
        with self.hf.disable_adapter():
            self._keep_learning()
            yield
        self._keep_learning()

    def layers(self) -> list[torch.nn.Module]:
        """The decoder layers, found by what transformers marks as checkpointable."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.body.modules() if isinstance(module, GradientCheckpointingLayer)]


def head_shape(config: Any) -> HeadShape:
    """Scale and soft cap of the logits by the names families give them in config.json."""
    values = config.to_dict()
    scale = float(values.get("logit_scale") or 1.0)
    if values.get("logits_scaling"):
        scale /= float(values["logits_scaling"])
    return HeadShape(scale=scale, softcap=values.get("final_logit_softcapping"))


def check_head(model: LanguageModel) -> None:
    """Body and head must give the model's own logits; a family with another output shape is refused, not mistrained."""
    tokens_BT = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    with model.sampling(), torch.no_grad():
        theirs = model.inner(input_ids=tokens_BT, use_cache=False).logits[0].float()
        ours = model.logits(model.body(input_ids=tokens_BT, use_cache=False).last_hidden_state[0])
    difference = (theirs - ours).abs().max().item()
    size, rounding = max(1.0, theirs.abs().max().item()), 1e-3
    if model.dtype != torch.float32:
        # The family rounds its logits, and soft-capped ones on the way too, where `logits` computes in fp32.
        size, rounding = max(size, model.head_shape.softcap or 0.0), torch.finfo(model.dtype).eps
    if not difference <= rounding * size:
        raise UserError(
            f"{type(model.inner).__name__}: logits of body and head differ from the model's own by {difference:.3g}",
            expected="a family whose logits are a linear head, optionally scaled and soft-capped",
            fix="use a LLaMA, Mistral, Qwen, Gemma or Phi model, or report this family",
            where="model.path",
        )
