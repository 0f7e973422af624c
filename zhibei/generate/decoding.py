"""Roads from tokens to the logits of the next ones: transformers' forward pass over slots, or one answer at a time.

Knows models and caches, no sampling. Dimensions: B rows, T tokens, C columns, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from zhibei.generate import fast
from zhibei.generate.cache import SlotCache, StepView
from zhibei.generate.captured import CapturedStep
from zhibei.generate.families import mask_kinds, takes_mask_by_layer
from zhibei.model.answering import cache_argument, going_on, plain_model
from zhibei.model.language_model import head_shape

# Growing a cache copies it and, on a GPU, makes captured steps useless; on a CPU unused columns cost time as well.
COLUMNS_AT_FIRST = {"cpu": 64, "cuda": 4096}

APART_PER_ROOT_LAYER, MOST_APART = 0.02, 0.05
"""Of the size of the logits: what rounding to 16 bits explains between two ways to compute them, with room. It grows
like the root of the number of layers: plain bf16 is 2.9 % from fp32 after 8 random layers of width 4096, 4.4 % after
16; a head or column that is wrong moves logits by half their size."""


class Road(Protocol):
    """How logits come to be. Rows that a step runs on are always the first ones."""

    name: str

    def prefill(self, prompts: Sequence[list[int]], slots: Sequence[int]) -> torch.Tensor:
        """Read whole prompts into these slots; fp32 logits [B, V] of the tokens that follow them."""
        ...

    def step(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, columns: int) -> torch.Tensor:
        """Read one token of each of the first B slots, at its position; fp32 logits [B, V] of what follows. `columns`
        is one more than the highest position."""
        ...

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        """The answer in one slot goes on in another."""
        ...

    def refresh(self, model: Any) -> bool:
        """Look at the model again, whose adapters may be others now; False when another road must be found."""
        ...


class AloneRoad:
    """Each answer with a cache of transformers of its own, one after the other: right for every family."""

    name = "alone"

    def __init__(self, model: Any, slots: int) -> None:
        self._model = model
        self._going_on = going_on(model)
        self._takes_positions = "position_ids" in inspect.signature(plain_model(model).forward).parameters
        self._caches: list[Any] = [None] * slots

    def prefill(self, prompts: Sequence[list[int]], slots: Sequence[int]) -> torch.Tensor:
        from transformers import DynamicCache

        device = self._model.get_input_embeddings().weight.device
        logits = []
        for prompt, slot in zip(prompts, slots, strict=True):
            self._caches[slot] = DynamicCache(config=plain_model(self._model).config)
            tokens_1T = torch.tensor([prompt], device=device)
            logits.append(self._read(tokens_1T, torch.arange(len(prompt), device=device)[None], slot))
        return torch.cat(logits)

    def step(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, columns: int) -> torch.Tensor:
        del columns
        pairs = zip(tokens_B.view(-1, 1, 1), positions_B.view(-1, 1, 1), strict=True)
        return torch.cat(
            [self._read(token_11, position_11, slot) for slot, (token_11, position_11) in enumerate(pairs)]
        )

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        del num_tokens
        self._caches[target], self._caches[source] = self._caches[source], None

    def refresh(self, model: Any) -> bool:
        self._model = model
        return True

    def _read(self, tokens_1T: torch.Tensor, positions_1T: torch.Tensor, slot: int) -> torch.Tensor:
        positions = {"position_ids": positions_1T} if self._takes_positions else {}
        output = self._model(input_ids=tokens_1T, **positions, **self._going_on(self._caches[slot]))
        return output.logits[:, -1].float()


class SlotRoad:
    """transformers' forward pass over the slots of one static cache, masks and positions given by us."""

    name = "slots"

    def __init__(self, model: Any, cache: SlotCache, kinds: Sequence[str], *, pad_id: int) -> None:
        self._inner = plain_model(model)
        self._body, self._head = self._inner.base_model, self._inner.get_output_embeddings()
        self._cache_argument = cache_argument(self._body)
        self._shape = head_shape(self._inner.config)
        self._cache, self._kinds, self._pad_id = cache, kinds, pad_id
        self._window = getattr(self._inner.config, "sliding_window", None)
        self._device = self._inner.get_input_embeddings().weight.device

    def prefill(self, prompts: Sequence[list[int]], slots: Sequence[int]) -> torch.Tensor:
        """Prompts of unequal length are padded on the right: nothing before the padding looks at it."""
        from transformers import DynamicCache

        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        padded = [prompt + [self._pad_id] * (longest - len(prompt)) for prompt in prompts]
        tokens_BT = torch.tensor(padded, device=self._device)
        positions_1T = torch.arange(longest, device=self._device)[None]
        read: Any = DynamicCache()
        output = self._body(
            input_ids=tokens_BT, position_ids=positions_1T, use_cache=True, **{self._cache_argument: read}
        )
        self._cache.reserve(longest)
        self._cache.write_prompts(slots, [(layer.keys, layer.values) for layer in read.layers])
        last_B = torch.tensor(lengths, device=self._device) - 1
        rows_B = torch.arange(len(prompts), device=self._device)
        return self.logits(output.last_hidden_state[rows_B, last_B])

    def step(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, columns: int) -> torch.Tensor:
        self._cache.reserve(columns)
        output = self._body(
            input_ids=tokens_B.unsqueeze(1),
            position_ids=positions_B.unsqueeze(1),
            attention_mask=self._masks(positions_B, columns),
            use_cache=True,
            **{self._cache_argument: StepView(self._cache, positions_B, columns=columns)},
        )
        return self.logits(output.last_hidden_state[:, 0])

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        self._cache.move(source, target, num_tokens=num_tokens)

    def refresh(self, model: Any) -> bool:
        return plain_model(model) is self._inner

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, as the model itself gives them."""
        logits_BV = self._head(hidden_BD).float() * self._shape.scale
        cap = self._shape.softcap
        return logits_BV if cap is None else cap * torch.tanh(logits_BV / cap)

    def _masks(self, positions_B: torch.Tensor, columns: int) -> Any:
        """What each row may look at: its own columns up to its position, and no further back than its window."""
        columns_C = torch.arange(columns, device=self._device)
        distance_BC = positions_B.unsqueeze(1) - columns_C
        masks = {}
        for kind in self._kinds:
            visible_BC = distance_BC >= 0
            if kind == "sliding_attention" and self._window is not None:
                visible_BC = visible_BC & (distance_BC < self._window)
            masks[kind] = self._as_given(visible_BC[:, None, None, :])
        return masks if takes_mask_by_layer(self._inner.config) else masks[self._kinds[0]]

    def _as_given(self, visible: torch.Tensor) -> torch.Tensor:
        """Plain attention adds its mask to the scores; the fused one takes truth values."""
        if self._inner.config._attn_implementation == "sdpa":
            return visible
        dtype = self._inner.get_input_embeddings().weight.dtype
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)


class FastRoad:
    """Our own step over the slots (generate/fast.py); prompts are read as on the road of slots.

    On a GPU, layers that read one input share their storage (model/joined.py), kernels of our own do what they can, and
    the whole step is one CUDA graph.
    """

    name = "fast"

    def __init__(self, slots: SlotRoad, cache: SlotCache, model: fast.Model, pieces: fast.Pieces, device: Any) -> None:
        self._slots, self._cache, self._model, self._pieces = slots, cache, model, pieces
        self._captured = None
        if device.type == "cuda":
            self._captured = CapturedStep(slots=cache.slots, device=device)
        self._moves = cache.moves

    def prefill(self, prompts: Sequence[list[int]], slots: Sequence[int]) -> torch.Tensor:
        return self._slots.prefill(prompts, slots)

    def step(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, columns: int) -> torch.Tensor:
        self._cache.reserve(columns)
        if self._captured is None:
            return self._compute(tokens_B, positions_B, columns)
        if self._moves != self._cache.moves:
            self._captured.forget()
            self._moves = self._cache.moves
        return self._captured(tokens_B, positions_B, compute=self._whole, prove=self._prove)

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        self._cache.move(source, target, num_tokens=num_tokens)

    def refresh(self, model: Any) -> bool:
        read = fast.read_model(model, joins=self._captured is not None)
        if read is None:
            return False
        if self._captured is not None and fast.places(read) != fast.places(self._model):
            self._captured.forget()
        self._model = read
        return True

    def _whole(self, tokens_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        return self._compute(tokens_B, positions_B, self._cache.columns)

    def _prove(self, tokens_B: torch.Tensor, positions_B: torch.Tensor) -> None:
        """Kernels are used once they have given, here and for so many rows, what plain arithmetic gives."""
        if self._pieces is fast.PLAIN:
            return
        kernels = self._pieces
        try:
            found_BV = self._whole(tokens_B, positions_B).clone()
            problem = ""
        except Exception as error:  # Triton raises many kinds, of its compiler, the driver and the system's compiler
            found_BV, problem = None, f"{type(error).__name__}: {error}"
        self._pieces = fast.PLAIN
        expected_BV = self._whole(tokens_B, positions_B)
        if found_BV is not None:
            apart = float((found_BV - expected_BV).norm() / expected_BV.norm().clamp(min=1e-6))
            most = max(MOST_APART, APART_PER_ROOT_LAYER * len(self._model.layers) ** 0.5)
            if apart <= most or not bool(expected_BV.isfinite().all()):
                self._pieces = kernels
                return
            problem = f"their logits are {apart:.3g} of the size of the logits away from plain arithmetic's"
        warnings.warn(
            f"the decode kernels are not used, answers come more slowly ({problem})", RuntimeWarning, stacklevel=2
        )

    def _compute(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, columns: int) -> torch.Tensor:
        layers = self._cache.layers()
        return self._slots.logits(fast.forward(self._model, self._pieces, layers, tokens_B, positions_B, columns))


def road_of(model: Any, *, slots: int, columns: int, pad_id: int) -> Road:
    """The fastest road that this model can take. The model must be set up to answer (`model.answering`)."""
    inner = plain_model(model)
    kinds = mask_kinds(inner.config)
    if kinds is None:
        return AloneRoad(model, slots)
    weight = inner.get_input_embeddings().weight
    is_cuda = weight.device.type == "cuda"
    cache = SlotCache(slots, columns, at_first=COLUMNS_AT_FIRST.get(weight.device.type, 64))
    slot_road = SlotRoad(model, cache, kinds, pad_id=pad_id)
    read = fast.read_model(model, joins=is_cuda)
    if read is None:
        return slot_road
    return FastRoad(slot_road, cache, read, _pieces_for(read, weight), weight.device)


def _pieces_for(model: fast.Model, weight: torch.Tensor) -> fast.Pieces:
    """Our kernels where they run: Triton, 16 bits, heads as wide as a block can be."""
    fits = weight.dtype in (torch.bfloat16, torch.float16) and model.head_width in (32, 64, 128, 256)
    if weight.device.type != "cuda" or not fits or find_spec("triton") is None:
        return fast.PLAIN
    from zhibei.generate.kernels import KERNELS

    return KERNELS


def context_tokens(model: Any) -> int | None:
    """How many tokens the model was made for (`max_position_embeddings`), or None when it states no limit."""
    return getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None)
