"""Why some pitfalls of other programs cannot be met here: there is no such option or extension. Each test fails as
soon as that changes, and the entries of the catalogue that name it must then become checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import zhibei
from tests.architecture import imports_of
from zhibei.config.errors import UserError
from zhibei.config.read import read_run

PACKAGE = Path(zhibei.__file__).parent


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def test_nothing_is_compiled_by_a_cuda_compiler_at_run_time() -> None:
    """No C++ or CUDA extension is built, and no package that builds one is used."""
    builders = ("torch.utils.cpp_extension", "deepspeed", "colossalai", "apex", "flash_attn", "cupy", "numba")
    for place, text in sources():
        used = [name for name, _ in imports_of(ast.parse(text)) if name.startswith(builders)]
        assert used == [], place


@pytest.mark.parametrize(
    "setting",
    [
        "model.device_map=auto",
        "sft.fsdp_transformer_layer_cls_to_wrap=LLaMADecoderLayer",
        "sft.ddp_find_unused_parameters=true",
        "model.use_unsloth=true",
        "sft.predict_with_generate=true",
        "sft.deepspeed=ds_config.json",
        "sft.ddp_timeout=1800",
    ],
)
def test_options_of_other_programs_are_refused(setting: str) -> None:
    with pytest.raises(UserError) as caught:
        read_run("alpaca-7b", ["model.path=model", "data.sources=[rows.json]", setting])
    assert setting.partition("=")[0].rpartition(".")[2] in str(caught.value)
