"""A run directory out of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_jax import checkpoint
from llm_jax.errors import disk_errors
from llm_jax.interop import tensors
from llm_jax.interop.folder import open_folder
from llm_jax.interop.tokenizer_files import has_tokenizer
from llm_jax.json_files import write_json
from llm_jax.runs import check_new

STEP = 0  # of the only checkpoint
DISK_MEND = "Name another --workdir."


def import_folder(
    path: str | Path, workdir: str | Path, log: Callable[[str], None], scan_layers: bool = False
) -> None:
    """Makes a run whose one checkpoint holds the weights of a published folder.

    Weights go from file to file a few rows at a time, so that a model needs no more memory than a
    small part of it.

    Args:
      workdir: of the run, new or empty.
      log: is told what was found.
      scan_layers: whether layers are stacked in the run, as a model with many of them wants it.

    Raises:
      UserError: a model, tensor or tokenizer that is not understood; `workdir` is not empty.
    """
    workdir = Path(workdir)
    check_new(workdir, "--workdir")
    folder = open_folder(path, scan_layers)
    # All that may be wrong with the folder comes to light before anything is written.
    leaves, meta = folder.leaves, folder.meta()
    tokenizer = folder.tokenizer() if has_tokenizer(folder.path) else None
    with disk_errors(workdir, DISK_MEND):
        if tokenizer is not None:
            tokenizer.save(workdir / "tokenizer")
        else:
            log(f"{path} holds no tokenizer: the run takes and gives token ids alone.")
        parameters = tensors.deferred(folder.tensors, leaves)
        checkpoint.write_streamed(workdir, STEP, parameters, meta)
        finish(workdir, {"init_from_hf": str(path), "scan_layers": scan_layers})


def finish(workdir: Path, config: dict[str, object]) -> None:
    """Writes what makes the folder a run, last: without it nothing takes it for one."""
    write_json(workdir / "result.json", {"status": "finished", "stage": "import", "step": STEP})
    write_json(workdir / "config.json", config)
