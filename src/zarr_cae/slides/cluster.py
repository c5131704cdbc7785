"""Convert a slide on a dask.distributed cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.slides.conversion import Conversion
from zarr_cae.slides.convert import Advance, close_slide, convert_block
from zarr_cae.slides.journal import Journal, is_recorded, remove_reduced
from zarr_cae.slides.pyramid import Block

__all__ = ["convert_on_dask"]


def convert_on_dask(conversion: Conversion, journal: Journal, advance: Advance, address: str) -> None:
    """Convert all blocks that are not done yet as tasks of a dask.distributed cluster.

    Each block is a task, which waits for the tasks of its children. So no two tasks write to one shard. A task that was
    lost with its worker is repeated. This process writes the journal, as tasks end. The workers need this package, and
    the source and the output under the same paths.

    Parameters
    ----------
    conversion, journal, advance
        As in `convert_here`.
    address
        Address of the scheduler, for example "tcp://host:8786".

    Raises
    ------
    CAEConfigurationError
        If dask.distributed is not installed; OSError if the scheduler does not answer.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise CAEConfigurationError("cae: --dask needs dask.distributed: pip install 'zarr-cae[dask]'") from error
    absolute = replace(conversion, source=conversion.source.absolute())
    folder = journal.folder.absolute()
    blocks = [block for block in conversion.pyramid.blocks(by_rows=conversion.by_rows) if block not in journal]
    with Client(address) as client:  # type: ignore[no-untyped-call]
        tasks: dict[Block, Any] = {}
        for number, block in enumerate(blocks):
            children = [tasks[child] for child in conversion.pyramid.children(block) if child in tasks]
            tasks[block] = client.submit(
                _task, absolute, folder, block, children, pure=False, priority=-number, retries=2,
                key=f"cae-{block.name}-{folder}",
            )  # fmt: skip
        places = {future: block for block, future in tasks.items()}
        for future in as_completed(list(places)):  # type: ignore[no-untyped-call]
            block = places[future]
            try:
                future.result()
            except KilledWorker as error:
                raise CAEDataError(
                    f"cae: every worker that tried block {block.name} died; perhaps they need more memory. Give the "
                    "same command again to go on"
                ) from error
            journal.record(block)
            for child in conversion.pyramid.children(block):
                remove_reduced(journal.folder, child)
            advance(conversion.pyramid.pixels(block) / 1e6)
        client.run(close_slide, on_error="ignore")


def _task(conversion: Conversion, folder: Path, block: Block, children: object) -> None:  # noqa: ARG001 - waits for them
    # dask repeats a task whose result was on a worker that died. If the block was recorded before that, the reduced
    # copies of its children may be gone.
    if not is_recorded(folder, block):
        convert_block(conversion, folder, block)
