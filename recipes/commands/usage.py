"""What ``prunex --help`` and the help of Lightning's subcommands say: a first page, and where the rest is."""

from __future__ import annotations

from collections.abc import Iterable

from prunex.recipes.commands.own import COMMANDS

LIGHTNINGS = {
    "fit": "train; without --config the embedded demo (digits/dynamicvit.yaml)",
    "validate": "run the validation set through a checkpoint",
    "test": "run the test set through a checkpoint",
    "predict": "write a table: path, class, probabilities and kept share of every image",
}
_READING = {
    "validate": "Writes nothing: the run stays as it is.",
    "test": "Writes nothing: the run stays as it is.",
    "predict": "Writes predictions.csv into the checkpoint's run, else here.",
}
_FIT = """\
the run
  --config NAME|FILE            what to train, see below; may be given several times, the last one wins
  --ckpt_path last|FILE         go on with the last run that has a checkpoint, in its own folder
  --trainer.max_epochs N
  --trainer.logger.name NAME    runs go to runs/NAME/version_N
  --seed_everything N           default 0

the model and its images
  --data.root DIR               DIR/train/CLASS/*, DIR/val/CLASS/*, masks in DIR/masks (imagefolder configs)
  --data.image_size N           the model's size follows
  --data.batch_size N
  --model.architecture NAME     a timm ViT
  --model.weights FILE          safetensors with timm's names
  --model.pretrained true       or timm's own weights, downloaded
  --model.from_scratch true     or random ones
  --model.learning_rate X

what the config's callbacks do
  --pruning.method NAME         TokenPruning: prunex methods lists them
  --pruning.keep_ratio X        share of patches kept at each stage, or [X, Y, Z]
  --pruning.budget X            or share of the dense multiply-adds, or 2.9GMACs
  --pruning.stages [I, J, K]
  --pruning.options.NAME X      an option of the method
  --masks.budget X              MaskPruning: heads and MLP channels; also --masks.method, --masks.correct
  --slim.folder DIR             SlimExport: DIR/slim; also --slim.formats [onnx]
  --relevancy.methods [NAME]    RelevancyMonitor; also --kept.*, --units.*, --faithfulness.*, --guidance.*
  --head.method NAME            ExplainableHead: its options as --head.options.NAME; --evidence.* are HeadMonitor's
  --NAME.OPTION X               any other callback of the config, by its class: --EarlyStopping.patience 5
"""
_READ = """\
  --config RUN/config.yaml      the config that was trained, with the options that were typed
  --ckpt_path last|FILE         the last run that has a checkpoint, or a checkpoint
  --data.root DIR               other images than those of the config
  --trainer.accelerator NAME    cpu, gpu, auto
"""


def usage(configs: Iterable[str]) -> str:
    """The text of ``prunex --help``, with the names of the ready-made configs."""
    commands = LIGHTNINGS | {name: text for name, (text, _) in COMMANDS.items()}
    lines = [
        "usage: prunex COMMAND [options]",
        "",
        "Prune Vision Transformers while fine-tuning them, and see why.",
        "",
    ]
    lines += [f"  {name:<10} {text}" for name, text in commands.items()]
    return "\n".join([*lines, "", *_ready_made(configs), "", "prunex COMMAND --help says more of each"])


def command_usage(command: str, configs: Iterable[str]) -> str:
    """The text of ``prunex fit --help`` and of the other three: what a first run needs."""
    if command == "fit":
        body, more = _FIT, "imagefolder/evit --data.root photos --model.pretrained true --pruning.keep_ratio 0.5"
    else:
        body, more = f"{_READ}{'  --out FILE' * (command == 'predict')}", "RUN/config.yaml --ckpt_path last"
    return "\n".join(
        [
            f"usage: prunex {command} [--config NAME] [--OPTION VALUE ...]",
            "",
            f"{LIGHTNINGS[command][0].upper()}{LIGHTNINGS[command][1:]}. {_READING.get(command, '')}".rstrip(),
            "",
            body.rstrip(),
            "",
            *_ready_made(configs),
            "",
            f"example: prunex {command} --config {more}",
            f"every option: prunex {command} --help all; what a config says: add --print_config",
        ]
    )


def _ready_made(configs: Iterable[str]) -> list[str]:
    """The configs' names by their folders, two lines a folder."""
    lines = ["ready-made configs"]
    # Names in lines a folder: there are two dozen configs.
    folders: dict[str, list[str]] = {}
    for name in sorted(configs):
        folder, _, file = name.partition("/")
        folders.setdefault(folder, []).append(file.removesuffix(".yaml"))
    for folder, names in folders.items():
        lines += [f"  {folder}/", f"    {', '.join(names)}"]
    return lines
