"""The command `web`: its options and their execution."""

from __future__ import annotations

import argparse
from typing import Any

from aecr_jax.errors import UserError


def add_options(parser: Any) -> None:
    """Add the options of `web` to its parser."""
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1; 0 takes a free one (default: 8000)")
    parser.add_argument("--output", metavar="DIR", help="write the page to this folder, for any web server, instead of serving it")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of the page in --output if they exist")
    parser.add_argument(
        "--runtime", metavar="FILE", help="the npm package of onnxruntime-web, as npm pack writes it (default: npm downloads it once)"
    )


def run_web(options: argparse.Namespace, rest: list[str]) -> int:
    """Serve the page until it is interrupted, or write it, and return the exit status."""
    if options.output and options.port is not None:
        raise UserError("--port is for serving the page: omit it, or omit --output")
    if options.overwrite and not options.output:
        raise UserError("--overwrite is for --output DIR: name the folder, or omit it")
    from aecr_jax.web.server import HOST, make_server
    from aecr_jax.web.site import make_site, write_site

    site = make_site(options.runtime)
    size = sum(map(len, site.values()))
    if options.output:
        write_site(site, options.output, overwrite=options.overwrite)
        print(f"{len(site)} files ({size / 1e6:.1f} MB) written to {options.output}: publish the folder with any web server")
        return 0
    with make_server(site, 8000 if options.port is None else options.port) as server:
        print(f"the page is at http://{HOST}:{server.server_port}/ (Ctrl+C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
