"""Models from disk to names that clients can choose: weights are loaded once, adapters on them share them.

Knows what lies at a path; no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from zhibei.config.errors import UserError
from zhibei.generate.decoding import context_tokens
from zhibei.model.answering import plain_model
from zhibei.model.load import QuantizeKind
from zhibei.model.lora import read_adapter_beside
from zhibei.plan.rollout_cache import cache_bytes
from zhibei.plan.shapes import read_shape
from zhibei.serve.chat import Speaker, Wording, open_speaker, wording_of
from zhibei.serve.hosted import Hosted
from zhibei.serve.in_turns import InTurns
from zhibei.serve.settings import ServerSettings
from zhibei.serve.worker import Lane, Worker
from zhibei.store.pipeline_dir import final_run
from zhibei.store.run_dir import RunDir

ROWS_OF_TRIAL = 8
"""Answers side by side while it is measured how many threads are best."""
FIRST_ADAPTER = "default"
"""PEFT's name of the adapter that a model is loaded with."""


@dataclass(frozen=True)
class Wanted:
    """One model to serve: the name clients use, and where it lies. `is_adapter` insists that it is one."""

    name: str
    path: str
    is_adapter: bool = False


def read_wanted(paths: Sequence[str], adapters: Sequence[str]) -> list[Wanted]:
    """`PATH` or `NAME=PATH` as typed. Raises UserError for names that come twice."""
    wanted = [_named(text, is_adapter=False) for text in paths] + [_named(text, is_adapter=True) for text in adapters]
    for one in wanted:
        same = [other.path for other in wanted if other.name == one.name]
        if len(same) > 1:
            raise UserError(
                f"{' and '.join(same)} would both be called {one.name}",
                expected="a name of its own for each model",
                fix=f"name them: {one.name}-1={same[0]} {one.name}-2={same[1]}",
                where="serve",
            )
    return wanted


def _named(text: str, *, is_adapter: bool) -> Wanted:
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name:
        return Wanted(name, path, is_adapter)
    if is_adapter:
        raise UserError(
            f"--adapter {text}", expected="NAME=PATH", fix=f"write --adapter NAME={text}", where="--adapter"
        )
    return Wanted(Path(text.rstrip("/")).name or text, text)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How weights are brought into memory; as for `open_speaker`."""

    base: str | None = None
    device: str = "auto"
    precision: str = "auto"
    quantize: QuantizeKind = "none"
    engine: Literal["ours", "vllm"] = "ours"
    template: str | None = None
    """For models that name none of their own: one asked with another's template would look broken."""

    def for_speaker(self, template: str | None) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "engine"}
        return {**kept, "template": template}

    def template_of(self, one: Wanted) -> str | None:
        """The template to ask for; None where the model brings its own. Raises UserError as `open_speaker`."""
        try:
            wording_of(one.path, base=self.base)
        except UserError as error:
            if "names no template" not in error.what or self.template is None:
                raise
            return self.template
        return None


def open_all(
    wanted: Sequence[Wanted], settings: ServerSettings, loading: Loading, *, watch: Callable[[str], None]
) -> dict[str, Hosted]:
    """Load every model and start its worker; those on the same base share one. `watch` hears what is being loaded.

    Raises UserError for what cannot be loaded, and for an adapter whose base is not served.
    """
    files = [one for one in wanted if _is_gguf(one.path)]
    groups = _by_weights([one for one in wanted if not _is_gguf(one.path)], loading)
    hosted: dict[str, Hosted] = {}
    for weights, members in groups.items():
        names = [member.wanted.name for member in members]
        watch(f"loading {weights}" + (f" for {', '.join(names)}" if len(names) > 1 else ""))
        hosted.update(_OPENERS[loading.engine](members, settings, loading))
    for one in files:
        watch(f"loading {one.path}")
        hosted[one.name] = _open_gguf(one, settings, loading)
    threads = [one.threads for one in hosted.values() if one.threads is not None]
    if threads:
        torch.set_num_threads(max(threads))
    return {one.name: hosted[one.name] for one in wanted}


def _is_gguf(path: str) -> bool:
    return path.endswith(".gguf")


def _slower(one: Wanted, wording: Wording, *, is_alone: bool) -> tuple[str, ...]:
    """An adapter beside its base costs two more products a layer; alone on its base, it need not."""
    if wording.found.adapter is None or not is_alone:
        return ()
    return (f"its adapter is kept apart from the base, which takes longer than one model: zhibei merge {one.path}",)


class _Member(NamedTuple):
    wanted: Wanted
    wording: Wording


def _by_weights(wanted: Sequence[Wanted], loading: Loading) -> dict[str, list[_Member]]:
    """Every path is read before any weights are loaded: a wrong last one should not cost the time of the others."""
    groups: dict[str, list[_Member]] = {}
    for one in wanted:
        wording = wording_of(one.path, base=loading.base, template=loading.template_of(one))
        if one.is_adapter and wording.found.adapter is None:
            raise UserError(
                f"{one.path} is a whole model",
                expected="an adapter folder, or a run that trained one",
                fix=f"serve it as a model of its own: {one.name}={one.path}",
                where="--adapter",
            )
        if one.is_adapter and wording.found.weights not in groups:
            raise UserError(
                f"the adapter {one.path} belongs to {wording.found.weights}, which is not served",
                expected=f"an adapter on one of: {', '.join(groups) or 'none'}",
                fix=f"add its base to the models: {wording.found.weights}",
                where="--adapter",
            )
        groups.setdefault(wording.found.weights, []).append(_Member(one, wording))
    return groups


def _open_ours(members: Sequence[_Member], settings: ServerSettings, loading: Loading) -> dict[str, Hosted]:
    """Models on the same weights, each with a lane of one worker."""
    from zhibei.generate.engine import Engine
    from zhibei.generate.threads import threads_for

    speakers, adapters = _speakers(members, loading)
    hf = speakers[members[0].wanted.name].model.hf

    def lane(member: _Member) -> Lane:
        pad_id = member.wording.tokenizer.pad_id
        engine = Engine(hf, slots=settings.slots, cache_tokens=settings.context_tokens, pad_id=pad_id)
        name = member.wanted.name
        return Lane(engine, activate=(lambda: _use(hf, adapters[name])) if adapters else lambda: None)

    lanes = {member.wanted.name: lane(member) for member in members}
    threads = threads_for(hf, rows=min(settings.slots, ROWS_OF_TRIAL))
    hosted = _hosted(members, speakers, lanes, settings)
    note = _memory_note(hf, settings, num_lanes=len(lanes))
    return {name: replace(one, threads=threads, notes=(*one.notes, *note)) for name, one in hosted.items()}


def _memory_note(hf: Any, settings: ServerSettings, *, num_lanes: int) -> tuple[str, ...]:
    """What a person should know where keys and values of full slots would not fit beside the weights on the GPU."""
    device = hf.get_input_embeddings().weight.device
    if device.type != "cuda":
        return ()
    tokens = settings.context_tokens or context_tokens(hf) or 0
    item_bytes = hf.get_input_embeddings().weight.element_size()
    try:
        shape = read_shape(plain_model(hf).config.to_dict())
    except UserError:  # a family whose sizes are not known from its config alone: nothing can be said beforehand
        return ()
    needed = num_lanes * cache_bytes(shape, slots=settings.slots, tokens=tokens, item_bytes=item_bytes)
    free, _ = torch.cuda.mem_get_info(device)
    if needed <= free:
        return ()
    return (
        f"{num_lanes * settings.slots} answers of {tokens} tokens would take {needed / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are free: lower --slots or --context-tokens, or long answers at once may fail",
    )


def _open_vllm(members: Sequence[_Member], settings: ServerSettings, loading: Loading) -> dict[str, Hosted]:
    """The same with one engine of vLLM's; nothing is loaded by us."""
    from zhibei.serve.vllm_engine import VllmEngine, speaker_of, start_vllm

    for name, kept in (("quantize", "none"), ("device", "auto")):
        if getattr(loading, name) != kept:
            raise UserError(
                f"--{name} {getattr(loading, name)} with --engine vllm",
                expected=f"no --{name}: vLLM decides it by itself",
                fix=f"leave out --{name} or --engine",
                where=f"--{name}",
            )
    folders = [member.wording.found.adapter for member in members if member.wording.found.adapter is not None]
    speakers = {member.wanted.name: speaker_of(member.wanted.path, member.wording) for member in members}
    shared = start_vllm(
        members[0].wording.found.weights,
        folders,
        precision=loading.precision,
        context_tokens=settings.context_tokens,
        slots=settings.slots,
    )
    lanes = {
        one.name: Lane(
            VllmEngine(
                shared,
                context_tokens=settings.context_tokens or speakers[one.name].context_tokens,
                adapter=wording.found.adapter,
                number=number,
            )
        )
        for number, (one, wording) in enumerate(members, start=1)
    }
    return _hosted(members, speakers, lanes, settings)


_OPENERS = {"ours": _open_ours, "vllm": _open_vllm}


def _hosted(
    members: Sequence[_Member], speakers: Mapping[str, Any], lanes: Mapping[str, Lane], settings: ServerSettings
) -> dict[str, Hosted]:
    worker = Worker(lanes, most_open=settings.slots + settings.most_waiting)
    return {
        name: Hosted(
            name=name,
            speaker=speakers[name],
            worker=worker,
            lane=name,
            path=one.path,
            base=wording.found.weights if wording.found.adapter else "",
            report=report_of(one.path),
            most_tokens=settings.context_tokens,
            notes=(*wording.notes, *_slower(one, wording, is_alone=len(members) == 1)),
        )
        for (one, wording), name in ((member, member.wanted.name) for member in members)
    }


def _speakers(members: Sequence[_Member], loading: Loading) -> tuple[dict[str, Speaker], dict[str, str | None]]:
    """The speakers of models on one base, and the adapter that each needs (None: switched off).

    The second is empty where there is nothing to switch.
    """
    first = next((member for member in members if member.wording.found.adapter is not None), members[0])
    opened: Any = open_speaker(first.wanted.path, **loading.for_speaker(loading.template_of(first.wanted)))
    speakers: dict[str, Speaker] = {first.wanted.name: opened}
    adapters: dict[str, str | None] = {first.wanted.name: FIRST_ADAPTER if first.wording.found.adapter else None}
    for member in members:
        if member is first:
            continue
        one, wording = member
        if wording.found.adapter is not None:
            _join(opened.model.hf, wording.found.adapter, one)
        adapters[one.name] = None if wording.found.adapter is None else one.name
        speakers[one.name] = replace(
            opened,
            name=one.path,
            tokenizer=wording.tokenizer,
            template=wording.template,
            notes=wording.notes,
            system=wording.system,
        )
    return speakers, adapters if any(adapters.values()) else {}


def _join(hf: Any, folder: Path, one: Wanted) -> None:
    try:
        read_adapter_beside(hf, str(folder), name=one.name)
    except Exception as error:  # PEFT raises many kinds; the user needs one message
        raise UserError(
            f"the adapter {one.path} cannot be put beside the others ({type(error).__name__}: {error})",
            expected="a complete PEFT LoRA folder made for this base model",
            fix="zhibei verify names a damaged file; serve it alone where it was trained on another base",
            where="--adapter",
        ) from error


def _use(hf: Any, adapter: str | None) -> None:
    """Make one adapter the model's, or none."""
    if adapter is None:
        hf.base_model.disable_adapter_layers()
        return
    hf.base_model.enable_adapter_layers()
    hf.set_adapter(adapter, inference_mode=True)


def _open_gguf(one: Wanted, settings: ServerSettings, loading: Loading) -> Hosted:
    speaker: Any = open_speaker(one.path, **loading.for_speaker(loading.template))
    # A context of llama.cpp holds one conversation.
    worker = Worker({one.name: Lane(InTurns(speaker, name=one.name))}, most_open=1 + settings.most_waiting)
    notes = tuple(speaker.notes)
    return Hosted(name=one.name, speaker=speaker, worker=worker, lane=one.name, path=one.path, notes=notes)


def report_of(path: str) -> Path | None:
    """The page about the run that a path is or belongs to; None where there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    page = RunDir(final_run(folder)).path / "report.html"
    return page if page.is_file() else None


def close_all(hosted: Mapping[str, Hosted]) -> None:
    """End the threads; open answers are told that the server leaves."""
    for worker in {one.worker for one in hosted.values()}:
        worker.stop()
