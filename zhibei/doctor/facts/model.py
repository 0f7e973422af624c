"""A model as its files describe it: config, tensor names and shapes, a scan for NaN. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.data.prepared_cache import cache_root
from zhibei.doctor.facts.embedding_rows import norms_of_rows
from zhibei.doctor.facts.generation_rules import generation_fault
from zhibei.doctor.facts.places import folder_of
from zhibei.doctor.facts.weight_scan import scan_weights
from zhibei.model.locate import locate
from zhibei.plan.shapes import ModelShape, read_shape
from zhibei.store.files import read_json
from zhibei.store.headers import read_header
from zhibei.store.manifest import model_fingerprint, read_manifest
from zhibei.store.model_folder import PICKLE_SUFFIXES, shape_problems
from zhibei.store.run_dir import RunDir
from zhibei.store.tensor_names import embedding_name, head_name, linear_names, main_dtype, module_names
from zhibei.store.weights import inspect_weight_files

ADAPTER_CONFIG = "adapter_config.json"
WILD_VALUE = 1e4
"""No weight of a trained language model is this large; fp16 itself ends at 65504."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`tensors` maps names to (dtype as safetensors writes it, shape); empty for a hub id that is not here yet."""

    path: str
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    generation_config_fault: str = ""
    """What transformers objects to when it validates generation_config.json; "" when it does not."""
    shape: ModelShape | None = None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    module_names: tuple[str, ...] = ()
    """Dotted names of all modules, from the tensor names or the meta model."""
    linear_names: tuple[str, ...] = ()
    """Dotted names of those that can carry an adapter."""
    missing_files: tuple[str, ...] = ()
    pickled_files: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()
    """Tensors in which NaN or infinity was seen."""
    scanned_share: float = 0.0
    """Share of the weight bytes that the scan read."""
    embedding_rows: int | None = None
    head_rows: int | None = None
    is_tied: bool = False
    dtype: str = ""
    """Dtype of most weights: float32, bfloat16, float16."""
    quant_method: str = ""
    """gptq, awq, bitsandbytes, ... when the weights are stored quantised."""
    row_norms: Mapping[int, float] = field(default_factory=dict)
    """Norms of the embedding rows of the special tokens that the template uses."""
    median_row_norm: float | None = None
    fingerprint: str | None = None
    parent_manifest: Mapping[str, Any] | None = None
    """The manifest of the run that the model came from."""
    adapter_folder: Path | None = None
    """Where model.path is an adapter: its folder. The other facts are then those of its base."""
    weight_faults: tuple[str, ...] = ()
    """What is wrong with weight files or their index (`file: truncated to 1,000 of 2,000 bytes`)."""
    shape_fault: str = ""
    """Why `shape` is not known."""
    shape_faults: tuple[str, ...] = ()
    """Where the tensors are not those that config.json promises."""
    zero_tensors: tuple[str, ...] = ()
    """Matrices in which nothing but zeros was seen."""
    wild_tensors: Mapping[str, float] = field(default_factory=dict)
    """Tensors with values beyond 10,000, and their largest."""
    num_bytes: int = 0
    """Bytes of all weight files."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A PEFT folder that the run continues from, or that model.path is."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    fault: str = ""
    """Why its weights cannot be read; "" when they can."""
    base_fingerprint: str | None = None
    zero_tensors: tuple[str, ...] = ()
    """lora_B tensors that are all zero, i.e. never trained."""
    num_bytes: int = 0
    manifest: Mapping[str, Any] | None = None
    """The manifest of the run that wrote it."""
    training_state: tuple[str, ...] = ()
    """Files of an optimiser, schedule or step counter that lie beside it: the folder is a checkpoint of a run."""


TRAINING_STATE = {"optimizer.pt", "optimizer.bin", "scheduler.pt", "trainer_state.json", "rng_state.pth", "files.json"}


def read_model(section: ModelSection, lora: LoraSection, *, cache: Path | None = None) -> ModelFacts:
    """The facts of `model.path`: config, heads of the weight files, a scan of the values, where it came from.

    Nothing is loaded into torch and no pickle is opened. A hub id that was never downloaded gives its name only.
    `cache` is where scans are remembered (default: zhibei's cache). `lora` is not needed by any fact yet.
    Raises UserError when nothing is at the path, or config.json is not JSON.
    """
    found = locate(section.path)
    folder = folder_of(found.weights, revision=section.revision)
    if folder is None:
        return ModelFacts(path=section.path)
    config = _settings(folder / "config.json") or {}
    stem = "model" if any(folder.glob("model*.safetensors*")) else None
    paths = sorted(folder.glob("model*.safetensors" if stem else "*.safetensors"))
    files = inspect_weight_files(folder, stem="model", is_finite_checked=False) if stem else None
    entries = files.entries if files else {}
    tensors = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    faults = tuple(f"{one.path}: {what}" for one in (files.files if files else ()) for what in one.problems)
    is_whole = bool(entries) and not faults
    scan = scan_weights(paths, cache=cache or cache_root(None))
    embedding, head = embedding_name(tensors), head_name(tensors)
    generation = _settings(folder / "generation_config.json")
    run = found.run.path if found.run is not None else folder.parent if folder.name == "model" else None
    shape, shape_fault = _shape_of(config, tensors)
    return ModelFacts(
        path=section.path,
        folder=folder,
        config=config,
        generation_config=generation,
        generation_config_fault=generation_fault(generation) if generation else "",
        shape=shape,
        shape_fault=shape_fault,
        tensors=tensors,
        module_names=module_names(tensors),
        linear_names=linear_names(tensors),
        missing_files=tuple(sorted(_missing(folder) - {path.name for path in paths})),
        pickled_files=tuple(sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)),
        non_finite=scan.non_finite,
        scanned_share=scan.share,
        embedding_rows=tensors[embedding][1][0] if embedding else _text(config).get("vocab_size"),
        head_rows=tensors[head][1][0] if head else None,
        is_tied=head is None if tensors else bool(_text(config).get("tie_word_embeddings")),
        dtype=main_dtype({name: entry.end - entry.start for name, entry in entries.items()}, tensors),
        quant_method=_quant_method(config),
        fingerprint=model_fingerprint(folder) if is_whole else None,
        parent_manifest=_manifest_of(run),
        adapter_folder=found.adapter,
        weight_faults=faults,
        shape_faults=tuple(shape_problems(config, entries)) if is_whole and config else (),
        zero_tensors=tuple(name for name in scan.zero if len(tensors.get(name, ("", ()))[1]) >= 2),
        wild_tensors={name: value for name, value in scan.largest.items() if WILD_VALUE < value < float("inf")},
        num_bytes=sum(path.stat().st_size for path in paths if path.is_file()),  # a link may lead nowhere
    )


def _settings(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"holds {type(content).__name__} instead of settings by name",
            expected="a JSON object",
            fix="copy the file again from the model's source",
            where=str(path),
        )
    return content


def _shape_of(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[ModelShape | None, str]:
    """The sizes, or why they are not known: an unknown family must not hide the other facts."""
    try:
        return read_shape(config, tensors or None), ""
    except UserError as fault:
        return None, fault.what


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Multi-modal configs keep the language model's part apart."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _missing(folder: Path) -> set[str]:
    """Weight files that the index names."""
    try:
        named = (_settings(folder / "model.safetensors.index.json") or {}).get("weight_map")
    except UserError:
        return set()  # the index itself is broken, which weight_faults says
    return set(map(str, named.values())) if isinstance(named, dict) else set()


def _quant_method(config: Mapping[str, Any]) -> str:
    found = config.get("quantization_config") or _text(config).get("quantization_config")
    if not isinstance(found, dict):
        return ""
    if found.get("quant_method"):
        return str(found["quant_method"])
    return "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else "unknown"


def _manifest_of(run: Path | None) -> dict[str, Any] | None:
    if run is None or not RunDir(run).manifest.is_file():
        return None
    return read_manifest(run)


def with_row_norms(model: ModelFacts, ids: Iterable[int]) -> ModelFacts:
    """The same facts with the norms of the embedding rows of `ids`, and the median norm of all rows."""
    name = embedding_name(model.tensors)
    if name is None or model.folder is None:
        return model
    for path in sorted(model.folder.glob("*.safetensors")):
        header = read_header(path)
        if name in header.entries:
            norms, median = norms_of_rows(path, header.entries[name], data_start=header.data_start, rows=set(ids))
            return replace(model, row_norms=norms, median_row_norm=median)
    return model


def read_adapter_facts(path: Path | str) -> AdapterFacts:
    """The facts of a PEFT folder, or of a run that holds one under `model/`. Unreadable weights are a `fault`.

    Raises UserError when there is no such folder or no adapter_config.json in it.
    """
    given = Path(path).expanduser()
    folder = given / "model" if (given / "model" / ADAPTER_CONFIG).is_file() else given
    config = _settings(folder / ADAPTER_CONFIG)
    if config is None:
        raise UserError(
            "no adapter_config.json here" if folder.is_dir() else "there is no such folder",
            expected="a PEFT folder: adapter_config.json and adapter_model.safetensors",
            fix="give the folder that training wrote (runs/<name>/model), not its parent or a checkpoint",
            where=str(given),
        )
    weights = sorted(folder.glob("adapter_model*.safetensors"))
    pickled = sorted(file.name for file in folder.glob("adapter_model*") if file.suffix in PICKLE_SUFFIXES)
    files = inspect_weight_files(folder, stem="adapter_model", is_finite_checked=False)
    problems = [f"{one.path.name}: {what}" for one in files.files for what in one.problems]
    if not weights:
        problems.append(f"only pickled weights ({pickled[0]})" if pickled else "no adapter_model.safetensors")
    scan = scan_weights(weights)
    problems += [f"tensor {name} holds NaN or infinity" for name in scan.non_finite]
    run = given if RunDir(given).manifest.is_file() else folder.parent
    manifest = _manifest_of(run)
    base = (manifest or {}).get("base")
    return AdapterFacts(
        path=folder,
        config=config,
        tensors={name: (entry.dtype, entry.shape) for name, entry in files.entries.items()},
        fault="; ".join(problems),
        base_fingerprint=base.get("fingerprint") if isinstance(base, dict) else None,
        zero_tensors=tuple(name for name in scan.zero if "lora_B" in name),
        num_bytes=sum(file.stat().st_size for file in weights),
        manifest=manifest,
        training_state=tuple(sorted(file.name for file in folder.iterdir() if file.name in TRAINING_STATE)),
    )
