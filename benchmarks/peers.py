"""TRL (with Liger) and Unsloth on the common workload, each through its public trainer. Knows nothing of zhibei.

Rivals are needed for these measurements only: pip install "trl==1.15.*" liger-kernel unsloth.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import Record, version_of
from benchmarks.timing import StepClock, count_tokens, trainer_clock
from benchmarks.workload import Workload, random_model, word_tokenizer

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class PeerSettings:
    """What is varied. `weights`: type of the trained weights (full) or the frozen base (LoRA); computed in bf16.

    `checkpointing`: none, full, or the rival's own name for its way (`unsloth`). `packing`: rows share a row of
    2,048 tokens, kept apart by whatever mask the rival builds.
    """

    method: str
    weights: str
    batch: int
    checkpointing: str
    liger: bool = False
    packing: bool = False
    rank: int = 16

    def describe(self, workload: Workload) -> Record:
        settings = {
            **workload.describe(),
            "weights": self.weights,
            "compute": "bf16",
            "micro_batch": f"{self.batch} rows",
            "checkpointing": self.checkpointing,
            "packing": self.packing,
            "optimizer": "adamw (fused)",
        }
        return {**settings, "rank": self.rank, "targets": "all-linear"} if self.method != "full" else settings


def trl(settings: PeerSettings, workload: Workload, *, steps: int, warmup: int) -> Record:
    """TRL's SFTTrainer, with Liger's kernels when asked for."""
    os.environ.update(QUIET)
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.weights]
    model = random_model(workload, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {}
    if settings.method == "lora":
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    figures = _train(model, word_tokenizer(workload.vocabulary), settings, workload, (steps, warmup), options)
    version = version_of("trl") + (f" + liger-kernel {version_of('liger-kernel')}" if settings.liger else "")
    return _record("TRL + Liger" if settings.liger else "TRL", version, settings, workload, figures)


def unsloth(settings: PeerSettings, workload: Workload, *, steps: int, warmup: int) -> Record:
    """Unsloth's patched trainer, as its notebooks show it. Loads from a folder, because it offers no other way."""
    os.environ.update(QUIET)
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled"))
    # It patches what is imported after it.
    from unsloth import FastLanguageModel  # isort: skip  # pyright: ignore[reportMissingImports]
    import torch

    folder = _model_folder(workload)
    checkpointing: Any = {"none": False, "full": True, "unsloth": "unsloth"}[settings.checkpointing]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=2048 if settings.packing else workload.max_tokens,
        dtype=torch.float32 if settings.weights == "fp32" else torch.bfloat16,
        load_in_4bit=settings.weights == "nf4",
        full_finetuning=settings.method == "full",
        use_gradient_checkpointing=checkpointing,
    )
    if settings.method != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=0,
            target_modules=ALL_LINEAR,
            use_gradient_checkpointing=checkpointing,
        )
    figures = _train(model, tokenizer, settings, workload, (steps, warmup), {})
    return _record("Unsloth", version_of("unsloth"), settings, workload, figures)


def _model_folder(workload: Workload) -> Path:
    """The random model in bf16 as a Hugging Face folder, written once per machine."""
    import torch

    folder = Path(tempfile.gettempdir()) / f"zhibei-bench-{workload.shape}-{workload.num_layers}"
    if not folder.exists():
        unfinished = folder.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random_model(workload, dtype=torch.bfloat16, device=device).save_pretrained(unfinished)
        word_tokenizer(workload.vocabulary).save_pretrained(unfinished)
        unfinished.rename(folder)
        if device == "cuda":
            torch.cuda.empty_cache()
    return folder


def _train(
    model: Any,
    tokenizer: Any,
    settings: PeerSettings,
    workload: Workload,
    num_steps: tuple[int, int],
    options: dict[str, Any],
) -> Record:
    """Figures of (timed, warm-up) steps with TRL's trainer, which Unsloth patches; `options` are the trainer's."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    steps, warmup = num_steps
    # Packing draws rows in its own order and needs spare ones to fill the last rows.
    rows = workload.rows((steps + warmup) * (2 if settings.packing else 1))
    per_step = max(1, workload.global_batch // settings.batch)
    if settings.packing:
        # As many tokens per step as the unpacked rows have: 2,048-token rows instead of rows.
        mean = sum(len(row) for row in rows) / len(rows)
        per_step = max(1, round(workload.global_batch * mean / (2048 * settings.batch)))
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="zhibei-bench-"),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=per_step,
        max_steps=steps + warmup,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=settings.checkpointing != "none",
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        use_liger_kernel=settings.liger,
        packing=settings.packing,
        max_length=2048 if settings.packing else workload.max_tokens,
        train_sampling_strategy="sequential",
        learning_rate=1e-5,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataset_num_proc=None,
    )
    clock = StepClock(warmup)
    callback = trainer_clock(clock)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in rows]}),
        processing_class=tokenizer,
        callbacks=[callback],
        **options,
    )
    count_tokens(trainer, callback)
    trainer.train()
    return {**clock.figures(workload, settings.method), "micro_batches": per_step}


def _record(who: str, version: str, settings: PeerSettings, workload: Workload, figures: Record) -> Record:
    described = settings.describe(workload)
    return {
        "benchmark": "sft",
        "who": who,
        "version": version,
        "method": settings.method,
        "settings": described,
        **figures,
    }
