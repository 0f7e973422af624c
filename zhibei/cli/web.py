"""`zhibei web`: a page to talk to trained models. Knows options and what is printed, nothing of the page."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from zhibei.cli.serve import DOORS, LIMITS, LOADING, Doors, Limits, Loading, run_server, settings_of


def web(
    paths: list[str],
    /,
    *,
    adapter: list[str] | None = None,
    json: bool = False,
    doors: Annotated[Doors, Parameter(name="*")] = DOORS,
    limits: Annotated[Limits, Parameter(name="*")] = LIMITS,
    loading: Annotated[Loading, Parameter(name="*")] = LOADING,
) -> int:
    """Talk to trained models in a browser: one page, from this machine, which loads nothing from elsewhere.

    Examples:

      zhibei web runs/my_run

      zhibei web runs/sft runs/dpo

      zhibei web llama=path/to/llama --adapter poet=runs/poet

      zhibei web runs/my_run --port 0 --json

    It prints an address with a key; whoever has it can talk to the models, on a shared machine too. From another
    machine: ssh -L 8000:127.0.0.1:8000 SERVER. The API of `zhibei serve` is there as well, with the same key.

    Parameters
    ----------
    paths
        Run directories, Hugging Face folders, adapter folders, hub ids or GGUF files; or NAME=PATH.
    adapter
        NAME=PATH of an adapter on one of these models, whose weights it shares; may be given several times.
    json
        Print one JSON document with the address and the models when the page is ready.
    """
    settings = settings_of(doors, limits)
    key = settings.api_keys[0] if settings.api_keys else secrets.token_urlsafe(24)
    settings = replace(settings, api_keys=settings.api_keys or (key,))
    return run_server(paths, adapter or [], settings=settings, loading=loading, as_json=json, page_key=key)
