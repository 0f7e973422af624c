"""The run file: every section, field, unit and reason. Knows no file reading and no stage.

The string under a field is its documentation: `docs/run-file.md` and `zhibei config --explain` are made from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from zhibei.config.distributed import DistributedSection
from zhibei.config.effects import misfits_of
from zhibei.config.hand_over import Form
from zhibei.config.policy import GrpoSection, PpoSection, RaftSection
from zhibei.config.preference import DpoSection, RewardSection
from zhibei.config.rules import PartsDoNotFit
from zhibei.config.training import AnsweringSection, Fraction, Positive, Section, TrainingSection


class ModelSection(Section):
    """Which model, and how it is held in memory."""

    path: str
    """A Hugging Face folder, a run directory of zhibei, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of another tokenizer; by default the model's own."""
    method: Literal["full", "lora", "qlora"] = "full"
    """What is trained: all weights, adapters on frozen weights, or adapters on a base in few bits."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """How a frozen base is held: `int8` (a byte per weight, as LLM.int8 rounds it; activations are not rounded) or
    `nf4` (half a byte, double quantisation). `method: qlora` means nf4 unless int8 is named. Needs bitsandbytes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward. auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU.
    With bf16 and fp16, full training keeps fp32 master weights."""
    attention: Literal["auto", "varlen", "documents", "sdpa", "eager"] = "auto"
    """`varlen`: one kernel over packed rows (CUDA). `documents`: exact attention row by row (any device).
    `sdpa` and `eager` are for unpacked batches. auto picks the fastest exact one."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute activations in the backward pass instead of keeping them. selective: only what is cheap (norms,
    rotations, gates; about 30 % less memory, hardly slower). full: whole layers (least memory, a third more work).
    auto: the fastest that fits on the GPU (`zhibei plan` shows it); none on a CPU."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile each decoder layer. auto: on CUDA with a C compiler, off on a CPU."""
    rope_scaling_factor: Annotated[float, Field(gt=1)] | None = None
    """Linear scaling of rotary positions, for rows longer than the model was trained on (Vicuna's trick)."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you know the source."""

    @property
    def held_as(self) -> Literal["none", "int8", "nf4"]:
        """How the base is held: `method: qlora` alone means nf4."""
        return "nf4" if self.method == "qlora" and self.quantize == "none" else self.quantize


class LoraSection(Section):
    """Low-rank adapters (arXiv:2106.09685), held by PEFT. Read only when model.method is lora or qlora."""

    rank: Positive = 16
    """Inner dimension r of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get an adapter; each name must match at least one layer."""
    rslora: bool = False
    """Rank-stabilised scale alpha / sqrt(rank) (arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353)."""
    modules_to_save: list[str] = []
    """Layers trained in full beside the adapters, e.g. [embed_tokens, lm_head] after adding tokens."""
    adapter: str | None = None
    """A PEFT folder, or a run that wrote one, to continue from; its own rank and targets are then used."""


class Source(Section):
    """One file, folder, glob or hub data set of the mixture."""

    path: str
    """A JSON, JSONL (also .gz), Parquet, CSV or text file, a folder or glob of them, or a hub id."""
    format: str = "auto"
    """Name of the reader; auto recognises it from the fields. `zhibei data formats` lists them."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row of this source is seen per epoch: 2 repeats it, 0.5 takes half of it (chosen by hash)."""
    limit: Positive | None = None
    """Use only the first so many records."""
    columns: dict[str, str] = {}
    """Renames fields before reading: {our name: name in the file}."""


class DataSection(Section):
    """Which rows, how they become tokens, and which tokens are learned."""

    sources: Annotated[list[Source | str], Field(min_length=1)]
    """The mixture. A bare string is a source with default settings."""
    template: str = "auto"
    """Name of a template (`zhibei data templates`), or auto: the tokenizer's own chat template, else alpaca."""
    system: str | None = None
    """System prompt for conversations that have none; by default the template's own."""
    max_tokens: Positive = 1024
    """Longest row, in tokens."""
    too_long: Literal["drop", "cut", "stop"] = "drop"
    """Rows over max_tokens: dropped into the ledger, cut at the end (the answer loses its terminator), or an error.
    Plain text is always split into chunks."""
    supervise: Literal["answers", "last_answer", "turns", "everything"] = "answers"
    """Which tokens are learned: all answers, only the last one, what every speaker said, or all tokens
    (`everything` is Alpaca-LoRA's train_on_inputs). The terminator of a learned answer is always learned."""
    on_error: Literal["stop", "drop"] = "stop"
    """A broken record stops the run with its place and remedy, or is dropped into the ledger."""
    special_tokens_in_text: Literal["drop", "stop", "keep"] = "drop"
    """Rows whose text spells a special token such as </s>, which the tokenizer would read as the real one."""
    validation: Fraction | Annotated[int, Field(ge=2)] | str = 0.02
    """Held-out rows: a fraction, a number of rows, or a file. Split by content hash, so equal rows stay together."""
    packing: bool = True
    """Rows share a micro-batch without padding and without seeing one another. Off: padded to the longest."""
    group_by_length: bool = False
    """Unpacked only: rows of similar length share a micro-batch (less padding, less random)."""
    shuffle: bool = True
    """A new order each epoch, a pure function of seed and epoch."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that prepare rows; by default one per core."""
    cache: str | None = None
    """Where prepared rows are kept; by default ~/.cache/zhibei (or ZHIBEI_CACHE)."""


class SftSection(AnsweringSection):
    """Supervised fine-tuning and continued pre-training."""

    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the embeddings in training (arXiv:2310.05914); 5 is common, 0 off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (log Z)^2, which keeps logits from drifting; 1e-4 is common, 0 off."""


class LogSection(Section):
    """Where the figures of a run go. metrics.jsonl is always written."""

    every: Positive = 1
    """Steps between logged records."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb: str | None = None
    """Project name for Weights & Biases (pip install wandb); off by default."""


Answer = Literal["off", "warn", "save", "stop"]
PolicyAnswer = Literal["off", "warn", "save", "roll_back", "stop"]


class WatchSection(Section):
    """What is done when a run goes wrong on the way. off: not looked at. warn: said and recorded. save: also a
    checkpoint at once. stop: a checkpoint if the weights are still worth one, then exit code 3 with the evidence.
    Loss, gradients or weights that are not finite always stop."""

    exploding_loss: Answer = "stop"
    """The training loss stays far above the lowest level it had reached."""
    pinned_loss: Answer = "stop"
    """The training loss stays at ln(vocabulary), the loss of guessing."""
    dead_gradient: Answer = "stop"
    """A parameter that should learn has had no gradient, or a gradient of exactly zero, in every step so far."""
    unchanged_weights: Answer = "stop"
    """Steps were taken and not one weight is different."""
    skipped_steps: Answer = "stop"
    """fp16: more than 8 steps in a row, or more than 5 % of all, were skipped because gradients overflowed."""
    heldout_diverging: Answer = "warn"
    """The held-out loss rises from evaluation to evaluation while the training loss falls, or is far above its best."""
    loss_spike: Answer = "warn"
    """One step with a loss and a gradient far outside of what the last hundred steps had."""
    stalled_data: Answer = "warn"
    """More time goes into waiting for rows than into steps."""
    memory_growth: Answer = "warn"
    """Memory of the GPU or of the process grows steadily."""
    slow_rank: Answer = "warn"
    """One rank is much slower than the others, so all wait for it."""
    disk_filling: Answer = "warn"
    """The disk has no room for the next checkpoint and the finished model."""
    length_hacking: PolicyAnswer = "warn"
    """ppo, grpo and raft: answers grow longer and longer, and longer ones get more reward. roll_back: policy and critic
    become those of the last checkpoint before that, and go on with new prompts, half the learning rate and (ppo) twice
    the weight of the KL; the fourth time the run stops."""
    policy_drift: PolicyAnswer = "warn"
    """ppo, grpo and raft: the KL to the reference is above 1 nat per token, or negative."""
    repetition: PolicyAnswer = "warn"
    """ppo, grpo and raft: half of what answers say they have said before."""
    endless_answers: PolicyAnswer = "warn"
    """ppo, grpo and raft: answers used to end by themselves, and now nearly all are cut off."""
    no_signal: PolicyAnswer = "warn"
    """ppo, grpo and raft: all answers of some iterations had the same reward."""


class RunFile(Section):
    """One file for the whole path; each stage reads its own section."""

    name: str
    """The run writes into <runs>/<name>/."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of row order, dropout, adapters and samples."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1."""
    stage: Literal["sft", "reward", "dpo", "ppo", "grpo", "raft"] = "sft"
    """What this run does; the section of the same name says how, and the sections of the others must be absent."""
    rehearse: Literal["auto", "always", "never"] = "auto"
    """Two real steps, a save and a reload before the run (`zhibei rehearse`). auto: on a GPU."""
    accept: list[str] = []
    """Findings of `zhibei check` that are known and wanted, by the ids it prints; they no longer stop the run."""
    hand_over: list[Form] = []
    """What is made of the finished model, each proved to be the same model (docs/hand-over.md): merged (of adapters),
    hf, delta, meta (meta:2 in two files), gguf:Q8_0 and other types. What can be refused is refused before training;
    a form that fails afterwards leaves the run as it is, and `zhibei resume` tries it again."""
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    sft: SftSection = SftSection()
    reward: RewardSection = RewardSection()
    dpo: DpoSection = DpoSection()
    ppo: PpoSection = PpoSection()
    grpo: GrpoSection = GrpoSection()
    raft: RaftSection = RaftSection()
    distributed: DistributedSection = DistributedSection()
    log: LogSection = LogSection()
    watch: WatchSection = WatchSection()

    @property
    def training(self) -> TrainingSection:
        """The section of this run's stage."""
        return getattr(self, self.stage)

    @model_validator(mode="after")
    def _parts_fit(self) -> RunFile:
        if misfits := misfits_of(self):
            raise PartsDoNotFit(misfits)
        return self
