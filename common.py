"""What the scripts share: flags, images, ELBO helpers and the files of a run.

The scripts import it inside main(), so that a model class can be copied without it.
"""

import argparse
import atexit
import contextlib
import csv
import difflib
import io
import json
import math
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

NOT_MNIST = "NOT MNIST, which can't be found or downloaded, but digits drawn from fonts (glyphs)"
saved_in = None  # the last good checkpoint: messages say how to resume it


# ---------------------------------------------------------------------------
# flags and errors


def start(main):
    """Run a script's main(). Ctrl-C, unusable files and too little memory end it in one line."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook may have set one that can't be imported
    if sys.stdout is None:  # closed by the caller
        sys.stdout = io.StringIO()
    try:
        main()
    except KeyboardInterrupt:
        hint = f"; continue with --resume {saved_in}" if saved_in else ""
        print(f"\nstopped{hint}", flush=True)
        sys.exit(130)
    except (OSError, MemoryError) as error:
        fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        fail(f"out of memory: {error}")


def fail(message):
    """End the program with one line on standard error and exit status 2."""
    line = message.replace("\n", " ")[:400]
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def at_least(low, kind=int):
    """An argparse type: a number from `low` to 2**31, whole unless kind=float."""

    def number(text):
        value = kind(text)
        if not low <= value <= 2**31:
            raise argparse.ArgumentTypeError(f"must be from {low} to 2147483648, not {text}")
        return value

    return number


def parser(script, doc, epochs, batch_size, lr, test_samples, datasets=()):
    """The flags of every script. The defaults are the script's own."""
    p = argparse.ArgumentParser(
        prog=f"{script}.py",
        usage="%(prog)s [flags]; --help lists them",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add(
        "--dataset",
        choices=("auto", "mnist", "fashion-mnist", "kmnist", "glyphs", "folder", *datasets),
        default="auto",
        help="what to learn (default: auto, which is mnist if it can be had, else glyphs)",
    )
    add(
        "--data-dir",
        default="data",
        help="folder where data sets are, or are downloaded to (default: %(default)s)",
    )
    add(
        "--image-size",
        type=at_least(8),
        default=28,
        help="height and width in pixels of the images of --dataset folder (default: %(default)s)",
    )
    add("--out-dir", help="new folder for the results (default: out/SCRIPT-1, -2, ...)")
    add(
        "--epochs",
        type=at_least(0),
        default=epochs,
        help="epochs in all, those before --resume included (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=batch_size,
        help="examples per training step (default: %(default)s)",
    )
    add(
        "--lr",
        type=at_least(1e-9, float),
        default=lr,
        help="learning rate of Adam (default: %(default)s)",
    )
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="seed of weights, noise and order (default: %(default)s)",
    )
    add(
        "--device",
        default="auto",
        help="cpu, cuda, ... (default: auto, an accelerator if there is one)",
    )
    add("--resume", metavar="PATH", help="run's folder, checkpoint or weights to continue from")
    add(
        "--sample",
        type=at_least(1),
        metavar="N",
        help="draw N samples of the model of --resume, without data or training",
    )
    add("--dry-run", action="store_true", help="one batch of everything, to see it work")
    add(
        "--test-samples",
        type=at_least(1),
        default=test_samples,
        help="importance samples per test example (default: %(default)s)",
    )
    return p


def peek(argv, flag):
    """The value of one flag that decides about the defaults of others, or None.

    It is read before the real parser, which will complain if the value is missing.
    """
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument(flag, dest="value", nargs="?")
    known, _ = p.parse_known_args(argv)
    return known.value


def parse(parser, argv=None):
    """Parse the flags, and choose device and seed.

    Returns the flags, and the checkpoint of --resume or None. A flag that is not given has the
    value that it had in the run of --resume.
    """
    checkpoint = None
    path = peek(argv, "--resume")
    if path is not None:
        checkpoint = load_checkpoint(parser, path)
        parser.set_defaults(**checkpoint["args"])
        parser.set_defaults(
            dataset=checkpoint["dataset"], out_dir=None, device="auto", dry_run=False, sample=None
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in vars(args)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1) or ["--help"]
        parser.error(f"there is no {unknown[0]}; did you mean {near[0]}?")
    if args.sample and not checkpoint:
        parser.error("--sample needs --resume PATH")
    if args.out_dir and os.path.lexists(os.path.expanduser(args.out_dir)):
        parser.error(f"--out-dir {args.out_dir} exists; choose a new folder, or --resume it")
    if args.dry_run:
        args.epochs = 1 + len(checkpoint["rows"] if checkpoint else [])
        args.test_samples = 4
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            join_processes(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).split("\n")[0]
        parser.error(f"--device {args.device} can't be used, try auto: {reason}")
    allow_tf32(True)
    torch.set_flush_denormal(True)  # denormal numbers make a CPU several times slower
    torch.manual_seed(args.seed)
    return args, checkpoint


def load_checkpoint(parser, path):
    """Read a checkpoint of this script. A folder stands for its checkpoint.pt."""
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        path = path / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling something else raises almost anything
        reason = str(error).split("\n")[0]
        parser.error(f"--resume {path}: can't be read, {type(error).__name__}: {reason}")
    for name in ("script", "dataset", "classes", "args", "model_args", "model", "rows"):
        if not isinstance(checkpoint, dict) or name not in checkpoint:
            parser.error(f"--resume {path}: not a checkpoint, it lacks {name!r}")
    if f"{checkpoint['script']}.py" != parser.prog:
        parser.error(f"--resume {path}: not of {parser.prog} but of {checkpoint['script']}.py")
    checkpoint["path"] = path
    return checkpoint


# ---------------------------------------------------------------------------
# torchrun


def join_processes(device):
    """Join the processes that torchrun started. The first one writes, the others are silent."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if torch.distributed.get_rank() > 0:
        sys.stdout = io.StringIO()


def rank_and_world():
    """Which of how many processes this is: 0, 1 without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def share_gradients(model):
    """Under torchrun, give every process the mean of all processes' gradients."""
    _, world = rank_and_world()
    if world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) / world
    torch.distributed.all_reduce(flat)
    means = flat.split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view_as(grad))


# ---------------------------------------------------------------------------
# images


def load_images(args):
    """Read args.dataset, all of it onto the device.

    Returns a namespace: train, valid and test are pairs of grey images (N, 1, H, W) uint8 and
    labels (N,) int64; shape is (1, H, W), classes are the labels' names, dataset is what was read.
    """
    socket.setdefaulttimeout(10)  # seconds, for each mirror of a download
    dataset = args.dataset
    if dataset == "auto":
        dataset = "mnist"
        if not find_or_download(args, dataset):
            dataset = "glyphs"
            print(NOT_MNIST, flush=True)
    if dataset == "folder":
        parts, classes = read_folder(args)
    else:
        if dataset == "glyphs":
            x, y = glyph_images(24_000)
            parts = [(x[4000:], y[4000:]), (x[:2000], y[:2000]), (x[2000:4000], y[2000:4000])]
        else:
            parts = read_torchvision(args, dataset)
        classes = [str(label) for label in parts[0][1].unique().tolist()]
    if args.dry_run:
        parts = [(x[: args.batch_size], y[: args.batch_size]) for x, y in parts]
    train, valid, test = [(x.to(args.device), y.to(args.device)) for x, y in parts]
    shape = tuple(train[0].shape[1:])
    return SimpleNamespace(
        train=train, valid=valid, test=test, shape=shape, classes=classes, dataset=dataset
    )


def torchvision_class(dataset):
    """torchvision's class of that name. It knows the mirrors and the checksums."""
    from torchvision import datasets

    names = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
    return getattr(datasets, names[dataset])


def find_or_download(args, dataset):
    """Download the data set if no file of it is there. False if that can't be done."""
    kind = torchvision_class(dataset)
    root = data_folder(args)
    if list((root / kind.__name__ / "raw").glob("*")):
        return True
    with tempfile.TemporaryDirectory() as temporary:  # nothing is left behind if it fails
        try:
            kind(temporary, download=True)
        except (RuntimeError, OSError):
            return False
        shutil.copytree(temporary, root, dirs_exist_ok=True)
    return True


def read_torchvision(args, dataset):
    """MNIST, or one of its relatives, as (x, y) of train, valid and test."""
    kind = torchvision_class(dataset)
    root = data_folder(args)
    raw = root / kind.__name__ / "raw"
    if not find_or_download(args, dataset):
        fail(
            f"--dataset {dataset}: can't be downloaded; put train-images-idx3-ubyte, train-labels-"
            f"idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, gzipped or not, into "
            f"{raw}, or try --dataset glyphs"
        )
    try:
        train = kind(root, train=True, download=True)
        test = kind(root, train=False, download=True)
    except Exception as error:  # its reader lets all kinds of errors through
        fail(f"{raw}: can't read, or download what is missing: {type(error).__name__} {error}")
    x, y = train.data[:, None], train.targets
    return [(x[5000:], y[5000:]), (x[:5000], y[:5000]), (test.data[:, None], test.targets)]


def data_folder(args):
    """args.data_dir as a path, which is a folder, or can become one."""
    root = Path(os.path.expanduser(args.data_dir)).absolute()
    for path in (root, *root.parents):
        if path.exists():
            if not path.is_dir():
                fail(f"--data-dir {args.data_dir}: {path} is not a folder")
            break
    return root


def files_below(root, endings):
    """Files with one of the endings below a folder, sorted, and how many others were left out.

    Hidden files and folders are left out; links are followed.
    """
    files, left_out = [], 0
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder, name)
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if hidden or path.suffix.lower() not in endings:
                left_out += 1
            else:
                files.append(path)
    return sorted(files), left_out


def read_folder(args):
    """Own images, one sub-folder per class, split about 8 : 1 : 1 by a hash of their names.

    Returns (x, y) of train, valid and test, and the names of the classes.
    """
    root = data_folder(args)
    endings = {".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pgm"}
    files, left_out = files_below(root, endings)
    images = [[], [], []]
    labels = [[], [], []]
    for path in files:
        name = path.relative_to(root)
        if len(name.parts) == 1:  # not in a sub-folder
            left_out += 1
            continue
        tenth = zlib.crc32(os.fsencode(name.as_posix())) % 10
        part = 0  # training
        if tenth == 1:
            part = 1  # validation
        if tenth == 0:
            part = 2  # test
        images[part].append(load_image(path, args.image_size))
        labels[part].append(name.parts[0].encode(errors="replace").decode())  # not UTF-8: "?"
    classes = sorted(set(labels[0]))
    if classes and set(classes) <= {"train", "val", "valid", "validation", "test"}:
        fail(f"{root}: {', '.join(classes)} are not classes; put all images of a class together")
    parts = []
    for x, y in zip(images, labels, strict=True):
        known = [i for i, label in enumerate(y) if label in classes]
        left_out += len(y) - len(known)  # of classes without an image to train on
        if not known:
            fail(f"{root}: too few images in sub-folders to train, validate and test")
        numbers = torch.tensor([classes.index(y[i]) for i in known])
        parts.append((torch.stack([x[i] for i in known]), numbers))
    if left_out:
        print(f"left out: {left_out} files (hidden, no images, or of classes not trained on)")
    x, _ = parts[0]
    if x.min() == x.max():
        fail(f"{root}: all pixels have the value {x.min()}")
    if ((x > 25) & (x < 230)).float().mean() > 0.3:
        print("many pixels are grey; only vae.py --likelihood gaussian --sigma 0.1 models greys,")
        print("  all else draws them black or white")
    return parts, classes


def load_image(path, size):
    """An image file as a viewer shows it, made grey and square: (1, size, size) uint8."""
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            values = np.asarray(image)
            if not (values >= 0).all() or values.max() > 1:
                raise ValueError("its floats are not between 0 and 1")
            image = Image.fromarray((255 * values).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            opacity = np.asarray(image)[:, :, 3] / 255
            brightness = (np.asarray(image.convert("L")) * opacity).sum() / max(1, opacity.sum())
            ground = 0 if brightness > 127 else 255  # light ink on black, dark ink on white
            paper = Image.new("RGBA", image.size, (ground, ground, ground, 255))
            image = Image.alpha_composite(paper, image)
        image = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image))[None]
    except Exception as error:  # Pillow's errors are of many kinds, and seldom name the file
        fail(f"{path}: not an image to learn from: {error}")


def glyph_images(n):
    """Digits in matplotlib's fonts, turned and moved: x (n, 1, 28, 28) uint8, y (n,) int64."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    paths = sorted(Path(get_data_path(), "fonts/ttf").glob("DejaVu*.ttf"))
    fonts = [FT2Font(str(path)) for path in paths if "Display" not in path.name]
    random = np.random.default_rng(0)
    x = np.zeros((n, 1, 28, 28), np.uint8)
    y = random.integers(10, size=n)
    for image, digit in zip(x, y, strict=True):
        font = fonts[random.integers(len(fonts))]
        font.set_size(random.uniform(18, 24), 72)
        font.set_text(str(digit), random.uniform(-15, 15))
        font.draw_glyphs_to_bitmap(antialiased=True)
        ink = np.asarray(font.get_image())[:28, :28]
        height, width = ink.shape
        top = (28 - height) // 4 + random.integers(29 - height) // 2  # near the middle
        left = (28 - width) // 4 + random.integers(29 - width) // 2
        image[0, top : top + height, left : left + width] = ink
    return torch.from_numpy(x), torch.from_numpy(y)


# ---------------------------------------------------------------------------
# pixels and batches


def binarise(x, seed=None):
    """Pixels from Bernoulli(x / 255): new ones at every call, or always the same for a seed."""
    if seed is None:
        noise = torch.rand(x.shape, device=x.device)
    else:  # on the CPU, so that they are the same on every device
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (255 * noise < x).float()


def epoch_order(args, epoch, n, lengths=None):
    """Seed the noise of an epoch, and shuffle its n examples.

    Returns indices (steps, examples of a step) on the CPU. With lengths (n,), examples of similar
    length share a step. Randomness follows from seed and epoch alone. Under torchrun, each process
    gets its part of every step, and noise of its own.
    """
    rank, world = rank_and_world()
    seed = hash((args.seed, epoch))  # of integers: the same in every process
    torch.manual_seed(seed)
    share = max(1, min(args.batch_size, n) // world)  # of a process
    size = share * world
    steps = n // size
    index = torch.randperm(n)[: steps * size]
    if lengths is not None:
        index = index[lengths[index].argsort(stable=True)]
    index = index.view(steps, size)[torch.randperm(steps)]
    torch.manual_seed(seed + rank)
    return index[:, rank::world]


def batches(args, epoch, *tensors):
    """An epoch's shuffled batches of tensors (N, ...)."""
    order = epoch_order(args, epoch, len(tensors[0]))
    for index in progress(f"epoch {epoch + 1}, step", order.to(args.device)):
        yield [tensor[index] for tensor in tensors]


def progress(what, parts):
    """Yield the parts; count them in a live line on a terminal, elsewhere every half minute."""
    live = sys.stdout.isatty()
    shown = time.time()
    for i, part in enumerate(parts, 1):
        yield part
        if time.time() - shown > (1 if live else 30):
            shown = time.time()
            print(f"  {what} {i} of {len(parts)}", end="\r" if live else "\n", flush=True)


# ---------------------------------------------------------------------------
# ELBO helpers


def log_mean_exp(log_w, dim=0):
    """The importance-weighted bound (Burda et al. 2016, eq. 8) of log weights along `dim`."""
    return log_w.logsumexp(dim) - math.log(log_w.shape[dim])


def allow_tf32(allowed):
    """Allow or forbid a GPU to round factors of float32 products to TF32, which is faster."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@torch.no_grad()
def evaluate(model, *tensors, samples=1, at_once=4096):
    """Means over examples of -ELBO, its parts and, if samples > 1, -log p(x), in nats.

    model(*batch, k=k) returns log_px, kl and log_w, each (k, B). The noise is the same at every
    call. at_once: largest number of examples times samples in memory. Under torchrun, the
    processes share the work.
    """
    began = time.time()
    rank, world = rank_and_world()
    torch.manual_seed(rank)
    allow_tf32(False)
    k = min(samples, 64, at_once)  # samples of z in one call
    batches = list(zip(*[tensor.split(at_once // k) for tensor in tensors], strict=True))
    sums = []
    for batch in progress("evaluated batch", batches[rank::world]):
        parts = []
        for done in range(0, samples, k):
            parts.append(model(*batch, k=min(k, samples - done)))
        log_px, kl, log_w = [torch.cat(terms) for terms in zip(*parts, strict=True)]
        terms = torch.stack([-log_px.mean(0), kl.mean(0), -log_mean_exp(log_w)])  # (3, B)
        sums.append(terms.sum(1))
    total = torch.zeros(3, dtype=torch.float64)
    if sums:
        total = torch.stack(sums).cpu().double().sum(0)
    if world > 1:  # on the device, as not all back ends can share what is on the CPU
        shared = total.float().to(tensors[0].device)
        torch.distributed.all_reduce(shared)
        total = shared.cpu()
    allow_tf32(True)
    rec, kl, nll = (total / len(tensors[0])).tolist()
    figures = {"neg_elbo": rec + kl, "rec": rec, "kl": kl}
    if samples > 1:
        figures["nll"] = nll
    figures["seconds"] = time.time() - began
    return figures


# ---------------------------------------------------------------------------
# a run: averaged weights, folder, checkpoints, log, results


def averaged(model):
    """A model whose weights are the running mean of the trained ones, weighted like t^12.

    It follows Karras et al. 2024, section 3.1, and works like a falling learning rate.
    """

    def follow(averages, values, n):
        weight = -torch.expm1(13 * torch.log1p(-1 / (n + 1)))  # 1 - (1 - 1 / t)^13, t = n + 1
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight.to(average.dtype))
            else:
                average.copy_(value)

    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    return average.eval().requires_grad_(False)


def means(**terms):
    """Means of a step's terms, which stay on the device."""
    return {name: term.detach().float().mean() for name, term in terms.items()}


def new_folder(args, script):
    """Make args.out_dir, or the first free out/SCRIPT-N. At exit it is removed if it is empty."""
    if args.out_dir:
        folder = Path(os.path.expanduser(args.out_dir))
        folder.mkdir(parents=True)
    else:
        folder = None
        n = 0
        while folder is None:
            n += 1
            with contextlib.suppress(FileExistsError):  # perhaps by another run, just now
                Path(f"out/{script}-{n}").mkdir(parents=True)
                folder = Path(f"out/{script}-{n}")
    atexit.register(remove_empty, folder)
    return folder


def remove_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def load_model(kind, args, checkpoint):
    """The best model of a checkpoint, to draw from, and a new folder for its pictures."""
    try:
        model = kind(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        fail(f"--resume {args.resume}: does not fit {kind.__name__}: {error}")
    model = model.to(args.device).eval().requires_grad_(False)
    folder = new_folder(args, checkpoint["script"])
    print(f"samples of {args.resume} are in {folder}")
    return model, folder


def facts(script, args, data, model_args):
    """What checkpoints and results say of a run."""
    return {
        "script": script,
        "dataset": data.dataset,
        "classes": data.classes,
        "examples": [len(data.train[1]), len(data.valid[1]), len(data.test[1])],
        "args": vars(args),
        "model_args": model_args,
    }


def size(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def begin(args, checkpoint, facts, parts):
    """Start a run, or continue that of the checkpoint: its folder, and one row per finished epoch.

    facts: what checkpoints and results say of the run. parts: the objects whose state checkpoints
    hold: "weights" in training, their "average", the "optimizer", and "model", the best average.
    """
    global saved_in
    rows = []
    folder = None
    if checkpoint:
        rows = restore(args, checkpoint, facts, parts)
        saved_in = checkpoint["path"]
        for group in parts["optimizer"].param_groups:
            group["lr"] = args.lr
        if not args.out_dir and not args.dry_run:
            folder = folder_to_continue(args, checkpoint["path"], rows)
    if rank_and_world()[0] > 0:  # what other processes of torchrun write is thrown away
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if folder is None:
        folder = new_folder(args, facts["script"])
    train, valid, test = facts["examples"]
    name = f"{facts['script']}.py, {facts['dataset']}"
    print(f"{name}: {train} training, {valid} validation, {test} test examples")
    print(f"{size(parts['weights'])} parameters on {args.device}; results in {folder}", flush=True)
    return folder, rows


def restore(args, checkpoint, facts, parts):
    """Load a checkpoint into the parts, and return its rows.

    A file of weights alone, without an optimizer, starts a new training, on any data.
    """
    path = checkpoint["path"]
    for name, value in facts["model_args"].items():
        saved = checkpoint["model_args"].get(name)
        if saved != value:
            fail(f"--resume {path}: its model has {name} {saved}, not {value}")
    try:
        if "optimizer" not in checkpoint:
            for model in parts["weights"], parts["average"].module, parts["model"]:
                model.load_state_dict(checkpoint["model"])
            return []
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"--resume {path}: damaged, or of another model: {error}")
    if checkpoint["dataset"] != facts["dataset"]:
        fail(f"--resume {path}: was trained on {checkpoint['dataset']}; leave --dataset out")
    if checkpoint["examples"] != facts["examples"] and not args.dry_run:
        print(f"NOT THE CHECKPOINT'S DATA: it had {checkpoint['examples']} examples")
    return checkpoint["rows"]


def folder_to_continue(args, path, rows):
    """The folder of a checkpoint of an unfinished run, or None if a new one is needed.

    Ends the program if the run is finished and nothing else was asked for.
    """
    if path.name != "checkpoint.pt":
        return None
    results = path.parent / "results.json"
    finished = results.exists() and json.loads(results.read_text())["epochs"] == len(rows)
    if args.epochs > len(rows) or not finished:  # more to train, or not yet tested
        return path.parent
    if args.epochs > 0:
        print(f"{path.parent} is finished, see its results.json; train more with --epochs N, or")
        print("test it again in a new folder with --epochs 0")
        sys.exit()
    return None


def end_epoch(args, rows, began, steps, valid, cost_of=None):
    """Add an epoch's row to the log and print it; True if its validation is the best so far.

    began: when the epoch began. steps: `means` of each. valid: its first figure says which epoch
    is the best. cost_of(epoch): relative time that an epoch takes, if some take longer.
    """
    row = {"epoch": len(rows) + 1, "seconds": time.time() - began}
    row["examples_per_second"] = len(steps) * args.batch_size / (row["seconds"] - valid["seconds"])
    for name in steps[0]:
        row[f"train_{name}"] = torch.stack([step[name] for step in steps]).mean().item()
    for name, value in valid.items():
        row[f"valid_{name}"] = value
    for name, value in row.items():
        if not math.isfinite(value):
            resume = f"--resume {saved_in} and " if saved_in else ""
            fail(
                f"epoch {row['epoch']}: {name} is not finite; try {resume}a lower rate, "
                f"--lr {args.lr / 2:g}"
            )
    score = f"valid_{next(iter(valid))}"
    row["best"] = True
    for earlier in rows:
        if earlier[score] < row[score]:
            row["best"] = False
    rows.append(row)

    # time left: the later epochs, and the test
    costs = []
    for epoch in range(args.epochs):
        costs.append(cost_of(epoch) if cost_of else 1)
    done = sum(costs[: len(rows)])
    left = sum(r["seconds"] for r in rows) * (sum(costs) - done) / done
    left += 2 * args.test_samples * valid["seconds"]  # twice as many images, in MNIST
    minutes, seconds = divmod(round(left), 60)
    clock = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    star = "*" if row["best"] else " "
    number = f"{row['epoch']}/{args.epochs}"
    digits = 2 if abs(row["valid_neg_elbo"]) < 1000 else 1  # a line has at most 80 columns
    train = f"{row['train_neg_elbo']:.2f}"
    text = f"epoch {number:>7}  train {train}  valid {describe(valid, digits)} {star}"
    print(f"{text:65} {clock:>8} left", flush=True)  # padded, to overwrite the live line
    return row["best"]


def describe(figures, digits=2):
    """The figures of an evaluation as text; digits: of the parts of the -ELBO."""
    text = f"{figures['neg_elbo']:.2f}"
    if "kl" in figures:
        text += f" = {figures['rec']:.{digits}f} + {figures['kl']:.{digits}f}"
    if "error" in figures:
        text = f"error {figures['error']:.2f} %, -ELBO {text}"
    return text


def write(path, content):
    """Write bytes to a temporary file, then rename it: no file is ever half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save(folder, facts, rows, parts):
    """Write log.csv, curve.png, checkpoint.pt, and best.pt if this epoch is the best."""
    global saved_in
    state = {name: part.state_dict() for name, part in parts.items()}
    checkpoint = io.BytesIO()
    torch.save({**facts, "rows": rows, **state}, checkpoint)
    if rows[-1]["best"] or not (folder / "best.pt").exists():
        write(folder / "best.pt", checkpoint.getvalue())
    log = io.StringIO()
    writer = csv.DictWriter(log, rows[-1])
    writer.writeheader()
    writer.writerows(rows)
    write(folder / "log.csv", log.getvalue().encode())
    draw_curve(folder, rows)
    write(folder / "checkpoint.pt", checkpoint.getvalue())  # says that the epoch is done
    saved_in = folder


def draw_curve(folder, rows):
    """curve.png: training and validation, epoch by epoch."""
    from matplotlib.figure import Figure

    panels = [("neg_elbo", "-ELBO, nats")]
    if "valid_error" in rows[0]:
        panels.append(("error", "error, %"))
    figure = Figure((10, 5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (name, label) in zip(axes, panels, strict=True):
        late = []  # the first epochs are so bad that they would hide the others
        for part, colour in ("train", "tab:blue"), ("valid", "tab:orange"):
            if f"{part}_{name}" in rows[0]:
                values = [row[f"{part}_{name}"] for row in rows]
                ax.plot(range(1, len(rows) + 1), values, ".-", color=colour, label=part)
                late += values[len(rows) // 5 :]
        margin = 0.05 * (max(late) - min(late)) + 1e-9
        ax.set(xlabel="epoch", ylabel=label, ylim=(min(late) - margin, max(late) + margin))
        ax.legend()
    figure.savefig(folder / "curve.png")


def finish(args, folder, facts, rows, model, test):
    """Write results.json and print its figures, the test's and those of the best epoch."""
    results = {**facts, "test_nll": None}  # None if it was not estimated
    results.update({f"test_{name}": value for name, value in test.items()})
    for row in rows:
        if row["best"]:  # the last of them is the best of all
            results.update(
                {name: value for name, value in row.items() if name.startswith("valid_")}
            )
    if "valid_error" in results:  # the usual name of a classifier's error
        results["val_error"] = results.pop("valid_error")
    speeds = [row["examples_per_second"] for row in rows] or [0.0]
    results.update(
        params=size(model),
        epochs=len(rows),
        seconds=sum(row["seconds"] for row in rows),
        examples_per_second=statistics.median(speeds),
        torch=torch.__version__,
        test_samples=args.test_samples,
    )
    write(folder / "results.json", json.dumps(results, indent=2).encode())
    text = f"test {describe(test)} nats"
    if "nll" in test:
        text += f", -log p {test['nll']:.2f} ({args.test_samples} samples)"
    print(f"{text:79}\npictures and results.json are in {folder}")
    if args.dataset == "auto" and facts["dataset"] == "glyphs":
        print(NOT_MNIST)


# ---------------------------------------------------------------------------
# pictures


def save_grid(path, images, title, row_names=(), column_names=()):
    """A picture of images (rows, columns, C, H, W) in [0, 1], with names of rows and columns."""
    from matplotlib.figure import Figure

    rows, columns, channels, height, width = images.shape
    tiles = F.pad(images.cpu().float().clamp(0, 1), (1, 1, 1, 1), value=0.5)
    height, width = height + 2, width + 2
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    if channels != 3:
        picture = picture.mean(2)
    inches = max(8.0, 0.8 * columns)
    tile = min(inches / columns, 2)
    tall = tile * rows * height / width + 0.7  # with title and names of columns
    figure = Figure((inches, min(tall, 300)), layout="constrained")  # larger ones can't be drawn
    ax = figure.subplots()
    ax.imshow(picture, "gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([(i + 0.5) * width - 0.5 for i in range(len(column_names))], column_names)
    ax.set_yticks([(i + 0.5) * height - 0.5 for i in range(len(row_names))], row_names)
    ax.xaxis.tick_top()
    ax.set_title(title)
    ax.tick_params(length=0)
    for text in ax.get_xticklabels() + ax.get_yticklabels():
        text.set_parse_math(False)  # a name may have a dollar
    figure.savefig(path, dpi=120)


def save_animation(path, canvases, windows=()):
    """An animated GIF of canvases (T, n, C, H, W), ten a row, with windows (n, 5) as boxes."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import draw_bounding_boxes, make_grid

    steps, n, _, height, width = canvases.shape
    scale = 4
    images = canvases.cpu().float().expand(-1, -1, 3, -1, -1)
    images = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    size = scale * torch.tensor([width, height, width, height])
    for step, window in zip(images[:-1], windows, strict=False):  # the last frame has no boxes
        g_x, g_y, _, log_delta, _ = window.cpu().float().unbind(1)  # eq. 21
        half = log_delta.exp()  # roughly through the outermost filters
        boxes = torch.stack([g_x - half, g_y - half, g_x + half, g_y + half], 1)  # in [-1, 1]
        boxes = (boxes.clamp(-0.99, 0.99) + 1) / 2 * size
        for i in range(n):
            # step is a view of images
            step[i] = draw_bounding_boxes(step[i], boxes[i : i + 1], colors="red", width=2)
    frames = [to_pil_image(make_grid(step, min(n, 10), pad_value=0.3)) for step in images]
    durations = [120] * (steps - 1) + [2000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=durations)
