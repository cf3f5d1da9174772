"""The command line `glimpseprune`: one module a command, imported when it is called."""

import argparse
import importlib
import logging
import sys

COMMANDS = {
    "answer": "answer many questions about many images, on one machine or a cluster",
    "ask": "answer a question about an image and show which visual tokens were kept",
    "calibrate": "choose the prune layer and the threshold of a checkpoint, without training",
    "chat": "answer question after question about images that are looked at once",
    "convert-llava-base": "turn a LLaVA-1.5 base of its authors into the Hub's layout",
    "convert-official": "convert an official GlimpsePrune checkpoint into a Hub repository",
    "convert-stage1": "make a Hub repository of what train-stage1 wrote",
    "convert-stage2": "make a Hub repository of a merged base and the stage 1 trained on it",
    "demo": "ask about an image in the browser and see which visual tokens were kept",
    "evaluate": "measure accuracy and retention over a data set",
    "inspect": "say what a repository is, and whether its weights are sound",
    "make-pages": "write pages of the tiny world with questions and evidence boxes",
    "merge": "merge the adapter of stage 2 into its base",
    "push": "upload a finished repository, or go on with an interrupted upload",
    "serve": "answer over HTTP, by transformers' OpenAI-compatible server",
    "train-base": "train the tiny base model from nothing",
    "train-plus": "stage 2, merge, and stage 1 again, in one go",
    "train-stage1": "train the glimpse token and the visual importance predictor",
    "train-stage2": "train the language model by reinforcement learning on pruned sequences",
}
CONVERSIONS = ("convert-llava-base", "convert-official", "convert-stage1", "convert-stage2", "push")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with all commands listed and the arguments of the chosen one."""
    parser = argparse.ArgumentParser(prog="glimpseprune", description=__doc__.split(":")[0])
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            _module(name).add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; mistakes of the caller end in a sentence, not in a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    chosen = next((argument for argument in argv if argument in COMMANDS), None)
    arguments = build_parser(chosen).parse_args(argv)
    from .hub.redaction import quiet_logging, redact

    quiet_logging()
    try:
        return _module(arguments.command).run(arguments)
    except (ValueError, OSError) as error:
        print(f"glimpseprune {arguments.command}: {redact(str(error))}", file=sys.stderr)
        return 2


def _module(command: str):
    package = "conversion" if command in CONVERSIONS else "glimpseprune.commands"
    return importlib.import_module(f"{package}.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
