"""The loops, one visible file per method. Knows no other stage.

`zhibei.train` is this folder and, for users, also the function that trains: Python puts a subpackage into its
parent under its own name, so the folder itself has to answer to the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zhibei.config.resolve import ResolvedRun
    from zhibei.store.run_dir import RunDir


class _CallableFolder(ModuleType):
    def __call__(
        self,
        run: ResolvedRun | str | Path,
        overrides: Sequence[str] = (),
        *,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> RunDir:
        """Fine-tune as a run file, a recipe or a resolved run says; `watch` gets every record (`zhibei train`)."""
        from zhibei.config.read import read_run
        from zhibei.config.resolve import ResolvedRun
        from zhibei.train.offline import train
        from zhibei.train.record import ignore

        resolved = run if isinstance(run, ResolvedRun) else read_run(run, overrides)
        return train(resolved, watch=watch or ignore)


sys.modules[__name__].__class__ = _CallableFolder
