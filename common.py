"""What the scripts share: flags, device, data, ELBO helpers, evaluation, and the bookkeeping of a run.

No model and no training step lives here. A model class needs torch alone; each script imports this
file inside its `main()`, so a script copied elsewhere without it still defines, trains and samples
its model.
"""
import argparse
import copy
import csv
import inspect
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F


def fail(message):
    """End the program with one line on standard error and status 2: the user can mend this."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def at_least(low, kind=int):
    """An argparse type: a finite number of at least `low` (above it, for a float)."""
    def convert(text):
        try:
            value = kind(text)
            if math.isfinite(value) and (value >= low if kind is int else value > low):
                return value
        except (ValueError, OverflowError):
            pass
        rule = f"a whole number of at least {low}" if kind is int else f"a number above {low:g}"
        raise argparse.ArgumentTypeError(f"must be {rule}, not {text!r}")
    return convert


def parser(doc, epochs, batch_size, lr, test_samples,
           datasets=("mnist", "fashion-mnist", "kmnist", "glyphs")):
    """The flags that every script has. The defaults are the script's own."""
    p = Parser(description=doc, formatter_class=Help, allow_abbrev=False)
    p.add_argument("--dataset", choices=datasets, help="None: mnist if it can be had, else glyphs")
    p.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--out-dir", help="None: out/SCRIPT, or the next free number after it")
    p.add_argument("--epochs", type=at_least(0), default=epochs, help="train up to this many in all")
    p.add_argument("--batch-size", type=at_least(1), default=batch_size, help="examples in a step")
    p.add_argument("--lr", type=at_least(0, float), default=lr, help="Adam's learning rate")
    p.add_argument("--seed", type=at_least(0), default=0, help="of the weights, noise and order")
    p.add_argument("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    p.add_argument("--resume", metavar="PATH", help="go on from this checkpoint, with its flags")
    p.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    p.add_argument("--dry-run", action="store_true", help="one batch of everything, to see it work")
    p.add_argument("--test-samples", type=at_least(1), default=test_samples, metavar="K",
                   help="importance samples of the test log-likelihood")
    return p


def parse(p, argv=None):
    """Parse, take over a checkpoint's flags where none are given, seed, and choose the device."""
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    script = Path(inspect.stack()[1].filename).stem
    checkpoint = None
    if args.resume:
        checkpoint = load_checkpoint(args.resume, script)
        here = ("out_dir", "device", "compile", "dry_run", "resume")  # belong to a call, not to a run
        p.set_defaults(**{k: v for k, v in checkpoint["args"].items() if k not in here})
        args = p.parse_args(argv)
    args.script, args.checkpoint = script, checkpoint
    if args.dry_run:
        args.epochs, args.test_samples = (checkpoint["epoch"] if checkpoint else 0) + 1, 4
    if args.device == "auto":
        args.device = ("cuda" if torch.cuda.is_available() else
                       "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {args.device} can't be used here ({str(error).splitlines()[0]}); "
             "cpu always can, and auto picks one")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)               # tiny numbers would slow a CPU several times
    torch.set_float32_matmul_precision("medium")  # tensor cores; on a CPU, oneDNN's fp32 kernels
    return args


# ----------------------------------------------------------------------------------- data

def images(args):
    """The image data set that the flags ask for, whole, on the device.

    Returns a namespace: `train`, `valid`, `test`, each (x, y) with grey x (N, C, H, W) uint8 and
    labels y (N,) int64; `name`; `shape` (C, H, W); `num_classes`.
    """
    name, root = args.dataset or "mnist", Path(args.data_dir)
    if name != "glyphs":
        splits = torchvision_images(name, root, required=args.dataset is not None)
    if name == "glyphs" or splits is None:
        if name != "glyphs":
            print(f"NOT MNIST: it is not in {root}/ and can't be downloaded. Training on glyphs, "
                  "digits drawn from matplotlib's fonts.", flush=True)
        name, n = "glyphs", (20_000, 2_000, 2_000)
        x, y = glyph_images(sum(n), seed=0)
        splits = tuple(zip(x.split(n), y.split(n)))
    if args.dry_run:
        splits = [(x[:args.batch_size], y[:args.batch_size]) for x, y in splits]
    train, valid, test = ((x.to(args.device), y.to(args.device)) for x, y in splits)
    args.dataset = name
    return SimpleNamespace(train=train, valid=valid, test=test, name=name,
                           shape=tuple(train[0].shape[1:]), num_classes=10)


def torchvision_images(name, root, required):
    """MNIST and its kin: train = [5000:], valid = [:5000], test; None if not to be had, not required.

    torchvision downloads from its mirrors in turn and checks each file's MD5 sum.
    """
    from torchvision import datasets
    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]
    raw = root / kind.__name__ / "raw"
    files = [raw / Path(file).stem for file, _ in kind.resources]
    download = not all(file.exists() for file in files)
    if download and not required and not any(reachable(url) for url in kind.mirrors):
        return None
    try:
        (x, y), (x_test, y_test) = ((d.data, d.targets) for d in (
            kind(root, train=train, download=download) for train in (True, False)))
        if x.shape[1:] != (28, 28) or len(x) != len(y) or len(x_test) != len(y_test) or len(x) < 10_000:
            raise ValueError(f"{tuple(x.shape)} images and {tuple(y.shape)} labels do not belong together")
        if x_test.shape[1:] != (28, 28) or max(y.max(), y_test.max()) > 9:
            raise ValueError("the test images or the labels are not what they should be")
    except Exception as error:  # torchvision raises whatever its parser stumbles over
        if download and not required:
            return None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{name} can't be downloaded to {root} ({reason}); put its files into {raw}, or use "
             "--dataset glyphs" if download else
             f"{name} in {raw} is damaged ({reason}); delete that folder to download it again")
    x, x_test = x[:, None], x_test[:, None]
    return (x[5000:], y[5000:]), (x[:5000], y[:5000]), (x_test, y_test)


def reachable(url, seconds=6):
    """Whether anything answers at `url` in time; a name look-up that hangs counts as no."""
    answer = []

    def ask():
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            answer.append(True)
        except urllib.error.HTTPError:
            answer.append(True)
        except OSError:
            pass
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answer)


def glyph_fonts():
    """The text fonts that come with matplotlib, as file names; those without usual digits are left out."""
    import matplotlib
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    odd = ("LastResort", "Display", "NonUni", "Siz", "cmex", "cmmi", "cmsy")
    return sorted(str(f) for f in folder.glob("*.ttf") if not any(o in f.name for o in odd))


def random_affine(n, generator=None, device="cpu", rotate=15, scale=0.15, shear=0.2, shift=0.1):
    """(n, 2, 3) random affine maps for `F.affine_grid`: degrees, fractions, fractions of half the width."""
    u = lambda: torch.rand(n, generator=generator, device=device) * 2 - 1
    angle, sx, sy, k = u() * math.radians(rotate), 1 + scale * u(), 1 + scale * u(), shear * u()
    cos, sin = angle.cos(), angle.sin()
    rows = [sx * cos, sx * (k * cos - sin), shift * u(), sy * sin, sy * (k * sin + cos), shift * u()]
    return torch.stack(rows, -1).view(n, 2, 3)


def warp(x, theta):
    """Grey images (N, C, H, W) moved by affine maps theta (N, 2, 3); what comes in from outside is 0."""
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def glyph_images(n, seed):
    """Digits 0-9 in matplotlib's fonts, moved at random: x (n, 1, 28, 28) uint8 and y (n,) int64."""
    from matplotlib.ft2font import FT2Font
    fonts, g = glyph_fonts(), torch.Generator().manual_seed(seed)
    shapes = torch.zeros(len(fonts), 10, 56, 56)
    for f, name in enumerate(fonts):
        font = FT2Font(name)
        font.set_size(48, 72)
        for digit in range(10):
            font.set_text(str(digit), 0)
            font.draw_glyphs_to_bitmap(antialiased=True)
            ink = np.array(font.get_image())[:56, :56]
            top, left = (56 - ink.shape[0]) // 2, (56 - ink.shape[1]) // 2
            shapes[f, digit, top:top + ink.shape[0], left:left + ink.shape[1]] = torch.from_numpy(ink)
    y = torch.randint(10, (n,), generator=g)
    which = torch.randint(len(fonts), (n,), generator=g)
    theta = random_affine(n, g) * 1.1
    x = [F.avg_pool2d(warp(shapes[w, d][:, None], t), 2) for w, d, t in
         zip(which.split(1000), y.split(1000), theta.split(1000))]
    return torch.cat(x).round().to(torch.uint8), y


def glyph_strokes(n, seed, step=0.08):
    """The outlines of the same digits as pen strokes.

    Returns a list of n tensors (T_i, 3) of (dx, dy, pen-up), a digit being about 1 high and a move
    `step` long, and labels (n,) int64. pen-up is 1 at the last point of a stroke.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    fonts, g = glyph_fonts(), torch.Generator().manual_seed(seed)
    outlines = {}
    y, which = torch.randint(10, (n,), generator=g), torch.randint(len(fonts), (n,), generator=g)
    theta, sequences = random_affine(n, g, shift=0), []
    for digit, f, t in zip(y.tolist(), which.tolist(), theta.numpy()):
        if (f, digit) not in outlines:
            path = TextPath((0, 0), str(digit), size=1.4, prop=FontProperties(fname=fonts[f]))
            outlines[f, digit] = path.to_polygons()
        points, up = [], []
        for polygon in outlines[f, digit]:
            polygon = polygon @ t[:, :2].T
            length = np.r_[0, np.hypot(*np.diff(polygon, axis=0).T).cumsum()]
            at = np.linspace(0, length[-1], max(3, round(length[-1] / step)))
            points.append(np.stack([np.interp(at, length, c) for c in polygon.T], 1))
            up.append(np.arange(len(at)) == len(at) - 1)
        points = np.concatenate(points)
        moves = np.diff(points, axis=0, prepend=points[:1])
        sequences.append(torch.from_numpy(np.c_[moves, np.concatenate(up)]).float())
    return sequences, y


def grey(x):
    """uint8 images as floats in [0, 1]."""
    return x.float() / 255


def binarise(x, seed=None):
    """Pixels drawn from Bernoulli(grey / 255): afresh at every call, or the same for the same seed.

    The seeded form draws on the CPU, so that every machine scores the same pixels.
    """
    if seed is None:
        return (torch.rand(x.shape, device=x.device) * 255 < x).float()
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (u * 255 < x).float()


# --------------------------------------------------------------------------- ELBO helpers

def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(N(mu_q, e^logvar_q) || N(mu_p, e^logvar_p)) of diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (logvar_p - logvar_q - 1 + (logvar_q - logvar_p).exp() + (mu_q - mu_p) ** 2 / logvar_p.exp())


def log_mean_exp(log_w, dim=0):
    """log of the mean of exp(log_w) along `dim`: the importance-weighted bound (Burda et al. 2016, eq. 8)."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


@torch.inference_mode()
def evaluate(bound, x, y, samples=1, seed=0, rows=4096):
    """Mean bounds over a data set, in nats per example.

    bound(x, y, k) -> log_px, kl, log_w, each (k, B). Returns a dict with neg_elbo, rec and kl and,
    for samples > 1, nll: the importance-sampled estimate of -log p(x) (Burda et al. 2016, eq. 8),
    which lies above -log p(x) in expectation and falls as `samples` grows. `rows` is how many
    samples are decoded at once. The seed fixes the noise, and leaves the training's noise alone.
    """
    k = min(samples, 64, rows)
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        for xs, ys in zip(x.split(rows // k), y.split(rows // k)):
            log_px, kl, log_w = bound(xs, ys, k)
            total = torch.logsumexp(log_w, 0)
            for start in range(k, samples, k):
                more = bound(xs, ys, min(k, samples - start))[2]
                total = torch.logaddexp(total, torch.logsumexp(more, 0))
            terms = (log_px.mean(0), kl.mean(0), total - math.log(samples))
            sums += torch.stack([t.double().sum() for t in terms]).cpu()
    log_px, kl, log_p = (sums / len(x)).tolist()
    result = {"neg_elbo": kl - log_px, "rec": -log_px, "kl": kl}
    return {**result, "nll": -log_p} if samples > 1 else result


# ------------------------------------------------------------------------------------ run

def write(path, save):
    """Let save(temporary path) write the file, then rename it: a reader never sees half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when a disk is full
        fail(f"can't write {path} ({str(error).splitlines()[0]}); what was there is untouched")


def load_checkpoint(path, script):
    """A checkpoint that this script wrote, as a dict of tensors and plain values; ends the program if not."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"--resume {path}: {error.strerror}")
    except Exception:  # unpickling a file that is something else raises almost anything
        fail(f"--resume {path}: not a checkpoint, or a damaged one")
    if not isinstance(checkpoint, dict) or "script" not in checkpoint:
        fail(f"--resume {path}: not a checkpoint of these scripts")
    if checkpoint["script"] != script:
        fail(f"--resume {path}: written by {checkpoint['script']}.py, not by {script}.py")
    return checkpoint


class Run:
    """The batches that are left to train on, and what has to be done between them.

    Iterating yields (x, y) of the training split, shuffled anew each epoch by the seed. After every
    step the weights enter a running average with the profile t^gamma (Karras et al. 2024, eq. 4),
    which takes the place of a learning-rate schedule without knowing where training ends. After
    every epoch `validate(averaged model)` returns the figures of a line of the log, first the one
    to be minimised, and the checkpoint is written. `model` in a checkpoint is the averaged model.
    """

    GAMMA = 12.0
    FILES = ("checkpoint.pt", "best.pt", "log.csv", "results.json", "samples.png")

    def __init__(self, args, model, model_args, optimizer, train, validate):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.model_args, self.train, self.validate = model_args, train, validate
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.epoch, self.step, self.rows, self.seconds, self.speeds = 0, 0, [], 0.0, []
        self.best, self.sums = math.inf, []
        checkpoint, self.stop = args.checkpoint, False
        if checkpoint:
            if checkpoint["model_args"] != model_args:
                wrong = [k for k, v in model_args.items() if checkpoint["model_args"].get(k) != v]
                fail(f"--resume {args.resume}: its model has another {', '.join(wrong)} than asked for here")
            model.load_state_dict(checkpoint["weights"])
            self.average.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for name in ("epoch", "step", "rows", "seconds", "speeds", "best", "sums"):
                setattr(self, name, checkpoint[name])
            torch.set_rng_state(checkpoint["rng"]["cpu"])
            if "cuda" in checkpoint["rng"] and "cuda" in args.device:
                torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
        self.dir = self.make_dir()
        params = sum(p.numel() for p in model.parameters())
        print(f"{args.script}: {args.dataset}, {len(train[0]):,} training examples, device {args.device}, "
              f"{params:,} parameters, writing to {self.dir}/", flush=True)
        print("  " + " ".join(f"{k}={v}" for k, v in plain(args).items()), flush=True)

    def make_dir(self):
        args, default = self.args, Path("out") / self.args.script
        source = Path(args.resume).resolve().parent if args.resume else None
        going_on = args.checkpoint and args.epochs > 0 and not args.dry_run
        try:
            if args.out_dir or going_on:
                folder = Path(args.out_dir or Path(args.resume).parent)
                folder.mkdir(parents=True, exist_ok=True)
                if not (going_on and folder.resolve() == source) and any((folder / f).exists() for f in self.FILES):
                    fail(f"{folder} already holds a run; choose another --out-dir, or go on with "
                         f"--resume {folder}/checkpoint.pt")
            else:
                default.parent.mkdir(parents=True, exist_ok=True)
                for n in range(1, 10_000):
                    folder = default if n == 1 else default.with_name(f"{default.name}-{n}")
                    try:
                        folder.mkdir()
                        break
                    except FileExistsError:
                        continue
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
            return folder
        except OSError as error:
            fail(f"can't write to {args.out_dir or default} ({error.strerror}); choose another --out-dir")

    def __iter__(self):
        args, (x, y) = self.args, self.train
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "stop", True))
        self.saved = time.time()
        while self.epoch < args.epochs:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed * 10_007 + self.epoch))
            batches = order.to(x.device).split(args.batch_size)
            if len(batches) > 1 and len(batches[-1]) < args.batch_size:
                batches = batches[:-1]  # one shape for every step
            start, first, shown = time.time(), len(self.sums), time.time()
            self.model.train()
            for i in range(first, len(batches)):
                yield x[batches[i]], y[batches[i]]
                self.step += 1
                self.update_average()
                if sys.stdout.isatty() and time.time() - shown > 1:
                    shown = time.time()
                    print(f"\r  epoch {self.epoch + 1}: {i + 1}/{len(batches)} ", end="", flush=True)
                if self.stop or (time.time() - self.saved > 180 and i + 1 < len(batches)):
                    self.check_finite()
                    self.seconds += time.time() - start
                    start = time.time()
                    self.save("checkpoint.pt")
                    if self.stop:
                        print(f"\nstopped; go on with --resume {self.dir}/checkpoint.pt", flush=True)
                        sys.exit(130)
            self.end_epoch(len(batches), start, first)
        signal.signal(signal.SIGINT, before)

    def log(self, loss, **figures):
        """Keep this step's figures, averaged; they stay on the device until the epoch ends."""
        self.names = ("loss", *figures)
        self.sums.append(torch.stack([torch.as_tensor(f, device=loss.device).detach().float().mean()
                                      for f in (loss, *figures.values())]))

    def update_average(self):
        beta = 1 - (1 - 1 / self.step) ** (self.GAMMA + 1)
        pairs = zip(self.average.state_dict().values(), self.model.state_dict().values())
        floats, others = [], []
        for a, b in pairs:
            (floats if a.is_floating_point() else others).append((a, b))
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], beta)
        for a, b in others:
            a.copy_(b)

    def check_finite(self):
        loss = torch.stack(list(self.sums)).cpu()[:, 0]
        bad = (~loss.isfinite()).nonzero()
        if len(bad):
            last = self.dir / "checkpoint.pt"
            fail(f"the loss of step {self.step - len(loss) + int(bad[0]) + 1} is {loss[bad[0, 0]]:g}; "
                 + (f"the last good checkpoint is {last}; " if last.exists() else "") + "try a smaller --lr")

    def end_epoch(self, steps, start, first):
        self.check_finite()
        train = dict(zip(self.names, torch.stack(list(self.sums)).cpu().mean(0).tolist()))
        seconds = time.time() - start
        speed = (steps - first) * min(self.args.batch_size, len(self.train[0])) / seconds
        valid = self.validate(self.average)
        self.epoch, self.sums = self.epoch + 1, []
        self.seconds += time.time() - start
        self.speeds.append(speed)
        self.rows.append({"epoch": self.epoch, "step": self.step, **{f"train_{k}": v for k, v in train.items()},
                          **{f"valid_{k}": v for k, v in valid.items()}})
        left = (self.args.epochs - self.epoch) * self.seconds / self.epoch
        print(("\r" if sys.stdout.isatty() else "") + f"epoch {self.epoch}/{self.args.epochs}  "
              f"train {figures(train)}  valid {figures(valid)}  {speed:,.0f} examples/s  "
              f"{clock(self.seconds)} gone, {clock(left)} left", flush=True)
        value = next(iter(valid.values()))
        better, self.best = value <= self.best, min(value, self.best)
        if better:
            self.save("best.pt")
        self.save("checkpoint.pt")
        write(self.dir / "log.csv", self.write_log)

    def write_log(self, path):
        with open(path, "w", newline="") as file:
            rows = csv.DictWriter(file, list(self.rows[0]))
            rows.writeheader()
            rows.writerows(self.rows)

    def save(self, name):
        rng = {"cpu": torch.get_rng_state()}
        if "cuda" in self.args.device:
            rng["cuda"] = torch.cuda.get_rng_state()
        state = {"script": self.args.script, "model_args": self.model_args, "model": self.average.state_dict(),
                 "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "args": plain(self.args), "rng": rng}
        state.update((k, getattr(self, k)) for k in ("epoch", "step", "rows", "seconds", "speeds", "best", "sums"))
        write(self.dir / name, lambda path: torch.save(state, path))
        self.saved = time.time()

    def best_model(self):
        """The averaged model of the best validation value; with --epochs 0, the one that was resumed."""
        best = self.dir / "best.pt"
        if not best.exists() and self.args.resume:
            best = Path(self.args.resume).with_name("best.pt")
        if self.args.epochs > 0 and best.exists():
            checkpoint = load_checkpoint(best, self.args.script)
            self.average.load_state_dict(checkpoint["model"])
        return self.average

    def finish(self, **figures):
        """Write results.json and print its figures."""
        result = {"script": self.args.script, "dataset": self.args.dataset, "args": plain(self.args),
                  "params": sum(p.numel() for p in self.model.parameters()), "epochs": self.epoch,
                  "seconds": round(self.seconds, 1),
                  "examples_per_second": round(statistics.median(self.speeds[1:] or self.speeds or [0.0]), 1),
                  "torch": torch.__version__, "threads": torch.get_num_threads(), **figures}
        write(self.dir / "results.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
        print(f"pictures, results.json and checkpoints are in {self.dir}/")


def plain(args):
    return {k: v for k, v in vars(args).items() if k not in ("script", "checkpoint")}


def figures(values):
    return ", ".join(f"{k} {v:.2f}" for k, v in values.items())


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
