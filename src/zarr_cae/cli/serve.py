"""`zarr-cae serve`: an archive over HTTP, for any Zarr reader and with a viewer."""

from __future__ import annotations

import argparse
from pathlib import Path

from zarr_cae.cli.arguments import Commands, command, note, refuse
from zarr_cae.cli.images import absent
from zarr_cae.errors import CAEConfigurationError

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def add(commands: Commands) -> None:
    """Declare `serve` and its arguments."""
    parser = command(
        commands, "serve", serve,
        "Serve a Zarr hierarchy over HTTP with its pixels decoded. Any Zarr v3 reader can open http://HOST:PORT/zarr/, "
        "also without this package; a browser shows the pictures at http://HOST:PORT/. Needs the extra 'serve'.",
    )  # fmt: skip
    parser.add_argument("archive", type=Path, metavar="OUT.zarr")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port (default 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--latents", action="store_true", help="serve latents as float32 arrays under /latents/ too")
    parser.add_argument(
        "--origin", default="*", metavar="URL",
        help="the web site whose pages may read the archive (default: all; a page still needs network access to HOST)",
    )  # fmt: skip
    parser.add_argument(
        "--cache",
        type=int,
        default=256,
        metavar="MIB",
        help="MiB of decoded and compressed chunks to keep (default 256)",
    )


def serve(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae serve` until it is interrupted."""
    archive: Path = arguments.archive
    if not archive.exists():
        refuse(absent(archive))
    if not archive.is_dir():
        refuse(f"{archive} is not a folder with a zarr hierarchy")
    if not 0 <= arguments.port < 1 << 16 or arguments.cache < 0:
        refuse(f"--port must be 0 to 65535 and --cache at least 0; got {arguments.port} and {arguments.cache}")
    try:
        from zarr_cae.serve.app import application, listen
        from zarr_cae.serve.app import serve as server_for
    except ModuleNotFoundError as error:
        raise CAEConfigurationError(
            f"cae: 'zarr-cae serve' needs {error.name}; install the extra: pip install 'zarr-cae[serve]'"
        ) from error
    app = application(
        archive, latents=arguments.latents, origins=arguments.origin, cache_bytes=arguments.cache << 20
    )  # fmt: skip
    if arguments.host not in _LOOPBACK:
        note(f"{arguments.host} is not loopback: whoever reaches it over the network can read {archive}")
    with listen(arguments.host, arguments.port) as listening:
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{archive}: look at {address}/ or open {address}/zarr/ with any Zarr reader; Ctrl-C stops", flush=True)
        server_for(app, listening).run(sockets=[listening])
