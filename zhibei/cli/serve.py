"""`zhibei serve`: trained models behind OpenAI's API. Knows options and what is printed, not how it is answered."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from cyclopts import Parameter

from zhibei.cli import console
from zhibei.serve.settings import ServerSettings

if TYPE_CHECKING:
    from zhibei.serve.hosted import Hosted

_LIMITS = ServerSettings()
KEY_VARIABLE = "ZHIBEI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Doors:
    """Where the server listens, and who may use it."""

    host: str = _LIMITS.host
    """Address to listen at; beyond this machine only with an API key."""
    port: int = _LIMITS.port
    """0 takes a free one."""
    api_key: tuple[str, ...] = ()
    """Key that requests must bring; may be given several times. The variable ZHIBEI_API_KEY keeps it out of `ps`."""
    cors_origin: tuple[str, ...] = ()
    """A web page's address, such as https://example.org, whose scripts may use the server."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much the server takes on."""

    slots: int = _LIMITS.slots
    """Answers computed together, for each model."""
    context_tokens: int | None = None
    """Most tokens of prompt and answer together; less than the model's context saves memory."""
    max_waiting: int = _LIMITS.most_waiting
    """Answers that may wait for a slot; more are refused with 429."""
    max_new_tokens: int | None = None
    """Longest answer that a request may ask for."""
    max_body_bytes: int = _LIMITS.most_body_bytes
    """Largest request; a larger one is refused with 413."""
    request_seconds: float = _LIMITS.request_seconds
    """From a request to the end of its answer."""
    read_seconds: float = _LIMITS.read_seconds
    """For a request to arrive, and for a client to take what it is sent."""
    drain_seconds: float = _LIMITS.drain_seconds
    """How long running answers may go on after SIGTERM or Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the models are brought into memory."""

    base: str | None = None
    """The base model of an adapter, when it no longer lies where the adapter says."""
    template: str | None = None
    """Name of the prompt template for models that name none; all others keep the one that they were trained with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the weights in 8 or 4 bits."""
    engine: Literal["ours", "vllm"] = "ours"
    """vllm: where it is installed, for Hugging Face folders and adapters; its draws differ from ours."""


DOORS, LIMITS, LOADING = Doors(), Limits(), Loading()


def serve(
    paths: list[str],
    /,
    *,
    adapter: list[str] | None = None,
    json: bool = False,
    doors: Annotated[Doors, Parameter(name="*")] = DOORS,
    limits: Annotated[Limits, Parameter(name="*")] = LIMITS,
    loading: Annotated[Loading, Parameter(name="*")] = LOADING,
) -> int:
    """Serve trained models with the API of OpenAI.

    Examples:

      zhibei serve runs/my_run

      zhibei serve runs/sft runs/dpo --port 8080

      zhibei serve llama=path/to/llama --adapter poet=runs/poet --adapter clerk=runs/clerk

      zhibei serve model-q4_k_m.gguf

      ZHIBEI_API_KEY=... zhibei serve runs/my_run --host 0.0.0.0

    Clients choose one by `model`: the last part of its path, or the NAME of NAME=PATH. Ctrl-C or SIGTERM lets running
    answers end. Each request leaves a line of JSON on stderr.

    Parameters
    ----------
    paths
        Run directories, Hugging Face folders, adapter folders, hub ids or GGUF files; or NAME=PATH.
    adapter
        NAME=PATH of an adapter on one of these models, whose weights it shares; may be given several times.
    json
        Print one JSON document with the address and the models when the server is ready.
    """
    settings = settings_of(doors, limits)
    return run_server(paths, adapter or [], settings=settings, loading=loading, as_json=json)


def settings_of(doors: Doors, limits: Limits) -> ServerSettings:
    """Checked. Raises UserError for what cannot work or would leave the server open."""
    keys = doors.api_key or tuple(key for key in os.environ.get(KEY_VARIABLE, "").split(",") if key)
    return ServerSettings(
        host=doors.host,
        port=doors.port,
        api_keys=keys,
        cors_origins=doors.cors_origin,
        slots=limits.slots,
        context_tokens=limits.context_tokens,
        most_waiting=limits.max_waiting,
        most_new_tokens=limits.max_new_tokens,
        most_body_bytes=limits.max_body_bytes,
        request_seconds=limits.request_seconds,
        read_seconds=limits.read_seconds,
        drain_seconds=limits.drain_seconds,
    )


def run_server(
    paths: list[str],
    adapters: list[str],
    *,
    settings: ServerSettings,
    loading: Loading,
    as_json: bool,
    page_key: str = "",
) -> int:
    """Bind, load, say where it is, and serve until told to leave. `page_key`: with the page, whose key that is."""
    from zhibei.serve.opening import Loading as SpeakerLoading
    from zhibei.serve.opening import close_all, open_all, read_wanted
    from zhibei.serve.running import bind, require_uvicorn, url_of
    from zhibei.serve.server import make_server

    require_uvicorn()
    wanted = read_wanted(paths, adapters)
    listener = bind(settings)
    with listener:
        hosted = open_all(wanted, settings, SpeakerLoading(**vars(loading)), watch=_say)
        try:
            ready = _page_announcer(page_key) if page_key else _announce
            server = make_server(
                hosted,
                settings,
                listener,
                has_page=bool(page_key),
                on_ready=lambda: ready(hosted, settings, url_of(listener), as_json),
            )
            server.run()
            _say("the server has ended")
        finally:
            close_all(hosted)
    return 0


def _announce(hosted: dict[str, Hosted], settings: ServerSettings, url: str, as_json: bool) -> None:
    if as_json:
        console.emit({"url": url, "models": _models(hosted), "needs_key": bool(settings.api_keys)}, as_json=True)
        return
    _introduce(hosted)
    _say(f"serving at {url}; Ctrl-C lets running answers end. Try it:")
    key = ' -H "Authorization: Bearer $ZHIBEI_API_KEY"' if settings.api_keys else ""
    body = f'{{"model": "{next(iter(hosted))}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    _say(f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")


def _page_announcer(key: str) -> Callable[[dict[str, Hosted], ServerSettings, str, bool], None]:
    def announce(hosted: dict[str, Hosted], settings: ServerSettings, url: str, as_json: bool) -> None:
        page = f"{url}/#key={quote(key)}"
        if as_json:
            console.emit({"url": url, "page": page, "models": _models(hosted), "needs_key": True}, as_json=True)
            return
        _introduce(hosted)
        _say("open this in a browser (the part behind # is the key; Ctrl-C ends it):")
        console.stdout.print(page, markup=False)

    return announce


def _models(hosted: dict[str, Hosted]) -> list[dict[str, Any]]:
    return [{"id": one.name, "path": one.path, "notes": list(one.notes)} for one in hosted.values()]


def _introduce(hosted: dict[str, Hosted]) -> None:
    for one in hosted.values():
        context = f"{one.context_tokens} tokens of context" if one.context_tokens else "no limit of context"
        _say(f"{one.name}: template {one.speaker.template.name}, {context}")
        for note in one.notes:
            _say(f"{one.name}: {note}")


def _say(text: str) -> None:
    console.stderr.print(text, style="dim", markup=False)
