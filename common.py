"""What the scripts share: flags, device, data, ELBO helpers, evaluation and the bookkeeping of a run.

No model and no training step lives here. Each script imports this file inside its `main()`, so that a
script copied elsewhere without it still defines, trains and samples its model.
"""
import argparse
import contextlib
import copy
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import wave
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed
from torch.overrides import TorchFunctionMode


def fail(message):
    """End the program with one line on standard error and status 2; under torchrun, one line in all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_words(kind, error, trace):
    """An excepthook: Ctrl-C outside training, and a device whose memory is full, end with a line, too."""
    if kind is KeyboardInterrupt:
        print("\nstopped", flush=True)
        sys.exit(130)
    if re.search("out of memory|not enough memory|can't allocate", str(error)) or kind is MemoryError:
        fail(f"out of memory ({first_line(error)}); take a smaller model or --batch-size")
    sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def at_least(low, kind=int):
    """An argparse type: a whole number, or with kind=float a finite number, of at least `low`."""
    def convert(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and value >= low:
                return value
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number of at least {low}, not {text!r}")
    return convert


def parser(doc, epochs, batch_size, lr, test_samples, datasets=("mnist", "fashion-mnist", "kmnist", "glyphs")):
    """The flags that every script has; the defaults are the script's own."""
    p = Parser(description=doc, formatter_class=Help, allow_abbrev=False)
    p.add_argument("--dataset", choices=datasets, help="None: mnist if it can be had, else glyphs")
    p.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--out-dir", help="None: out/SCRIPT, or the next free number after it")
    p.add_argument("--epochs", type=at_least(0), default=epochs, help="train up to this many in all")
    p.add_argument("--batch-size", type=at_least(1), default=batch_size, help="examples in a step")
    p.add_argument("--lr", type=at_least(1e-9, float), default=lr, help="Adam's learning rate")
    p.add_argument("--seed", type=at_least(0), default=0, help="of weights, noise and order")
    p.add_argument("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    p.add_argument("--resume", metavar="PATH", help="go on from this checkpoint, with its flags")
    p.add_argument("--compile", action="store_true", help="compile the step with torch.compile")
    p.add_argument("--dry-run", action="store_true", help="one batch of everything, to see it work")
    p.add_argument("--test-samples", type=at_least(1), default=test_samples, metavar="K",
                   help="importance samples of the test log-likelihood")
    return p


def parse(p, argv=None):
    """Parse, take over a checkpoint's flags where none are given, choose the device, seed."""
    args, script, checkpoint = p.parse_args(argv), Path(inspect.stack()[1].filename).stem, None
    sys.excepthook = last_words
    if args.resume:
        checkpoint = load_checkpoint(args.resume, script)
        p.set_defaults(**{k: v for k, v in checkpoint["args"].items()
                          if k not in ("out_dir", "device", "compile", "dry_run", "resume")})
        args = p.parse_args(argv)
    args.script, args.checkpoint = script, checkpoint
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.dry_run:
        args.epochs, args.test_samples = (checkpoint["epoch"] if checkpoint else 0) + 1, 4
    if args.device == "auto":
        args.device = ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if args.device == "cuda" and args.world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {args.device} can't be used here ({first_line(error)}); try auto or cpu")
    compiler = os.environ.get("CXX", "g++")
    if args.compile and args.device == "cpu" and not shutil.which(compiler):
        fail(f"--compile needs a C++ compiler on a CPU, and {compiler} is not there; install it, or leave it out")
    if args.world > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if "cuda" in args.device else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)                # tiny numbers would slow a CPU several times
    # may round products' factors, as for tensor cores; on a CPU, the library that is faster unless products are tiny
    torch.set_float32_matmul_precision("highest" if 0 < (args.batch_size or 0) < 16 else "medium")
    return args


def compiled(step, args, steady=True):
    """A step, under --compile compiled; on CUDA, if every batch takes as many of them, in the mode that captures graphs."""
    if not args.compile:
        return step
    return torch.compile(step, mode="reduce-overhead" if steady and "cuda" in args.device else "default")


# ----------------------------------------------------------------------------------------------- data

def images(args):
    """The image data set of the flags, whole, on the device; sets args.dataset to what was found.

    Returns `train`, `valid`, `test`, each (x, y) with grey x (N, C, H, W) uint8 and labels y (N,)
    int64; `shape` (C, H, W); `num_classes`.
    """
    name, splits = args.dataset or "mnist", None
    if name != "glyphs":
        splits = torchvision_images(name, Path(args.data_dir), required=args.dataset is not None)
    if splits is None:
        if name != "glyphs":
            print(f"NOT MNIST: it is not in {args.data_dir} and can't be downloaded. "
                  "Using glyphs instead: digits drawn from matplotlib's fonts.", flush=True)
        name, (x, y), sizes = "glyphs", glyph_images(24_000, seed=0), (20_000, 2_000, 2_000)
        splits = zip(x.split(sizes), y.split(sizes))
    args.dataset, n = name, (args.batch_size or 32) if args.dry_run else None
    train, valid, test = [[t[:n].to(args.device) for t in split] for split in splits]
    return SimpleNamespace(train=train, valid=valid, test=test, shape=tuple(train[0].shape[1:]), num_classes=10)


def torchvision_images(name, root, required):
    """MNIST or its kin: train = [5000:], valid = [:5000], test; None if it can't be had and isn't required.

    torchvision tries its mirrors in turn and checks the MD5 sum of what it downloads.
    """
    from torchvision import datasets
    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]
    raw = root / kind.__name__ / "raw"
    download = not all((raw / Path(file).stem).exists() for file, _ in kind.resources)
    if download and not required and not any(map(reachable, kind.mirrors)):
        return None
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
        (x, y), (x_test, y_test) = [(part.data[:, None], part.targets) for part in parts]
        for a, b in ((x, y), (x_test, y_test)):
            if a.shape[1:] != (1, 28, 28) or len(a) != len(b) or len(x) <= 5000 or b.max() > 9:
                raise ValueError(f"images {tuple(a.shape)} and labels {tuple(b.shape)} don't fit")
    except Exception as error:  # torchvision lets through whatever its parser stumbles over
        if download and not required:
            return None
        fail(f"{name} can't be downloaded ({first_line(error)}); put its files into {raw}, or use --dataset glyphs"
             if download else f"{name} in {raw} is damaged ({first_line(error)}); delete it to download it again")
    return (x[5000:], y[5000:]), (x[:5000], y[:5000]), (x_test, y_test)


def reachable(url, seconds=6):
    """Whether a server answers in time; in a thread, because a name look-up has no time limit."""
    def ask():
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(url, timeout=seconds).close()
            except urllib.error.HTTPError:
                pass
            answers.append(url)
    answers, thread = [], threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def random_affine(n, generator=None, device="cpu", rotate=15, scale=0.15, shear=0.2, shift=0.1):
    """(n, 2, 3) maps for `warp`, uniform within degrees, relative sizes, slope, and fractions of half the width."""
    angle, sx, sy, k, dx, dy = torch.rand(6, n, generator=generator, device=device) * 2 - 1
    angle, sx, sy, k = angle * math.radians(rotate), 1 + scale * sx, 1 + scale * sy, k * shear
    cos, sin = angle.cos(), angle.sin()
    rows = [sx * cos, sx * (k * cos - sin), shift * dx, sy * sin, sy * (k * sin + cos), shift * dy]
    return torch.stack(rows, -1).view(n, 2, 3)


def warp(x, theta):
    """Images x (N, C, H, W) moved by affine maps theta (N, 2, 3); 0 comes in from outside."""
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def glyph_fonts():
    """Those of matplotlib's own fonts that have usual digits, as file names."""
    from matplotlib import get_data_path
    odd = ("LastResort", "Display", "NonUni", "Siz", "cmex", "cmmi", "cmsy")
    fonts = sorted(Path(get_data_path(), "fonts/ttf").glob("*.ttf"))
    return [str(f) for f in fonts if not any(o in f.name for o in odd)]


def glyph_images(n, seed):
    """Digits 0-9 in matplotlib's fonts, moved at random: x (n, 1, 28, 28) uint8 and y (n,) int64."""
    from matplotlib.ft2font import FT2Font
    fonts, g = [FT2Font(name) for name in glyph_fonts()], torch.Generator().manual_seed(seed)
    shapes = torch.zeros(len(fonts), 10, 1, 56, 56)
    for (f, font), digit in ((pair, d) for pair in enumerate(fonts) for d in range(10)):
        font.set_size(48, 72)
        font.set_text(str(digit), 0)
        font.draw_glyphs_to_bitmap(antialiased=True)
        ink = torch.from_numpy(np.array(font.get_image())[:56, :56])
        top, left = (56 - ink.shape[0]) // 2, (56 - ink.shape[1]) // 2
        shapes[f, digit, 0, top:top + ink.shape[0], left:left + ink.shape[1]] = ink
    y, f = torch.randint(10, (n,), generator=g), torch.randint(len(fonts), (n,), generator=g)
    parts = zip(f.split(1000), y.split(1000), (1.1 * random_affine(n, g)).split(1000))
    return torch.cat([F.avg_pool2d(warp(shapes[f, y], t), 2) for f, y, t in parts]).round().to(torch.uint8), y


def glyph_strokes(n, seed, step=0.08):
    """The outlines of such digits as pen strokes: a list of n tensors (T_i, 3), and labels (n,) int64.

    A row is (dx, dy, pen-up) with pen-up 1 at a stroke's last point; digits are about 1 high, moves `step` long.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    fonts, g, sequences = glyph_fonts(), torch.Generator().manual_seed(seed), []
    y, which = torch.randint(10, (n,), generator=g), torch.randint(len(fonts), (n,), generator=g)
    outlines = {key: TextPath((0, 0), str(key[1]), 1.4, prop=FontProperties(fname=fonts[key[0]])).to_polygons()
                for key in set(zip(which.tolist(), y.tolist()))}
    for f, digit, theta in zip(which.tolist(), y.tolist(), random_affine(n, g).numpy()):
        strokes = []
        for polygon in outlines[f, digit]:
            polygon = polygon @ theta[:, :2].T
            length = np.r_[0, np.hypot(*np.diff(polygon, axis=0).T).cumsum()]
            at = np.linspace(0, length[-1], max(3, round(length[-1] / step)))
            strokes.append(np.stack([np.interp(at, length, c) for c in polygon.T], 1))
        sequences.append(strokes_to_moves(strokes, "glyphs"))
    return sequences, y


def sequences(args):
    """The sequence data set of the flags, whole, on the device; sets args.dataset to what was found.

    Returns `train`, `valid`, `test`, each (x, lengths, y): x (N, T, D), padded with zeros, as uint8 rows of images or
    as floats divided by `scale`; lengths (N,), on the CPU; y (N,) int64. `kind` is "rows", "pen" or "speech"; `unit`
    the step, in x, of the integers that the values were recorded as, or 0; num_classes 0 if there are no labels.
    """
    name = args.dataset
    if name in ("pendigits", "iam-ondb", "speech", "wav"):
        load = {"pendigits": pendigits, "iam-ondb": iam_ondb, "speech": spoken_digits, "wav": wav_folder}[name]
        parts, unit, kind = load(Path(args.data_dir)), 1.0, "speech" if name in ("speech", "wav") else "pen"
    else:
        data = images(args) if name != "glyphs" else None
        if data and args.dataset != "glyphs":
            parts = [(x.flatten(1, 2), torch.full((len(x),), x.shape[1] * x.shape[2]), y)
                     for x, y in (data.train, data.valid, data.test)]
            return SimpleNamespace(train=parts[0], valid=parts[1], test=parts[2], kind="rows", scale=1.0, unit=0.0,
                                   num_classes=data.num_classes)
        x, y = glyph_strokes(6000, seed=0)
        parts, unit, kind = [(x[a:b], y[a:b]) for a, b in ((0, 5000), (5000, 5500), (5500, 6000))], 0.0, "pen"
    signal = slice(None) if kind == "speech" else slice(2)
    scale = float(torch.cat([s[:, signal] for s in parts[0][0]]).square().mean().sqrt()) or 1.0
    longest, n = max(len(s) for x, _ in parts for s in x), (args.batch_size or 32) if args.dry_run else None
    ready = []
    for x, y in parts:
        padded = torch.zeros(len(x[:n]), longest, x[0].shape[1])
        for row, s in zip(padded, x):
            row[:len(s)] = s
            row[:, signal] /= scale
        lengths, y = torch.tensor([len(s) for s in x[:n]]), torch.as_tensor(y[:n]).to(args.device)
        ready.append((padded.to(args.device), lengths, y))
    return SimpleNamespace(train=ready[0], valid=ready[1], test=ready[2], kind=kind, scale=scale, unit=unit / scale,
                           num_classes=10 if max(parts[0][1]) > 0 else 0)


def strokes_to_moves(strokes, file, limit=2000):
    """Lists of (x, y) points -> (T, 3) rows of (dx, dy, pen-up), pen-up 1 at the last point of a stroke."""
    strokes = [np.c_[np.array(s), np.arange(len(s)) == len(s) - 1] for s in strokes if len(s)]
    points = np.concatenate(strokes or [np.empty((0, 3))])
    if not 0 < len(points) <= limit:
        fail(f"{file}: has {len(points)} points; a sequence has 1 to {limit}")
    points[:, :2] = np.diff(points[:, :2], axis=0, prepend=points[:1, :2])
    return torch.from_numpy(points).float()


def pendigits(root):
    """Pen-Based Recognition of Handwritten Digits (Alpaydin & Alimoglu 1998), UNIPEN text: three lists of (x, y)."""
    folder, parts = root / "pendigits", []
    if not all((folder / f"pendigits-orig.{part}.Z").exists() for part in ("tra", "tes")):
        download("https://archive.ics.uci.edu/static/public/81/pen+based+recognition+of+handwritten+digits.zip", folder,
                 "cd620bc67fb841b05abece060330ad57ffda5398f7dde0bdd595f689ec78d313", r"pendigits-orig\.t(ra|es)\.Z")
    for file, size in (("pendigits-orig.tra.Z", 7494), ("pendigits-orig.tes.Z", 3498)):
        done = subprocess.run(["gzip", "-dc", str(folder / file)], capture_output=True)   # Python has no LZW
        digits = done.stdout.decode("latin-1").split(".SEGMENT DIGIT")[1:]
        if done.returncode or len(digits) != size:
            fail(f"{folder / file}: damaged, {len(digits)} digits of {size}; delete it to download it again")
        x = [[[tuple(map(float, p.split())) for p in re.findall(r"^ *-?\d+ +-?\d+ *$", stroke, re.M)]
              for stroke in re.findall(r"\.PEN_DOWN(.*?)\.PEN_UP", d, re.S)] for d in digits]
        y = [int(re.search(r'"(\d)"', d)[1]) for d in digits]
        parts.append(([strokes_to_moves(s, folder / file) for s in x], y))
    (x, y), test = parts
    n = len(x) // 10
    return (x[:-n], y[:-n]), (x[-n:], y[-n:]), test


def iam_ondb(root):
    """The user's copy of the IAM On-Line Handwriting Database's lineStrokes: three lists of (x, y), y all 0.

    Split by trainset.txt, testset_v.txt and testset_f.txt if they are in `root`, else by writers' folders, 8 : 1 : 1.
    """
    files, lists = sorted(root.glob("**/lineStrokes/**/*.xml")), ("trainset.txt", "testset_v.txt", "testset_f.txt")
    if not files:
        fail(f"no lineStrokes/**/*.xml in {root}; IAM-OnDB has to be registered for and downloaded by hand")
    names = [set((root / f).read_text().split()) if (root / f).exists() else None for f in lists]
    folders = sorted({f.parent for f in files})
    parts = [], [], []
    for file in files:
        if None in names:
            i = [0, 0, 0, 0, 0, 0, 0, 0, 1, 2][-1 - folders.index(file.parent) % 10]
        else:
            i = next((i for i, part in enumerate(names) if file.stem.rsplit("-", 1)[0] in part), None)
        try:
            strokes = [[(float(p.get("x")), -float(p.get("y"))) for p in s.iter("Point")]
                       for s in ElementTree.parse(file).iter("Stroke")]
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            fail(f"{file}: not a file of strokes ({first_line(error)})")
        if i is not None:
            parts[i].append(strokes_to_moves(strokes, file))
    return three_parts(parts, root)


def three_parts(parts, root):
    if not all(parts):
        fail(f"{root}: {' / '.join(str(len(p)) for p in parts)} sequences for training / validation / test, and each "
             "needs one")
    return [(p, [0] * len(p)) for p in parts]


def spoken_digits(root, rate=8000):
    """Free Spoken Digit Dataset: recordings 0-4 test, 5-9 validation, the others training; three lists of (x, y)."""
    folder = root / "free-spoken-digit-dataset-1.0.10" / "recordings"
    if len(list(folder.glob("*.wav"))) < 3000:
        download("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip", folder,
                 "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e", r".*/recordings/(\d_[a-z]+_\d+\.wav)")
    parts = [], [], []
    for file in sorted(folder.glob("*_*_*.wav")):
        digit, _, index = file.stem.split("_")
        parts[2 if int(index) < 5 else 1 if int(index) < 10 else 0].append((frames(file, rate), int(digit)))
    return [tuple(zip(*p)) for p in parts]


def wav_folder(root, rate=8000):
    """All WAV files below a folder, in a fixed random order, 8 : 1 : 1; three lists of (x, y), y all 0."""
    files = sorted(f for f in root.glob("**/*") if f.suffix.lower() == ".wav")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    x = [frames(files[i], rate) for i in order]
    n = max(1, len(x) // 10)
    return three_parts((x[2 * n:], x[n:2 * n], x[:n]), root)


def frames(file, rate, size=200, limit=2000):
    """A WAV file, mono or stereo, 16 bit, as (T, size) samples at `rate`, in its integers' unit; zeros fill the end."""
    try:
        with wave.open(str(file)) as w:
            data, (channels, width, old, *_) = w.readframes(w.getnframes()), w.getparams()
    except (wave.Error, EOFError, OSError) as error:
        fail(f"{file}: not a WAV file ({first_line(error)})")
    if width != 2 or channels not in (1, 2):
        fail(f"{file}: {8 * width} bit and {channels} channels; must be 16 bit, and mono or stereo")
    x = torch.from_numpy(np.frombuffer(data[:len(data) // (2 * channels) * 2 * channels], "<i2").astype(np.float32))
    x = x.view(-1, channels).mean(1)
    if old != rate and len(x):   # in frequency: what the new rate can't hold is left out
        n = max(1, round(len(x) * rate / old))
        x = torch.fft.irfft(torch.fft.rfft(x)[:n // 2 + 1], n) * (n / len(x))
    if not 0 < len(x) <= limit * size:
        fail(f"{file}: {len(x)} samples at {rate} Hz; must be 1 to {limit * size}")
    return F.pad(x, (0, -len(x) % size)).view(-1, size)


def download(url, folder, sha256, members):
    """Fetch a zip and put the members whose whole name fits the pattern, flat, into `folder`.

    sha256 is that of names and contents in the order of names: it outlives a new packing of the archive.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            archive = zipfile.ZipFile(io.BytesIO(answer.read()))
        files = {Path(m).name: archive.read(m) for m in archive.namelist() if re.fullmatch(members, m)}
        if hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest() != sha256:
            raise OSError("its checksum is wrong")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        fail(f"can't download {url} ({first_line(error)}); put its files into {folder}, or use --dataset glyphs")
    for name, content in files.items():
        write(folder / name, lambda path: path.write_bytes(content))


def grey(x, seed=None):
    """uint8 images as floats in [0, 1]."""
    return x.float() / 255


def uniform(x, seed=None):
    """Numbers in [0, 1) of x's shape: new ones at every call, or the same for a seed, on any device."""
    g = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.rand(x.shape, generator=g, device=None if g else x.device).to(x.device)


def binarise(x, seed=None):
    """Pixels from Bernoulli(x / 255), drawn as `uniform` draws."""
    return (uniform(x, seed) * 255 < x).float()


def dct(n, device="cpu"):
    """The orthonormal discrete cosine transform: (n, n), to multiply a frame of n samples with from the right."""
    k = torch.arange(n, dtype=torch.float64)
    return (torch.cos(math.pi / n * (k[:, None] + 0.5) * k) * torch.where(k > 0, 2 / n, 1 / n) ** 0.5).float().to(device)


def round_up(n, to=8):
    """n as a multiple of `to`: where sizes differ less, memory that was freed is used again."""
    return -(-n // to) * to


def exact_product(a, b):
    """a @ b in full float32, whatever `parse` allows elsewhere."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    product = a @ b
    torch.set_float32_matmul_precision(allowed)
    return product


# --------------------------------------------------------------------------------------- ELBO helpers

def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(N(mu_q, e^logvar_q) || N(mu_p, e^logvar_p)), elementwise, in nats."""
    return 0.5 * (logvar_p - logvar_q - 1 + (logvar_q - logvar_p).exp() + (mu_q - mu_p) ** 2 / logvar_p.exp())


def log_mean_exp(log_w, dim=0):
    """log of the mean of exp(log_w) along `dim`: the importance-weighted bound (Burda et al. 2016, eq. 8)."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def random_states(device):
    """The states of the generators of the CPU and of a device, under the names of their kinds."""
    kind = torch.device(device).type
    states = {"cpu": torch.get_rng_state()}
    if kind != "cpu":
        states[kind] = torch.cuda.get_rng_state(device) if kind == "cuda" else torch.mps.get_rng_state()
    return states


def set_random_states(states, device):
    """What `random_states` gave, where this device has such a generator."""
    torch.set_rng_state(states["cpu"])
    kind = torch.device(device).type
    if kind != "cpu" and kind in states:
        torch.cuda.set_rng_state(states[kind], device) if kind == "cuda" else torch.mps.set_rng_state(states[kind])


@torch.inference_mode()
def evaluate(bound, x, y, samples=1, rows=4096):
    """Mean bounds over a data set in nats per example: a dict of neg_elbo, rec and kl and, for samples > 1, nll.

    bound(x, y, k) -> log_px, kl, log_w, each (k, B). nll estimates -log p(x) by importance sampling (Burda et
    al. 2016, eq. 8), from above in expectation. `rows` samples are decoded at once, or fewer. The noise is the
    same at every call, and the training's noise is left alone.
    """
    k, sums = min(samples, 64, rows), torch.zeros(3, dtype=torch.float64)
    before = random_states(x.device)
    torch.manual_seed(0)
    for xs, ys in zip(x.split(rows // k), y.split(rows // k)):
        log_px, kl, log_w = bound(xs, ys, k)
        total = torch.logsumexp(log_w, 0)
        for done in range(k, samples, k):
            total = torch.logaddexp(total, torch.logsumexp(bound(xs, ys, min(k, samples - done))[2], 0))
        sums += torch.stack([log_px.mean(0), kl.mean(0), total - math.log(samples)]).cpu().double().sum(1)
    set_random_states(before, x.device)
    log_px, kl, log_p = (sums / len(x)).tolist()
    return {"neg_elbo": kl - log_px, "rec": -log_px, "kl": kl, **({"nll": -log_p} if samples > 1 else {})}


# ------------------------------------------------------------------------------------------------ run

def write(path, save):
    """Let save(temporary path) write the file, then rename it: half a file never bears its name."""
    try:
        save(path.with_name(path.name + ".tmp"))
        os.replace(path.with_name(path.name + ".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when a disk is full
        fail(f"can't write {path} ({first_line(error)}); what was there before is untouched")


def load_checkpoint(path, script):
    """A checkpoint of this script as a dict of tensors and plain values; ends the program if it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        writer = checkpoint["script"]
    except OSError as error:
        fail(f"--resume {path}: {error.strerror or error}")
    except Exception:  # unpickling something else raises almost anything
        fail(f"--resume {path}: damaged, or not a checkpoint of these scripts")
    if writer != script:
        fail(f"--resume {path}: written by {writer}.py; {script}.py needs one of its own")
    return checkpoint


def plain(args):
    return {k: v for k, v in vars(args).items() if k not in ("script", "checkpoint", "rank", "world")}


def show(figures):
    return ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


class SharedNoise(TorchFunctionMode):
    """Noise under torchrun: every process draws that of the whole batch and keeps the part of its own `size` examples.

    So the processes together draw what one alone would, and their random states stay the same.
    """

    def __init__(self, rank, size, world):
        super().__init__()
        self.rank, self.size, self.world = rank, size, world

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.rand, torch.randn, torch.randn_like, torch.randint):
            return func(*args, **kwargs)
        if func is torch.randn_like:
            func, args, kwargs = torch.randn, (args[0].shape,), {"device": args[0].device, "dtype": args[0].dtype}
        *first, shape = args if args and isinstance(args[-1], tuple) else (args,)
        if self.size not in shape:
            return func(*args, **kwargs)
        dim = shape.index(self.size)
        whole = func(*first, (*shape[:dim], self.size * self.world, *shape[dim + 1:]), **kwargs)
        return whole.narrow(dim, self.rank * self.size, self.size)


class Run:
    """The batches that are left to train on, and what has to be done between them.

    Iterating yields (x, y) of the training split, shuffled anew each epoch by the seed; of (x, lengths, y) it
    yields sequences of like lengths together, padded to the longest of them or a little more. After every step the
    weights enter a running average with the profile t^gamma (Karras et al. 2024, sec. 3.1), which does what a
    falling learning rate would, without knowing when training ends. After every epoch come the validation of
    the averaged model, validate(model) -> dict whose first value is to be minimised, a line of the log, and
    the checkpoint, whose `model` is the averaged one.
    """
    gamma, save_every = 12.0, 180   # save_every: seconds, within an epoch
    state = ("epoch", "step", "rows", "seconds", "speeds", "best", "pending")

    def __init__(self, args, model, model_args, optimizer, train, validate):
        self.args, self.model, self.model_args, self.optimizer = args, model, model_args, optimizer
        self.train, self.validate, self.stop = train, validate, False
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = list(zip(self.average.state_dict().values(), model.state_dict().values()))
        self.floats = list(map(list, zip(*(p for p in pairs if p[0].is_floating_point()))))
        self.others = [p for p in pairs if not p[0].is_floating_point()]
        self.epoch, self.step, self.seconds, self.best = 0, 0, 0.0, math.inf
        self.rows, self.speeds, self.pending = [], [], []
        if args.checkpoint:
            self.load(args.checkpoint)
        self.params = sum(p.numel() for p in model.parameters())
        if args.batch_size % args.world:
            fail(f"--batch-size {args.batch_size} can't be shared by {args.world} processes; take a multiple of that")
        if args.rank:  # one process writes, and validates
            return
        self.dir = self.folder()
        print(f"{args.script}: {args.dataset}, {len(train[0]):,} training examples, device {args.device}, "
              f"{self.params:,} parameters, writing to {self.dir}\n "
              + " ".join(f"{k}={v}" for k, v in plain(args).items()), flush=True)

    def folder(self):
        """Where to write: a new folder, or the run's own when it goes on; never over another run."""
        args, source = self.args, Path(self.args.resume or "").parent
        going_on = args.checkpoint and args.epochs > 0 and not args.dry_run
        free = [Path("out", args.script), *(Path("out", f"{args.script}-{n}") for n in range(2, 10_000))]
        named = [Path(args.out_dir)] if args.out_dir else [source] if going_on else []
        for folder in named or (f for f in free if not f.exists()):   # a run's may have nothing in it yet
            try:
                folder.mkdir(parents=True, exist_ok=bool(named))
                if not os.access(folder, os.W_OK):
                    raise PermissionError(13, "Permission denied")
            except OSError as error:
                fail(f"can't write to {folder} ({error.strerror}); choose another --out-dir")
            used = any((folder / f).exists() for f in ("checkpoint.pt", "best.pt", "results.json", "samples.png"))
            if not used or going_on and folder.resolve() == source.resolve():
                return folder
        fail(f"{folder} already holds a run; choose another --out-dir, or --resume its checkpoint.pt or best.pt")

    def __iter__(self):
        n, size = len(self.train[0]), min(self.args.batch_size, len(self.train[0]))
        rank, world = self.args.rank, self.args.world
        size, share = size // world * world, size // world
        self.before = signal.signal(signal.SIGINT, signal.SIG_IGN if rank else lambda *_: setattr(self, "stop", True))
        while self.epoch < self.args.epochs:
            g = torch.Generator().manual_seed(self.args.seed * 10_007 + self.epoch)
            order = torch.randperm(n, generator=g)[:n // size * size]
            if len(self.train) == 3:
                order = order[self.train[1][order].argsort(stable=True)]
                order = order.view(-1, size)[torch.randperm(n // size, generator=g)].flatten()
                longest = round_up(self.train[1][order].view(-1, size).amax(1)).tolist()
            order = order.view(-1, world, share)[:, rank].flatten()
            batches = {d: order.to(d).split(share) for d in {t.device for t in self.train}}
            first, start = len(self.pending), time.time()
            shown = saved = mark = start
            self.model.train()
            for i in range(first, n // size):
                batch = tuple(t[batches[t.device][i]] for t in self.train)
                if len(batch) == 3:  # little more padding than the whole batch needs
                    batch = batch[0][:, :longest[i]], *batch[1:]
                with SharedNoise(rank, share, world) if world > 1 else contextlib.nullcontext():
                    yield batch
                self.step += 1
                if rank:
                    continue
                self.update_average()
                now = time.time()
                if now - shown > 1 and sys.stdout.isatty():
                    print(f"\r  epoch {self.epoch + 1}: {i + 1}/{n // size} ", end="", flush=True)
                    shown = now
                if i + 1 < n // size and (self.stop or now - saved > self.save_every):   # else `end_epoch` saves
                    self.seconds, mark, saved = self.seconds + now - mark, now, now
                    self.figures()
                    self.save("checkpoint.pt")
                    if self.stop:
                        self.leave()
            self.speeds.append((n // size - first) * size / (time.time() - start))
            if rank:
                self.epoch, self.pending = self.epoch + 1, []
            else:
                self.end_epoch(mark)
                if self.stop:
                    self.leave()
        if world > 1:
            distributed.destroy_process_group()
        if rank:
            sys.exit(0)
        signal.signal(signal.SIGINT, self.leave)   # until `finish`
        if self.stop:
            self.leave()

    def leave(self, *_):
        signal.signal(signal.SIGINT, self.before)
        last = self.dir / "checkpoint.pt"
        print(f"\nstopped; go on with --resume {last if last.exists() else self.args.resume}", flush=True)
        sys.exit(130)

    def end_epoch(self, mark):
        """Validate, log and save; `mark` is since when the time has not been counted."""
        train, valid = self.figures(), self.validate(self.average)
        self.epoch, self.pending, self.seconds = self.epoch + 1, [], self.seconds + time.time() - mark
        self.rows.append({"epoch": self.epoch, "step": self.step, **{f"train_{k}": v for k, v in train.items()},
                          **{f"valid_{k}": v for k, v in valid.items()}})
        gone, left = (f"{int(s) // 60}:{int(s) % 60:02d}" for s in (
            self.seconds, self.seconds / self.epoch * (self.args.epochs - self.epoch)))
        print(("\r" if sys.stdout.isatty() else "") + f"epoch {self.epoch}/{self.args.epochs}  train {show(train)}"
              f"  valid {show(valid)}  {self.speeds[-1]:,.0f} examples/s  {gone} gone, {left} left", flush=True)
        value = next(iter(valid.values()))
        better, self.best = value <= self.best, min(self.best, value)   # a NaN is not better
        lines = [self.rows[0], *(row.values() for row in self.rows)]
        write(self.dir / "log.csv", lambda path: path.write_text("".join(",".join(map(str, r)) + "\n" for r in lines)))
        if better:   # checkpoint.pt comes last: it says that all of this is done
            self.save("best.pt")
            write(self.dir / "checkpoint.pt", lambda path: shutil.copyfile(self.dir / "best.pt", path))
        else:
            self.save("checkpoint.pt")

    def share(self):
        """Under torchrun: give every process the mean of all processes' gradients, and of what they have just logged.

        What DistributedDataParallel does for a model's `forward`; these models have other methods that train.
        """
        if self.args.world > 1:
            tensors = [p.grad for p in self.model.parameters() if p.grad is not None] + self.pending[-1:]
            flat = torch.cat([t.flatten() for t in tensors])
            try:
                distributed.all_reduce(flat)
            except RuntimeError:  # the first process has saved and gone
                sys.exit(130)
            for t, part in zip(tensors, (flat / self.args.world).split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def log(self, loss, **figures):
        """Keep this step's means; they stay on the device until the epoch ends."""
        self.names = ("loss", *figures)
        self.pending.append(torch.stack([torch.as_tensor(f, device=loss.device).detach().float().mean()
                                         for f in (loss, *figures.values())]))

    def figures(self):
        """The epoch's means so far; ends the program if a loss was not finite."""
        table = torch.stack(self.pending).cpu()
        bad = (~table[:, 0].isfinite()).nonzero()
        if len(bad):
            last = self.dir / "checkpoint.pt"
            fail(f"the loss of step {self.step - len(table) + int(bad[0]) + 1} is {float(table[bad[0], 0])}; "
                 f"{f'the last good checkpoint is {last}; ' if last.exists() else ''}try a smaller --lr")
        return dict(zip(self.names, table.mean(0).tolist()))

    def update_average(self):
        torch._foreach_lerp_(*self.floats, 1 - (1 - 1 / self.step) ** (self.gamma + 1))
        for a, b in self.others:
            a.copy_(b)

    def save(self, name):
        state = {"script": self.args.script, "args": plain(self.args), "model_args": self.model_args,
                 "model": self.average.state_dict(), "weights": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "rng": random_states(self.args.device),
                 **{k: getattr(self, k) for k in self.state}}
        write(self.dir / name, lambda path: torch.save(state, path))

    def load(self, checkpoint):
        differ = [k for k, v in self.model_args.items() if checkpoint["model_args"].get(k) != v]
        if differ:
            fail(f"--resume {self.args.resume}: its model differs from the flags in {', '.join(differ)}")
        self.model.load_state_dict(checkpoint["weights"])
        self.average.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group in self.optimizer.param_groups:  # --lr may be given anew
            group["lr"] = self.args.lr
        for name in self.state:
            setattr(self, name, checkpoint[name])
        size = checkpoint["args"]["batch_size"]
        if self.pending and self.args.batch_size != size:
            fail(f"--batch-size {self.args.batch_size}: {self.args.resume} stands inside an epoch of batches of {size}; "
                 "finish that first")
        self.pending = [p.to(self.args.device) for p in self.pending]
        set_random_states(checkpoint["rng"], self.args.device)

    def best_model(self):
        """The averaged model of the best validation; with --epochs 0 the one that was named."""
        places = [self.dir / "best.pt", Path(self.args.resume or self.dir / "x").with_name("best.pt")]
        for best in [p for p in places if p.exists() and self.args.epochs > 0][:1]:
            self.average.load_state_dict(load_checkpoint(best, self.args.script)["model"])
        return self.average

    def finish(self, **parts):
        """Write results.json and print its figures: those of val and test, dicts, each under the name PART_FIGURE."""
        figures = {f"{part}_{k}": v for part, values in parts.items() for k, v in values.items()}
        figures = {"test_nll": None, **figures, "test_samples": self.args.test_samples}
        speed = statistics.median(self.speeds[1:] or self.speeds or [0.0])
        result = {"script": self.args.script, "dataset": self.args.dataset, "args": plain(self.args),
                  "params": self.params, "epochs": self.epoch, "seconds": round(self.seconds, 1),
                  "examples_per_second": round(speed, 1), "torch": torch.__version__,
                  "threads": torch.get_num_threads(), **figures}
        write(self.dir / "results.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
        signal.signal(signal.SIGINT, self.before)
        print(f"{show(figures)}\npictures and results.json are in {self.dir}", flush=True)
