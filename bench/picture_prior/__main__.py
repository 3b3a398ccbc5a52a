"""The picture prior: its data, its training, its pictures and its checkpoint.

python -m diff2flow_nodes.bench.picture_prior data
python -m diff2flow_nodes.bench.picture_prior autoencoder
python -m diff2flow_nodes.bench.picture_prior encode
python -m diff2flow_nodes.bench.picture_prior pack .gpu/picture_prior.safetensors
python -m diff2flow_nodes.bench.picture_prior train .gpu/picture_prior.safetensors
python -m diff2flow_nodes.bench.picture_prior sample grid.png
python -m diff2flow_nodes.bench.picture_prior write models/checkpoints/picture_prior.safetensors
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

WORK = Path(".cache/picture_prior")
_NAME = "python -m diff2flow_nodes.bench.picture_prior"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    _COMMANDS[options.command](options)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=_NAME, description=__doc__, formatter_class=form)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of everything that is large (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that compute (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", help="fetch and draw the pictures")
    commands.add_parser("autoencoder", help="train the autoencoder; a trained one: its decoder further")
    reconstructions = commands.add_parser("reconstructions", help="pictures beside what the autoencoder makes of them")
    reconstructions.add_argument("png", type=Path)
    encode = commands.add_parser("encode", help="the pictures as latents, in more variants than the one that is needed")
    encode.add_argument("--variants", type=int, default=4, help="in all (%(default)s)")
    pack = commands.add_parser("pack", help="what is learned from as one file, which can travel to a card")
    pack.add_argument("to", type=Path)
    train = commands.add_parser("train", help="train the network into the work folder: 4 minutes of an H100")
    train.add_argument("packed", type=Path)
    train.add_argument("--seconds", type=float, default=240.0, help="by the clock (%(default)s)")
    train.add_argument("--batch", type=int, default=512, help="pictures a step (%(default)s)")
    train.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (%(default)s)")
    train.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    train.add_argument("--further", action="store_true", help="from the newest stored weights, not from nothing")
    sample = commands.add_parser("sample", help="a grid of prompts and consecutive seeds")
    sample.add_argument("png", type=Path)
    sample.add_argument("--prompt", action="append", help="a row; several: given several times")
    sample.add_argument("--steps", type=int, default=25, help="of Euler (%(default)s)")
    sample.add_argument("--cfg", type=float, default=3.0, help="guidance (%(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="of the first of eight columns (%(default)s)")
    sample.add_argument("--scale", type=int, default=2, help="screen pixels for one (%(default)s)")
    commands.add_parser("reader", help="train the classifier that judges")
    judge = commands.add_parser("judge", help="a table of what a classifier reads, and of Fréchet distances")
    judge.add_argument("--count", type=int, default=500, help="prompts (%(default)s)")
    judge.add_argument("--steps", type=int, nargs="+", default=[25, 4, 2], help="of Euler (%(default)s)")
    judge.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.5], help="guidances (%(default)s)")
    write = commands.add_parser("write", help="the checkpoint in Stable Diffusion's layout")
    write.add_argument("checkpoint", type=Path)
    write.add_argument("--narrow", action="store_true", help="as it was trained: headless loads it, ComfyUI does not")
    keep = commands.add_parser("keep", help="the trained weights into the repository")
    keep.add_argument("--to", type=Path, help="another file")
    return parser


def _data(options: argparse.Namespace) -> None:
    from .data import build

    build(options.work)


def _autoencoder(options: argparse.Namespace) -> None:
    from .autoencoder import learn

    learn(options.work)


def _reconstructions(options: argparse.Namespace) -> None:
    from . import autoencoder, data, grids

    grids.save(autoencoder.comparison(data.load(options.work), options.work), options.png, scale=2)


def _encode(options: argparse.Namespace) -> None:
    from . import data, latents

    latents.encode(data.load(options.work).chosen(lambda picture: not picture.held_out), options.work, options.variants)


def _pack(options: argparse.Namespace) -> None:
    from .training import pack

    pack(options.work, options.to)


def _train(options: argparse.Namespace) -> None:
    from .training import Plan, train

    command = f"{_NAME} train {options.packed.name} --seconds {options.seconds:g} --batch {options.batch}"
    command += f" --rate {options.rate:g}" + (" --further" if options.further else "")
    plan = Plan(options.seconds, options.batch, options.rate)
    train(options.packed, options.work, plan, command, torch.device(options.device), options.further)


def _sample(options: argparse.Namespace) -> None:
    from . import grids, sampling, stored

    prior = stored.read(stored.newest(options.work))
    prompts = options.prompt or sampling.PROMPTS
    grid = sampling.grid(prior, prompts, options.seed, 8, options.steps, options.cfg)
    grids.save(grid, options.png, options.scale)


def _reader(options: argparse.Namespace) -> None:
    from . import data, reader

    reader.trained(data.load(options.work), options.work)


def _judge(options: argparse.Namespace) -> None:
    from . import data, judge, stored

    pictures, prior = data.load(options.work), stored.read(stored.newest(options.work))
    judging = judge.Judge(pictures, options.work, options.count)
    shares = ", ".join(f"{100 * share:.1f} %" for share in judging.reference(pictures))
    print(f"real held-out pictures: {shares}\n{judge.HEAD}")
    for verdict in judging.verdicts(prior, options.steps, options.cfg):
        print(verdict.line(), flush=True)


def _write(options: argparse.Namespace) -> None:
    from . import checkpoint, network, stored

    width = network.WIDTH if options.narrow else network.WIDE
    checkpoint.write(stored.read(stored.newest(options.work)), options.checkpoint, width)


def _keep(options: argparse.Namespace) -> None:
    import shutil

    from . import stored

    shutil.copyfile(stored.path_in(options.work), options.to or stored.COMMITTED)


_COMMANDS = {
    "data": _data,
    "autoencoder": _autoencoder,
    "reconstructions": _reconstructions,
    "encode": _encode,
    "pack": _pack,
    "train": _train,
    "sample": _sample,
    "reader": _reader,
    "judge": _judge,
    "write": _write,
    "keep": _keep,
}

if __name__ == "__main__":
    main()
