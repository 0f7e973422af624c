"""How large a quickstart is, and the run files of its stages. Knows settings, trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.pipeline.run_text import Settings
from zhibei.pipeline.stage import write_run_file
from zhibei.pipeline.world.files import WorldFiles, WorldSize
from zhibei.pipeline.world.preferences import PreferenceFiles

TEMPLATE = "mistral"
"""[INST] question [/INST] answer: the shortest of the common templates, so the least to read for a small model."""
LONGEST_ANSWER = 24
COURSE_POINTS = 4
"""How many checkpoints of PPO are kept, so that the true score can be measured along the way."""


@dataclass(frozen=True)
class Supervised:
    """Pre-training and fine-tuning."""

    pretrain_batch: int
    pretrain_rate: float
    sft_batch: int
    sft_rate: float
    lora_rate: float
    heldout_texts: int = 200


@dataclass(frozen=True)
class Preferred:
    """Preference pairs and the reward model. `asked` questions are answered `copies` times by the model itself."""

    asked: int
    copies: int
    slips: int
    batch: int
    rate: float
    heldout_pairs: int
    epochs: float = 1


@dataclass(frozen=True)
class Learned:
    """PPO: an iteration writes 2 * `batch` answers."""

    iterations: int
    batch: int
    rate: float
    lora_rate: float
    critic_rate: float
    kl_coefficient: float
    inner_epochs: int = 2
    heldout_prompts: int = 256
    least_accuracy: float = 0.55


@dataclass(frozen=True)
class Scale:
    """A world and how long a model learns in it. Rates and batches were found by trying (docs/quickstart.md)."""

    world: WorldSize
    supervised: Supervised
    preferred: Preferred
    learned: Learned


SCALES: dict[str, Scale] = {
    "standard": Scale(
        WorldSize(
            num_texts=16_000,
            num_conversations=14_400,
            most_turns=4,
            heldout_per_task=100,
            hidden=128,
            layers=2,
            heads=4,
        ),
        Supervised(pretrain_batch=16, pretrain_rate=1.5e-3, sft_batch=10, sft_rate=1.2e-3, lora_rate=5e-3),
        Preferred(asked=4_000, copies=3, slips=8_000, batch=32, rate=1e-3, heldout_pairs=600),
        Learned(iterations=10, batch=256, rate=1e-4, lora_rate=1e-3, critic_rate=1e-3, kl_coefficient=0.2),
    ),
    "tiny": Scale(
        WorldSize(
            num_texts=2_000,
            num_conversations=4_000,
            most_turns=2,
            heldout_per_task=20,
            hidden=64,
            layers=2,
            heads=4,
        ),
        Supervised(pretrain_batch=16, pretrain_rate=4e-3, sft_batch=16, sft_rate=4e-3, lora_rate=1e-2),
        Preferred(asked=200, copies=2, slips=600, batch=16, rate=1e-3, heldout_pairs=60),
        Learned(
            iterations=4,
            batch=16,
            rate=1e-4,
            lora_rate=1e-3,
            critic_rate=1e-3,
            kl_coefficient=0.05,
            heldout_prompts=32,
            # So little training need not beat guessing.
            least_accuracy=0.0,
        ),
    ),
}
"""`standard` is what the command does; `tiny` only shows that the road is whole (tests)."""


def pretrain_file(folder: Path, files: WorldFiles, *, scale: Scale, seed: int) -> Path:
    size = scale.supervised
    num_steps = scale.world.num_texts // size.pretrain_batch
    settings = _supervised(folder, "pretrain", scale, model={"path": str(files.untrained)}, seed=seed)
    settings["data"] |= {
        "sources": [str(files.texts)],
        "validation": size.heldout_texts,
        # Texts come in the order they were written: simple repetition first.
        "shuffle": False,
    }
    settings["sft"] |= {
        "global_batch": size.pretrain_batch,
        "learning_rate": size.pretrain_rate,
        "evaluate_every": max(1, num_steps // 4),
    }
    return write_run_file(folder / "pretrain.yaml", settings, about="A small LLaMA reads about a small world.")


def sft_file(folder: Path, files: WorldFiles, *, scale: Scale, seed: int, method: str) -> Path:
    size = scale.supervised
    num_steps = scale.world.num_conversations // size.sft_batch
    model = {"path": str(folder / "pretrain"), "method": method}
    settings = _supervised(folder, "sft", scale, model=model, seed=seed)
    settings["data"] |= {
        "sources": [str(files.conversations)],
        "validation": str(files.heldout),
        "group_by_length": True,
        # Conversations come in the order they were written: the last third is by a writer who hedges.
        "shuffle": False,
    }
    settings["sft"] |= {
        "global_batch": size.sft_batch,
        "learning_rate": size.sft_rate if method == "full" else size.lora_rate,
        "evaluate_every": max(1, num_steps // 4),
        "evaluate_rows": 300,
    }
    return write_run_file(folder / "sft.yaml", settings, about="The small LLaMA learns to answer instructions.")


def reward_file(folder: Path, files: PreferenceFiles, *, scale: Scale, seed: int) -> Path:
    size = scale.preferred
    settings: Settings = {
        **_named(folder, "reward", seed),
        "stage": "reward",
        "model": {"path": str(folder / "sft"), "method": "full"},
        "data": {
            **_worded(scale),
            "sources": [str(path) for path in files.pairs],
            "validation": size.heldout_pairs,
            "packing": False,
            "group_by_length": True,
            "workers": 0,
        },
        "reward": {
            "epochs": size.epochs,
            "global_batch": size.batch,
            "learning_rate": size.rate,
            # Scores around 0 for every question: what differs is then right and wrong, not easy and hard questions.
            "centring": 0.01,
            "evaluate_rows": size.heldout_pairs,
            **_paced(),
            "evaluate_every": 0,
            "micro_batch_tokens": 4096,
        },
        **_logged(5),
    }
    return write_run_file(folder / "reward.yaml", settings, about="A reward model learns which answers are right.")


def ppo_file(folder: Path, files: PreferenceFiles, *, scale: Scale, seed: int, method: str) -> Path:
    size = scale.learned
    every = max(1, size.iterations // COURSE_POINTS)
    model: dict[str, Any] = {"path": str(folder / "sft"), "method": method}
    settings: Settings = {**_named(folder, "ppo", seed), "stage": "ppo", "model": model}
    if method == "lora":
        model["path"] = str(folder / "pretrain")
        settings["lora"] = {"adapter": str(folder / "sft" / "model")}
    settings |= {
        "data": {
            "template": TEMPLATE,
            "max_tokens": scale.world.context_tokens - LONGEST_ANSWER,
            "sources": [str(files.prompts)],
            "validation": size.heldout_prompts,
        },
        "ppo": {
            "models": "separate" if method == "full" else "shared",
            "reward_model": str(folder / "reward"),
            "min_reward_accuracy": size.least_accuracy,
            "max_steps": size.iterations,
            "global_batch": size.batch,
            "inner_epochs": size.inner_epochs,
            "learning_rate": size.rate if method == "full" else size.lora_rate,
            "critic_learning_rate": size.critic_rate,
            "kl_coefficient": size.kl_coefficient,
            "critic_warmup_steps": min(2, size.iterations // 5),
            "max_new_tokens": LONGEST_ANSWER,
            "rollout_batch": 128,
            "sample_tokens": LONGEST_ANSWER,
            **_paced(),
            "evaluate_every": every,
            "evaluate_rows": size.heldout_prompts,
            "save_every": every,
            "keep_checkpoints": COURSE_POINTS + 1,
        },
        **_logged(1),
    }
    return write_run_file(folder / "ppo.yaml", settings, about="The policy learns from the reward model's scores.")


def _supervised(folder: Path, name: str, scale: Scale, *, model: dict[str, Any], seed: int) -> Settings:
    return {
        **_named(folder, name, seed),
        "model": model,
        "data": {**_worded(scale), "packing": False, "workers": 0},
        "sft": {"epochs": 1, "sample_tokens": LONGEST_ANSWER, **_paced()},
        **_logged(5),
    }


def _named(folder: Path, name: str, seed: int) -> Settings:
    return {"name": name, "runs": str(folder), "seed": seed}


def _worded(scale: Scale) -> dict[str, Any]:
    return {"template": TEMPLATE, "max_tokens": scale.world.context_tokens}


def _paced() -> dict[str, Any]:
    """What all stages do alike: Adam for short runs, a rate that falls to a twentieth, one model at the end."""
    return {"micro_batch_tokens": 8192, "beta2": 0.98, "min_lr_ratio": 0.05, "save_every": 0, "keep_best": False}


def _logged(every: int) -> Settings:
    return {"log": {"tensorboard": False, "every": every}}
