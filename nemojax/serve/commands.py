"""`nemojax serve`: an artifact behind an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

from nemojax.commands import Parser, split_overrides


def serve_command(argv: Sequence[str]) -> int:
    """nemojax serve ARTIFACT [--host=...] [--port=...] [--api_key_file=FILE] [options]."""
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        print(_help(parser))
        return 0
    args, extras = parser.parse_known_args(argv)
    overrides = split_overrides(extras, parser.prog)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port: expected a number below 65536 (0 picks a free one), got {args.port}")
    keys = [] if args.api_key_file is None else read_keys(args.api_key_file)
    check_address(args.host, bool(keys) or args.force)
    from nemojax.config import apply_overrides, from_dict
    from nemojax.serve.config import ServeConfig
    from nemojax.serve.run import run

    cfg = from_dict(ServeConfig, apply_overrides({}, overrides))
    with bind(args.host, args.port) as listener:  # before the weights are read, for it may be taken
        run(args.artifact, cfg, listener, keys, args.served_name or default_name(args.artifact))
    return 0


def read_keys(path: str | Path) -> list[str]:
    """The keys of a file, one a line; empty lines and those that begin with # are none.

    ValueError for a file without keys, or a key that no header can carry.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text with one key a line ({error})") from error
    keys: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"{path}:{number}: expected a key of ASCII characters without spaces, got another"
            )
        keys.append(key)
    if not keys:
        raise ValueError(f"{path}: expected one key a line, got none; write one into it")
    return keys


def check_address(host: str, allowed: bool) -> None:
    """ValueError for an address that others can reach, unless that is allowed."""
    if not allowed and not is_loopback(host):
        raise ValueError(
            f"--host={host}: others could reach it without a key; give --api_key_file=FILE, or --force to "
            "let anyone in"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address; names are looked up."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError as error:
        raise ValueError(f"--host={host}: expected an address of this machine ({error.strerror})") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. ValueError if the address is not ours or is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[
        0
    ]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"{host}:{port}: {error.strerror}; choose another --host or --port") from error
    return listener


def default_name(artifact: str) -> str:
    """The last part of the path that says something."""
    path = Path(artifact).resolve()
    return path.name or "model"


def _parser() -> Parser:
    parser = Parser(
        prog="nemojax serve",
        usage="nemojax serve ARTIFACT [--host=ADDRESS] [--port=N] [--api_key_file=FILE] [options]",
        description="Answer OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /v1/score; "
        "a page to chat at /, /health, /metrics.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="artifact or work directory of a stage")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000); 0 picks a free one")
    parser.add_argument(
        "--api_key_file", metavar="FILE", help="keys that clients must bring, one a line; without it none"
    )
    parser.add_argument("--force", action="store_true", help="let others in without a key")
    parser.add_argument("--served_name", metavar="NAME", help="what clients call the model (the artifact's)")
    return parser


def _help(parser: Parser) -> str:
    from nemojax.config import describe
    from nemojax.serve.config import ServeConfig

    rows = describe(ServeConfig)
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"  {name:<{left}}  {default:<{middle}}  {doc}" for name, default, doc in rows]
    return "\n".join([parser.format_help(), "fields (--config.NAME=VALUE):", *lines])
