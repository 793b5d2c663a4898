"""`nemojax import` and `nemojax export`: the command-line faces of `hf.import_hf` and `hf.export_hf`."""

from __future__ import annotations

from collections.abc import Sequence

from nemojax.commands import Parser


def import_command(argv: Sequence[str]) -> int:
    """nemojax import HF_DIR ARTIFACT [--revision=R]. ValueError says what is wrong."""
    parser = Parser(prog="nemojax import", description="Make an artifact of a Hugging Face checkpoint.")
    parser.add_argument("source", metavar="HF_DIR", help="model directory, or hub name such as org/model")
    parser.add_argument("artifact", metavar="ARTIFACT", help="directory to create")
    parser.add_argument(
        "--revision", default=None, help="branch, tag or commit of a hub name (default: main)"
    )
    args = parser.parse_args(argv)
    from nemojax.checkpoints.hf import import_hf
    from nemojax.hosts import start_processes

    start_processes()
    arch = import_hf(args.source, args.artifact, revision=args.revision)
    print(f"{args.artifact}: {arch.num_layers} layers, {arch.num_params():,} parameters")
    return 0


def export_command(argv: Sequence[str]) -> int:
    """nemojax export ARTIFACT HF_DIR [--format=auto|llama|decilm|anymodel] [--dtype=fp8] [--step=N]."""
    parser = Parser(prog="nemojax export", description="Write an artifact as a Hugging Face checkpoint.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="artifact or work directory of a stage")
    parser.add_argument("out", metavar="HF_DIR", help="directory to create")
    parser.add_argument("--format", choices=("auto", "llama", "decilm", "anymodel"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("stored", "bf16", "fp8"),
        default="stored",
        help="of the weights; fp8: block matrices in e4m3 for vLLM and transformers (compressed-tensors)",
    )
    parser.add_argument("--step", type=int, default=None, help="checkpoint step (default: the newest)")
    parser.add_argument(
        "--max_shard_bytes", type=int, default=5_000_000_000, help="bytes in a file (default: 5e9)"
    )
    args = parser.parse_args(argv)
    from nemojax.checkpoints.hf import export_hf
    from nemojax.hosts import start_processes

    start_processes()
    done = export_hf(args.artifact, args.out, args.format, args.step, args.max_shard_bytes, args.dtype)
    print(f"{done.path}: {done.format}, {done.num_tensors} tensors, {done.size:,} bytes")
    for warning in done.warnings:
        print(f"warning: {warning}")
    if done.format == "decilm":
        print("load it with trust_remote_code=True, for the tokenizer too")
    return 0
