"""The command `simmim`. The one place that knows all stages; each is imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simmim.cli.allocator import keep_freed_memory
from simmim.cli.arguments import UsageError, canonical, nearest, options, parse

DESCRIPTION = "Pre-train a SwinV2 encoder on your own images with SimMIM, look at it, export it, fine-tune it."


@dataclass(frozen=True)
class Command:
    """One call of the tool: its name, what it is for, and what runs it with the remaining words and gives the exit code,
    0 where it gives none."""

    name: str
    purpose: str
    run: Callable[[Sequence[str]], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 something found wrong by check-data, 2 wrong input or a full
    disk, 130, 138 or 143 stopped by Ctrl-C, SIGUSR1 or SIGTERM with everything saved, 141 when
    the output is read no further."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(overview())
        elif arguments[0] == "--version":
            from simmim import __version__

            print(f"simmim {__version__}")
        else:
            command = command_named(arguments[0])
            keep_freed_memory()
            code = command.run(arguments[1:]) or 0
            sys.stdout.flush()
            return code
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 141
        print(f"simmim: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("simmim: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        print(f"simmim: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def output_is_closed() -> bool:
    """Whether whoever read the output, head for instance, has seen enough; what is left of it then goes nowhere."""
    try:
        print(flush=True)  # a pipe tells by refusing, and not before something is written
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def overview() -> str:
    """What `simmim --help` prints; made without importing anything heavy."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.purpose}" for command in COMMANDS]
    listed = "\n".join(lines)
    return (
        f"usage: simmim COMMAND [options]\n\n{DESCRIPTION}\n\ncommands:\n{listed}\n\n"
        "simmim COMMAND --help lists the options of one. Start with: simmim demo"
    )


def command_named(name: str) -> Command:
    """The command of that name.

    Raises:
        UsageError: naming the nearest one.
    """
    for command in COMMANDS:
        if command.name == name:
            return command
    if name.startswith("-"):
        raise UsageError(f"unknown command {name!r}; known: {', '.join(command.name for command in COMMANDS)}")
    raise UsageError(f"unknown command {name!r}{nearest(name, [command.name for command in COMMANDS])}")


# --- Commands ----------------------------------------------------------------------------------------------------------


def run_pretrain(arguments: Sequence[str]) -> None:
    """simmim pretrain"""
    from simmim.pretrain.settings import PretrainSettings

    settings = parse("pretrain", PretrainSettings, with_saved_config(arguments))
    from simmim.pretrain import pretrain

    run = pretrain(settings)
    from simmim.training import is_first_process

    if not is_first_process():
        return
    print(
        f"next: simmim reconstruct --run {run} --images {settings.data.path} --out grid.png\n"
        f"      simmim finetune classification --init {run} --data LABELED_FOLDER --out {run}-finetuned"
    )


def with_saved_config(arguments: Sequence[str]) -> list[str]:
    """For --resume: the run's own configuration first, so that only --out need be said again."""
    from simmim.training.run_folder import CONFIG

    words = canonical(arguments)
    if not any(word in ("--resume", "--resume=true") for word in words):
        return list(arguments)
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--out":
            value = value if equals else (words[position + 1] if position + 1 < len(words) else "")
            saved = Path(value).expanduser() / CONFIG
            if saved.is_file():
                return ["--config", str(saved), *arguments]
            if value and not any(word.partition("=")[0] in ("--data.path", "--config") for word in words):
                raise UsageError(f"no run to resume at {value!r}: there is no {saved}; --data starts a run there")
    return list(arguments)


def run_finetune(arguments: Sequence[str]) -> None:
    """simmim finetune TASK"""
    tasks = {  # where the settings of each are
        "classification": ("simmim.finetune.classification.settings", "ClassificationSettings"),
        "segmentation": ("simmim.finetune.segmentation.settings", "SegmentationSettings"),
    }
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: simmim finetune TASK [options]\n\ntasks: {', '.join(tasks)}\n\n--help after a task lists its options")
        return
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"which task? give one of: simmim finetune {' | '.join(tasks)}")
    if arguments[0] not in tasks:
        raise UsageError(f"unknown task {arguments[0]!r}{nearest(arguments[0], list(tasks))}")
    from importlib import import_module

    module, name = tasks[arguments[0]]
    settings_class = getattr(import_module(module), name)
    settings = parse(f"finetune {arguments[0]}", settings_class, with_saved_config(arguments[1:]))
    from simmim.finetune import finetune

    finetune(settings)


def run_study(arguments: Sequence[str]) -> int | None:
    """simmim study"""
    from simmim.finetune.label_study.settings import StudySettings
    from simmim.training.run_folder import CONFIG

    settings = parse("study", StudySettings, with_saved_config(arguments))
    from simmim.finetune import study
    from simmim.finetune.label_study.report import report

    try:
        result = study(settings)
    except KeyboardInterrupt:
        if not (Path(settings.out).expanduser() / CONFIG).is_file():
            raise
        print(f"simmim: interrupted; simmim study --out {settings.out} --resume goes on", file=sys.stderr)
        return 130
    print(f"\n{report(result)}\n\nplot and numbers: {settings.out}")
    return 0


def run_reconstruct(arguments: Sequence[str]) -> None:
    """simmim reconstruct"""
    chosen = options(
        "reconstruct",
        arguments,
        "Original, masked, prediction pasted and full prediction of some images, side by side.",
        run=(str, ..., "run folder of simmim pretrain"),
        images=(str, ..., "folder of images"),
        out=(str, "reconstructions.png", "picture to write; must not exist yet"),
        count=(int, 8, "images shown"),
        seed=(int, 0, "of the choice of images and of the masks"),
    )
    from simmim.pretrain.reconstruct import reconstruct

    path = reconstruct(chosen.run, chosen.images, chosen.out, chosen.count, chosen.seed)
    print(f"reconstructions: {path}")


def run_export(arguments: Sequence[str]) -> None:
    """simmim export"""
    chosen = options(
        "export",
        arguments,
        "Write an encoder or a classifier in the format of another library, ready to load.",
        run=(str, ..., "run folder, or an encoder in any format that is known"),
        format=(str, "safetensors", "safetensors (this toolkit's), official, timm, hf or onnx"),
        out=(str, ..., "folder to make"),
        form=(str, "", "encoder, simmim (with mask token and decoder) or classifier; what suits the format by default"),
        image_size=(int, 0, "pixels a side that formats of a fixed size are made for; those of training by default"),
        window_size=(int, 0, "of training, for files that do not tell theirs"),
        features=(str, "pooled", "of onnx: pooled, or stages for every stage's map"),
        dynamic_size=(bool, False, "of onnx: take images of any size"),
        license=(str, "", "for the model card; unknown by default"),
    )
    from simmim.checkpoints import read
    from simmim.checkpoints.export import export

    checkpoint = read(chosen.run, **({"window_size": chosen.window_size} if chosen.window_size else {}))
    exported = export(
        checkpoint,
        chosen.format,
        chosen.out,
        chosen.form or None,
        (chosen.image_size, chosen.image_size) if chosen.image_size else None,
        chosen.license or None,
        chosen.features,
        chosen.dynamic_size,
    )
    from simmim.finetune.segmentation.model import holds_segmenter

    for note in exported.notes:
        print(f"note: {note}")
    if holds_segmenter(chosen.run):
        print("note: the head of segmentation is left out: simmim predict reads it from the run")
    what = "encoder, mask token and decoder" if exported.form == "simmim" else exported.form
    print(f"exported the {what} to {exported.folder}; load it with\n\n{exported.code}")


def run_inspect(arguments: Sequence[str]) -> None:
    """simmim inspect FILE"""
    chosen = options(
        "inspect",
        path_first(arguments),
        "What a weight file or folder is: format, architecture, provenance, whether it loads, what it can be exported as.",
        path=(str, ..., "weight file, exported folder or run; the first word does without --path"),
        window_size=(int, 0, "of training, for files that do not tell theirs"),
    )
    from simmim.checkpoints.inspect import inspect

    print(inspect(chosen.path, **({"window_size": chosen.window_size} if chosen.window_size else {})))


def path_first(arguments: Sequence[str]) -> list[str]:
    """The words with a first one that has no name taken as --path."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words[0] = f"--path={words[0]}"
    return words


def run_embed(arguments: Sequence[str]) -> None:
    """simmim embed"""
    chosen = options(
        "embed",
        arguments,
        "One vector for each image, to Parquet.",
        run=(str, ..., "run folder, or an encoder in any format that is known"),
        images=(str, ..., "folder of images, or any other source that pretrain takes"),
        out=(str, "embeddings.parquet", "Parquet file to write, with columns path and vector; must not exist yet"),
        stage=(int, -1, "whose map is pooled, from 0; by default the last one's after the final norm"),
        pooling=(str, "mean", "mean of the map, or 2x2 for the means of its quarters"),
        batch_size=(int, 64, "images at a time"),
        workers=(int, -1, "processes that load images; what suits the machine by default"),
    )
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import EncoderPass, embed
    from simmim.training import device_type

    done = embed(
        read_encoder(chosen.run),
        chosen.images,
        chosen.out,
        stage=None if chosen.stage < 0 else chosen.stage,
        pooling=chosen.pooling,
        how=EncoderPass(chosen.batch_size, None if chosen.workers < 0 else chosen.workers, device_type()),
    )
    for path, why in done.unreadable.items():
        print(f"not read: {path}: {why}", file=sys.stderr)
    print(f"{done.count:,} vectors of {done.dim:,} values, {len(done.unreadable):,} images unreadable: {chosen.out}")


def run_probe(arguments: Sequence[str]) -> None:
    """simmim probe"""
    compare_features("probe", arguments, "Linear probe and k-NN of every stage of a frozen encoder, and which to take.")


def run_knn(arguments: Sequence[str]) -> None:
    """simmim knn"""
    compare_features("knn", arguments, "k-NN of every stage of a frozen encoder, and which to take; nothing is fitted.")


def compare_features(method: str, arguments: Sequence[str], purpose: str) -> None:
    """`simmim probe` and `simmim knn`."""
    chosen = options(
        method,
        arguments,
        purpose,
        run=(str, ..., "run folder, or an encoder in any format that is known"),
        data=(str, ..., "labeled images, as finetune takes them"),
        labels_per_class=(int, 0, "training images of each class; all by default"),
        seed=(int, 0, "of the draw of labels, which is finetune's of the same seed"),
        seeds=(int, 1, "so many draws, from seed on; gives standard errors"),
        stage=(str, "all", "one stage, from 0, or final: the last one's features after the norm"),
        pooling=(str, "all", "of each map: mean, or 2x2 for the means of its quarters"),
        k=(int, 20, "neighbors that vote"),
        out=(str, "", "file for the results as well: .json, .csv or .md; must not exist yet"),
        batch_size=(int, 64, "images at a time"),
        workers=(int, -1, "processes that load images; what suits the machine by default"),
        column=(str, "", "which holds the images, in sources that have columns; found by default"),
        label_column=(str, "", "which holds the labels; found by default"),
    )
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import Comparison, EncoderPass, check_out, compare, write_report
    from simmim.training import device_type

    asked = Comparison(
        chosen.data,
        method,
        chosen.labels_per_class or None,
        chosen.seed,
        chosen.seeds,
        chosen.stage,
        chosen.pooling,
        chosen.k,
        column=chosen.column or None,
        label_column=chosen.label_column or None,
    )
    if chosen.out:
        check_out(chosen.out)
    how = EncoderPass(chosen.batch_size, None if chosen.workers < 0 else chosen.workers, device_type())
    report = compare(read_encoder(chosen.run), asked, how)
    for path, why in report.unreadable.items():
        print(f"not read: {path}: {why}", file=sys.stderr)
    print(report.table())
    if report.unreadable:
        print(f"\n{len(report.unreadable):,} images unreadable and left out")
    if chosen.out:
        print(f"\nresults: {write_report(report, chosen.out)}")


def run_plan(arguments: Sequence[str]) -> None:
    """simmim plan"""
    chosen = options(
        "plan",
        arguments,
        "What pre-training a model needs of each device, and which switches make it fit.",
        preset=(str, ..., "size of the encoder"),
        image=(int, ..., "pixels a side"),
        devices=(int, 1, "how many"),
        batch=(int, 0, "images an optimizer step over all devices; what pretrain would choose by default"),
        window=(int, 0, "side in tokens; what pretrain would choose by default"),
        precision=(str, "bf16-mixed", "bf16-mixed or 32-true"),
        device_memory_gib=(float, 80.0, "of one device"),
    )
    from simmim.planning.plan import plan_for
    from simmim.planning.report import render

    planned = plan_for(
        chosen.preset,
        chosen.image,
        chosen.devices,
        chosen.batch or None,
        chosen.precision,
        chosen.device_memory_gib,
        {"window_size": chosen.window} if chosen.window else None,
    )
    print(render(planned))


def run_predict(arguments: Sequence[str]) -> None:
    """simmim predict"""
    chosen = options(
        "predict",
        arguments,
        "Classes or masks of a folder of images, by a fine-tuned encoder.",
        run=(str, ..., "run folder of simmim finetune"),
        images=(str, ..., "folder of images"),
        out=(str, "", "CSV file to write, predictions.csv by default, or of segmentation a folder; must not exist yet"),
        batch_size=(int, 64, "images at a time"),
        workers=(int, -1, "processes that load images, of classification; what suits the machine by default"),
        overlays=(bool, True, "of segmentation: also write the masks' colors over the images"),
    )
    from simmim.finetune.segmentation.model import holds_segmenter

    if holds_segmenter(chosen.run):
        return predict_masks(chosen)
    chosen.out = chosen.out or "predictions.csv"
    from simmim.finetune import predict

    workers = None if chosen.workers < 0 else chosen.workers
    count, unreadable = predict(chosen.run, chosen.images, chosen.out, chosen.batch_size, workers)
    for path, why in unreadable.items():
        print(f"not read: {path}: {why}", file=sys.stderr)
    print(f"{count:,} images classified, {len(unreadable):,} unreadable: {chosen.out}")


def predict_masks(chosen) -> None:
    """`simmim predict` of a run of segmentation."""
    from simmim.finetune.segmentation.prediction import segment

    out = chosen.out or "predictions"
    done = segment(chosen.run, chosen.images, out, chosen.batch_size, chosen.overlays)
    for path, why in done.unreadable.items():
        print(f"not read: {path}: {why}", file=sys.stderr)
    total = sum(done.pixels.values())
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in done.pixels.items() if count)
    print(f"{done.count:,} images segmented, {len(done.unreadable):,} unreadable: {out}\npixels   {shares}")


def run_check_data(arguments: Sequence[str]) -> int:
    """simmim check-data PATH"""
    words = ["--json=true" if word == "--json" else word for word in path_first(arguments)]
    chosen = options(
        "check-data",
        words,
        "Count, measure and try to read every image, before hours are spent. Exit code 1 when one cannot be read.",
        path=(str, ..., "folder of images, or any other source that pretrain takes; the first word does without --path"),
        column=(str, "", "which holds the images, in sources that have columns; found by default"),
        images_per_second=(float, 0.0, "that the model takes, to say how many loading processes keep up"),
        workers=(int, -1, "reading processes; by default one a core"),
        json=(bool, False, "print JSON and nothing else"),
    )
    from simmim.data import available_cores, open_images
    from simmim.data.check import as_json, check, render
    from simmim.data.label_map_sources import note_on_label_maps
    from simmim.training import device_type

    report = check(
        open_images(chosen.path, chosen.column or None),
        workers=available_cores() if chosen.workers == -1 else chosen.workers,
        path=chosen.path,
        device=device_type(),
        images_per_second=chosen.images_per_second or None,
        progress=not chosen.json,
    )
    print(as_json(report) if chosen.json else render(report))
    masks = note_on_label_maps(chosen.path)
    if masks and not chosen.json:
        print(f"\nnote         {masks}")
    return 0 if report.sound else 1


def run_demo(arguments: Sequence[str]) -> None:
    """simmim demo"""
    chosen = options(
        "demo",
        arguments,
        "Pre-train on 4,000 real digits, look at what is reconstructed, and see what it buys with few labels.",
        out=(str, "demo-run", "folder to make"),
        seeds=(int, 5, "fine-tuning runs of each kind, each with labels of its own"),
        overwrite=(bool, False, "delete an earlier demo's folder first"),
    )
    import shutil
    import time

    from simmim.data.digits import write_digits

    out, started = Path(chosen.out).expanduser(), time.monotonic()
    if chosen.seeds < 2:
        raise UsageError(f"seeds is {chosen.seeds}: give 2 or more, so that there is an error to the mean")
    if out.exists() and chosen.overwrite and (out / "digits").is_dir():
        shutil.rmtree(out)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UsageError(f"{chosen.out!r} exists: simmim demo --overwrite starts anew, --out gives another folder")
    print("1/4 writing 5,000 real handwritten digits", flush=True)
    digits = write_digits(out / "digits")

    from simmim.data import available_cores
    from simmim.finetune import ClassificationSettings
    from simmim.finetune.label_study.report import comparison_table
    from simmim.finetune.label_study.trials import pretrained_and_scratch, run_arms
    from simmim.pretrain import PretrainSettings, pretrain
    from simmim.pretrain.reconstruct import reconstruct

    print("2/4 pre-training on 4,000 of them, without labels", flush=True)
    recipe = ["--config", str(recipe_path("pretrain/demo.yaml"))]
    words = [*recipe, "--data", str(digits.unlabeled), "--out", str(out / "pretrain")]
    run = pretrain(parse("pretrain", PretrainSettings, words))

    print("3/4 reconstructing digits it has never seen", flush=True)
    picture = reconstruct(run, digits.labeled / "test", out / "reconstructions.png", count=16)

    print("4/4 fine-tuning with 5 and 10 labels a class, and the same from scratch", flush=True)
    recipe = ["--config", str(recipe_path("finetune/demo.yaml"))]
    words = [*recipe, "--data", str(digits.labeled), "--out", str(out / "finetune"), "--init", str(run)]
    arms = pretrained_and_scratch(parse("finetune", ClassificationSettings, words), **SCRATCH_TWIN)
    labels = {5: 5, 10: 10}
    result = run_arms(arms, labels, range(chosen.seeds), out / "finetune", processes=min(available_cores(), 4))
    table = comparison_table(result.trials, result.arms, tuple(labels))
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(
        f"\nTest accuracy in percent on 1,000 digits, mean ± standard error:\n\n{table}\n\n"
        f"reconstructions  {picture}\n"
        f"encoder          {run / 'encoder'}\n"
        f"curves           tensorboard --logdir {out}\n"
        f"your own images  simmim pretrain --data FOLDER --out runs/first\n\n"
        f"took {(time.monotonic() - started) / 60:.1f} minutes"
    )


# The demo's from-scratch arm: the best of the search that configs/finetune/demo.yaml tells of.
SCRATCH_TWIN = {"scratch_lr": 0.32768, "scratch_layer_decay": 0.65}


def recipe_path(name: str) -> Path:
    """A recipe of configs/, in a checkout or installed."""
    here = Path(__file__).resolve().parent
    return next(folder / name for folder in (here / "configs", here.parent / "configs") if (folder / name).is_file())


COMMANDS = (
    Command("demo", "the whole story on real digits, a few minutes on a laptop", run_demo),
    Command("check-data", "what a folder holds, what cannot be read, and what to type next", run_check_data),
    Command("pretrain", "stage 1: SimMIM on a folder of unlabeled images", run_pretrain),
    Command("reconstruct", "pictures of what a pre-trained model fills in", run_reconstruct),
    Command("finetune", "stage 2: transfer the encoder to a labeled task (classification, segmentation)", run_finetune),
    Command("study", "accuracy against labels a class: pre-trained, from scratch, other encoders", run_study),
    Command("predict", "classify or segment images with a fine-tuned encoder, to CSV or mask PNGs", run_predict),
    Command("export", "the encoder or classifier for timm, transformers, ONNX or the authors' code", run_export),
    Command("inspect", "what a weight file is, whether it loads and what it can be exported as", run_inspect),
    Command("plan", "parameters, FLOPs and memory of a model on so many devices, before they are hired", run_plan),
    Command("embed", "one vector for each image, to Parquet", run_embed),
    Command("probe", "what a frozen encoder's stages are worth by logistic regression on few labels", run_probe),
    Command("knn", "the same by nearest neighbors, with nothing fitted", run_knn),
)


if __name__ == "__main__":
    sys.exit(main())
