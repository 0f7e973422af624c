"""What a person wants merged or exported, found by its path: adapters with their base. Reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.export.adapters import Adapter, read_adapter_folder
from zhibei.model.locate import Located, locate
from zhibei.store.manifest import require_base
from zhibei.store.run_dir import RunDir
from zhibei.text.hub import hub_options


@dataclass(frozen=True)
class MergeSource:
    """Adapters (with their weights) on one base. `run` is that of the first adapter, where it has one."""

    base: Path
    adapters: tuple[Adapter, ...]
    located: Located

    @property
    def run(self) -> RunDir | None:
        return self.located.run


def weighted_path(text: str) -> tuple[str, float]:
    """`runs/a:0.7` is (runs/a, 0.7), `runs/a` is (runs/a, 1)."""
    path, colon, number = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return path, float(number)
        except ValueError:
            return text, 1.0
    return text, 1.0


def find_merge(paths: Sequence[str], *, base: str | None = None) -> MergeSource:
    """Adapters as a user names them (`runs/a`, `runs/a:0.7`, PEFT folders) and the base they share.

    Raises UserError when one is no adapter, when their bases differ, and when `base` is not what a run recorded.
    """
    found: list[tuple[Located, Adapter]] = []
    for text in paths:
        path, weight = weighted_path(text)
        located = locate(path, base=base)
        if located.adapter is None and not Path(located.weights).is_dir():
            raise UserError(
                f"there is no folder {path}",
                expected="a run of method lora or qlora, or a PEFT folder",
                fix="check the path",
                where="zhibei merge",
            )
        if located.adapter is None:
            raise UserError(
                f"{path} holds whole weights: there is nothing to merge",
                expected="a run of method lora or qlora, or a PEFT folder",
                fix=f"to hand it over in another form: zhibei export {path} --to hf (or gguf, meta, delta)",
                where="zhibei merge",
            )
        found.append((located, read_adapter_folder(located.adapter, weight=weight)))
    bases = {str(local_folder(located.weights)) for located, _ in found}
    if len(bases) > 1:
        raise UserError(
            f"these adapters belong to different bases: {', '.join(sorted(bases))}",
            expected="adapters on one base",
            fix="merge each into its own base; if the paths hold the same weights, name one with --base",
            where="zhibei merge",
        )
    folder = Path(bases.pop())
    for _, adapter in found:
        require_base(adapter.folder, folder)
        require_language_model(adapter)
    return MergeSource(folder, tuple(adapter for _, adapter in found), found[0][0])


def require_language_model(adapter: Adapter) -> None:
    """Raises UserError for the adapter of a reward model: what it adds is a head that gives scores."""
    if adapter.config.get("task_type") == "SEQ_CLS":
        raise UserError(
            "this is the adapter of a reward model",
            expected="the adapter of a language model",
            fix="use it as it is: reward.path and zhibei.judge(PATH) take the adapter",
            where=str(adapter.folder),
        )


def local_folder(weights: str) -> Path:
    """The folder of whole weights. A hub id stands for what was downloaded of it before; nothing is downloaded here."""
    folder = Path(weights)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        try:
            config = cached_file(weights, "config.json", **{**hub_options(weights), "local_files_only": True})
        except (OSError, ValueError):
            config = None
        folder = Path(config).parent if config else folder
    if not list(folder.glob("model*.safetensors")):
        raise UserError(
            f"the weights of {weights} are not on this machine"
            if not folder.is_dir()
            else "no model*.safetensors here",
            expected="a Hugging Face folder with config.json and model*.safetensors",
            fix=f"download it (hf download {weights} --local-dir DIR) and name it: --base DIR"
            if not folder.is_dir()
            else "pickled weights (.bin) are never opened: convert them to safetensors where you trust them",
            where=weights,
        )
    return folder
