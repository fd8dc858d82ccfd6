# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Tests of all files, without a network, in about three minutes. pytest runs them, too.

    python test_all.py                       # all tests
    python test_all.py TestDraw              # one class
    python test_all.py TestVAE.test_kl       # one test

Two environment variables: SEQVAE_DATA=DIR, to test on the real data in DIR, too; SEQVAE_KILLS=N,
to kill N runs of every script, in place of one run of one script.
"""

import ast
import contextlib
import csv
import functools
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import wave
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow tiny models down

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torchvision.datasets import MNIST

import cdraw
import common
import cvae
import draw
import ssl_vae
import vae
import vrnn

HERE = Path(__file__).resolve().parent
REAL = os.path.abspath(os.environ.get("SEQVAE_DATA", ""))
SCRIPTS = {
    "vae": vae.VAE,
    "cvae": cvae.CVAE,
    "ssl_vae": ssl_vae.SSLVAE,
    "draw": draw.DRAW,
    "cdraw": cdraw.CDRAW,
    "vrnn": vrnn.VRNN,
}
SMALL = {  # flags of small models
    "vae": "--hidden 16 --z-dim 4",
    "cvae": "--hidden 16 --z-dim 4 --warm-up 3",
    "ssl_vae": "--hidden 16 --z-dim 4 --labels 20",
    "draw": "--hidden 16 --z-dim 4 --glimpses 5",
    "cdraw": "--hidden 16 --z-dim 4 --glimpses 5",
    "vrnn": "--hidden 16 --z-dim 4 --dataset glyphs",
}
CLASSES = ["12", "o k", "\u00e9\udce9 $"]  # of own images; the last is no UTF-8
ENDINGS = ("png", "jpg", "JPEG", "bmp")
FIGURES = {"neg_elbo": 1e9, "rec": 1e9, "kl": 0.0, "nll": 1e9, "seconds": 1.0}
load_images = common.load_images  # the real one, which run() replaces


# ---------------------------------------------------------------------------
# helpers


class Case(unittest.TestCase):
    """A test works in an empty folder of its own, with the same random numbers every time."""

    def setUp(self):
        torch.manual_seed(0)  # but the moments of kills stay random
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def assert_close(self, actual, expected, tolerance=1e-5):
        actual = torch.as_tensor(actual, dtype=torch.float64)
        expected = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    def assert_same(self, actual, expected):
        """Tensors, or lists and dictionaries of tensors and numbers, are equal bit for bit."""
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    def train(self, script, flags="", read=None):
        """What a run prints that must succeed."""
        status, out, err = run(script, flags, read)
        self.assertEqual(status, 0, f"{script} {flags}: {err}")
        return out

    def assert_refused(self, script, flags, expected, read=None):
        """A run ends with status 2 and one line, in which the expected words are."""
        status, _, err = run(script, flags, read)
        self.assertEqual(status, 2, err)
        lines = err.splitlines()
        if len(lines) > 1:
            self.assertEqual(lines[:-1], [f"usage: {script}.py [flags]; --help lists them"])
        self.assertIn(expected, lines[-1])

    def assert_label_is_used(self, model):
        """After some training, images with wrong labels are less probable."""
        x, y = glyphs()
        x = common.binarise(x, seed=0)
        for _ in range(6):
            for start in range(0, 2000, 100):
                part = slice(start, start + 100)
                fit(model, (x[part], y[part]), 1)
        x = x[2000:]
        y = y[2000:]
        right = common.evaluate(model, x, y)["neg_elbo"]
        wrong = common.evaluate(model, x, y.roll(7))["neg_elbo"]
        self.assertGreater(wrong, right + 1)


@functools.cache
def glyphs():
    """2,400 digits of fonts and their labels."""
    return common.glyph_images(2400)


def many_glyphs(n):
    """In place of common.glyph_images: faster, as all of its images appear ten times."""
    x, y = glyphs()
    index = torch.arange(n) % len(y)
    return x[index], y[index]


def few_images(args):
    """In place of common.load_images: 200 glyphs to train on, 100 to validate, 90 to test."""
    x, y = glyphs()
    n = 200
    if args.dry_run:  # as common.load_images does
        n = args.batch_size
    return SimpleNamespace(
        train=(x[:n], y[:n]),
        valid=(x[200:300], y[200:300]),
        test=(x[300:390], y[300:390]),
        shape=(1, 28, 28),
        classes=list("0123456789"),
        dataset="glyphs",
    )


def run(script, flags="", read=None):
    """Run a script with few images and a small model: its exit status, output and error output.

    A run that is resumed keeps its flags. Pictures, which take most of the time of tiny runs, are
    drawn by --dry-run and --sample only. read: in place of few_images.
    """
    if "--resume" not in flags:
        flags = f"--batch-size 50 --test-samples 5 {SMALL[script]} {flags}"
    words = shlex.split(f"--device cpu {flags}")
    main = importlib.import_module(script).main
    out = io.StringIO()
    err = io.StringIO()
    status = None
    common.saved_in = None
    pictures = {}
    if "--dry-run" not in flags and "--sample " not in flags:
        nothing = mock.Mock()
        pictures = {"save_grid": nothing, "save_animation": nothing, "draw_curve": nothing}
    with (
        mock.patch.multiple(common, load_images=read or few_images, **pictures),
        mock.patch.object(sys, "argv", [f"{script}.py"]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            common.start(lambda: main(words))
        except SystemExit as stop:
            status = stop.code
    return status or 0, out.getvalue(), err.getvalue()


def child(script, flags):
    """What a process of `start` does."""
    status, _, _ = run(script, flags)
    sys.exit(status)


def start(script, flags):
    """Run a script in a process of its own, which need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SCRIPTS))
    process = context.Process(target=child, args=(script, flags))
    process.start()
    return process


def popen(script, flags, **options):
    """Start a script as its users do."""
    return subprocess.Popen([sys.executable, HERE / f"{script}.py", *shlex.split(flags)], **options)


def load(path):
    return torch.load(path, weights_only=True)


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def contents():
    """The bytes of every file below the current folder; None for a folder."""
    found = {}
    for path in Path().rglob("*"):
        found[path] = None
        if path.is_file():
            found[path] = path.read_bytes()
    return found


def no_noise():
    """All Gaussian noise is zero."""
    return mock.patch.multiple(torch, randn=torch.zeros, randn_like=torch.zeros_like)


def normal(mu, logvar):
    return Normal(mu, (0.5 * logvar).exp())


def recorded(model, *names):
    """Lists of (inputs, output) of submodules, which fill when the model is called."""

    def record(module, inputs, out):
        for name in seen:
            if module is getattr(model, name):
                seen[name].append((inputs, out))

    seen = {name: [] for name in names}
    for name in seen:
        getattr(model, name).register_forward_hook(record)
    return seen


def fit(model, inputs, steps):
    """Minimise minus the mean of the model's third output, log_w; return the losses."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        loss = -model(*inputs)[2].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def binary_images(n):
    """All images (2**n, 1, 1, n) of n black or white pixels."""
    pixels = torch.cartesian_prod(*n * [torch.tensor([0.0, 1.0])])
    return pixels.view(-1, 1, 1, n)


def total_probability(model, *inputs, k=10_000):
    """The sum of p(x) over a batch, by importance sampling."""
    with torch.no_grad():
        _, _, log_w = model(*inputs, k=k)
    return common.log_mean_exp(log_w).exp().sum().item()


# ---------------------------------------------------------------------------
# what all models do


class ModelTests:
    """`models` yields, for every code path: a name, a small model and its inputs, x first."""

    def draw(self, model, inputs):
        return model.sample(*(inputs[1:] or [6]))

    def test_examples_are_independent(self):
        """Terms are sums per example: a batch that comes twice changes none of them."""
        for name, model, inputs in self.models():
            with self.subTest(name), no_noise():
                twice = []
                for tensor in inputs:
                    dim = 1 if tensor.dim() == 3 else 0  # sequences are (T, B, D)
                    twice.append(torch.cat([tensor, tensor], dim))
                for one, two in zip(model(*inputs), model(*twice), strict=True):
                    self.assertEqual(one.dim(), 1)
                    self.assert_close(two, one.repeat(2), 1e-4)

    def test_float64_and_bfloat16_agree_with_float32(self):
        """Terms and samples have the type of the weights, also under autocast."""
        for name, model, inputs in self.models():
            with self.subTest(name), no_noise():
                single = model(*inputs)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    mixed = model(*inputs)
                    sum(term.sum() for term in mixed).backward()
                    self.assertEqual(self.draw(model, inputs).dtype, torch.float32)
                model.double()
                inputs = [t.double() if t.is_floating_point() else t for t in inputs]
                double = model(*inputs)
                self.assertEqual(self.draw(model, inputs).dtype, torch.float64)
                for a, b, c in zip(single, mixed, double, strict=True):
                    self.assertEqual((b.dtype, c.dtype), (torch.float32, torch.float64))
                    self.assert_close(a, b, 0.05)
                    self.assert_close(a, c, 1e-3)

    def test_extremes_stay_finite(self):
        """Decoders with huge logits, data of zeros, data far away: terms, gradients, samples."""
        for name, model, (x, *others) in self.models():
            # DRAW's first canvas, or the last bias of a decoder
            biases = [p for n, p in model.named_parameters() if re.search(r"^c_0|\bdec\..*bias", n)]
            for logit, factor in ((1e4, 0), (-1e4, 0), (0, 1e3)):
                with self.subTest(name, logit=logit):
                    biases[-1].data.fill_(logit)
                    data = x.clone()
                    if getattr(model, "likelihood", "bernoulli") != "bernoulli":
                        data[..., :2] *= factor  # a pen's third value stays binary
                    model.zero_grad()
                    terms = model(data, *others)
                    sum(term.sum() for term in terms).backward()
                    grads = [p.grad for p in model.parameters() if p.grad is not None]
                    for values in (*terms, *grads, self.draw(model, (data, *others))):
                        self.assertTrue(values.isfinite().all(), values)

    def test_wrong_images_are_refused(self):
        """Integers, another shape, and pixels up to 255."""
        for name, model, (x, *others) in self.models():
            wrong = [("floats", x.long()), ("floats", x[..., 1:])]
            if getattr(model, "likelihood", "bernoulli") == "bernoulli":
                wrong.append(("255", 255 * x))
            for expected, value in wrong:
                with self.subTest(name), self.assertRaisesRegex(ValueError, expected):
                    model(value, *others)


class BoundTests(ModelTests):
    """What models do that return log_px, kl and log_w."""

    def test_terms_have_their_shapes_and_log_w_averages_to_the_bound(self):
        """The analytic KL against Monte Carlo: log_w is an unbiased estimate of log_px - kl."""
        k = 4000
        for name, model, inputs in self.models():
            with self.subTest(name), torch.no_grad():
                n = len(inputs[-1])
                for term in model(*inputs):
                    self.assertEqual(term.shape, (n,))
                log_px, kl, log_w = model(*inputs, k=k)
                for term in (log_px, kl, log_w):
                    self.assertEqual(term.shape, (k, n))
                self.assertGreater(kl.mean(0).min(), -1e-4)
                difference = log_px - kl - log_w
                distance = difference.mean(0).abs()
                error = difference.std(0) / k**0.5
                self.assertLess((distance - 6 * error).max(), 1e-4)
                if getattr(model, "z_dim", 1) == 0:  # no latents
                    self.assertEqual(kl.abs().max(), 0)
                    self.assertLess(log_w.std(0).max(), 1e-4)

    def test_k_below_one_is_refused(self):
        """k=0 is not taken for no k."""
        for name, model, inputs in self.models():
            for k in (0, -1):
                with self.subTest(name), self.assertRaisesRegex(ValueError, f"^k is .*{k}$"):
                    model(*inputs, k=k)


# ---------------------------------------------------------------------------
# common.py


def write_images(root, n):
    """n own images in three classes; image i has the grey value i and belongs to class i % 3."""
    for i in range(n):
        folder = Path(root, CLASSES[i % 3])
        folder.mkdir(parents=True, exist_ok=True)
        size = (32 + i % 2 * 16, 32)
        Image.new("L", size, i % 256).save(folder / f"{i}.{ENDINGS[i % 4]}")


def images_of(flags):
    """What common.load_images reads, and prints."""
    args, _ = common.parse(vae.flags(), shlex.split(f"--device cpu {flags}"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        data = load_images(args)
    return data, out.getvalue()


def serve(test):
    """Serve the current folder until the test ends: the address."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def write_mnist(folder, train, test):
    """MNIST's four files in a folder: black images with these labels.

    Returns the files' names and checksums as torchvision lists them.
    """
    resources = []
    os.mkdir(folder)
    for part, labels in (("train", train), ("t10k", test)):
        n = len(labels)
        files = {
            "images-idx3": struct.pack(">4i", 2051, n, 28, 28) + bytes(n * 784),
            "labels-idx1": struct.pack(">2i", 2049, n) + bytes(labels),
        }
        for kind, content in files.items():
            name = f"{part}-{kind}-ubyte.gz"
            packed = gzip.compress(content, 1)
            Path(folder, name).write_bytes(packed)
            resources.append((name, hashlib.md5(packed).hexdigest()))
    return resources


class TestCommon(Case):
    def test_evaluate_is_the_importance_weighted_bound(self):
        """More samples give a tighter bound; memory is bounded; the noise is always the same."""
        model = vae.VAE((1, 2, 3), (8,), z_dim=2)
        model.dec[-1].weight.data *= 6  # so that no Gaussian is the posterior
        x = torch.rand(50, 1, 2, 3).round()
        with torch.no_grad():
            log_px, kl, log_w = model(x, 6000)
        bounds = []
        for k in (1, 5, 50, 6000):
            bound = common.log_mean_exp(log_w.view(k, -1, 50))
            bounds.append(bound.mean().item())
        self.assertEqual(bounds, sorted(bounds))
        self.assertGreater(bounds[3], bounds[0] + 0.05)
        elbo = (log_px - kl).mean().item()
        self.assertAlmostEqual(bounds[0], elbo, delta=0.02)

        counted = mock.Mock(side_effect=model)
        figures = common.evaluate(counted, x, samples=2000, at_once=640)
        self.assertAlmostEqual(figures["nll"], -bounds[3], delta=0.01)
        self.assertAlmostEqual(figures["neg_elbo"], -bounds[0], delta=0.1)
        sizes = [call.kwargs["k"] * len(call.args[0]) for call in counted.call_args_list]
        self.assertEqual((sum(sizes), max(sizes)), (2000 * 50, 640))
        again = common.evaluate(model, x, samples=2000, at_once=640)
        self.assertEqual(again["nll"], figures["nll"], "the noise is not always the same")

    def test_evaluate_does_without_tf32(self):
        """On a GPU, figures come from exact float32 products; training may round again."""

        def allowed():
            return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

        def model(x, k):
            seen.append(allowed())
            return 3 * [torch.zeros(k, len(x))]

        seen = []
        common.allow_tf32(True)
        common.evaluate(model, torch.zeros(4))
        self.assertEqual(seen, [(False, False)])
        self.assertEqual(allowed(), (True, True))

    def test_averaged_weights_are_weighted_like_t_to_the_12th(self):
        """Against the sum over all steps t, with integrals of t^12 as weights."""
        model = nn.Linear(3, 2)
        average = common.averaged(model)
        expected = 0
        for t in range(1, 31):
            nn.init.normal_(model.weight)
            average.update_parameters(model)
            weight = (t / 30) ** 13 - ((t - 1) / 30) ** 13
            expected = expected + weight * model.weight
        self.assert_close(average.module.weight, expected)

    def end_epochs(self, figures, seconds=1.0, cost=None):
        """Rows and printed lines of epochs with these figures of their validation."""
        args = SimpleNamespace(epochs=150, batch_size=50, test_samples=10, lr=1e-3)
        step = common.means(neg_elbo=torch.tensor(figures[0]["neg_elbo"]))
        rows = []
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            mock.patch.object(time, "time", return_value=seconds),
        ):
            for valid in figures:
                valid = {**valid, "seconds": 0.1}
                common.end_epoch(args, rows, 0.0, [step], valid, cost)
        return rows, out.getvalue().splitlines()

    def test_the_best_epoch_is_that_of_the_smallest_figure(self):
        figures = [{"neg_elbo": value} for value in (5.0, 3.0, 3.5, 2.0, 4.0)]
        rows, _ = self.end_epochs(figures)
        best = [row["epoch"] for row in rows if row["best"]]
        self.assertEqual(best, [1, 2, 4])

    def test_an_infinite_validation_ends_the_run(self):
        for value in (math.nan, math.inf, -math.inf):
            err = io.StringIO()
            with (
                self.subTest(value),
                contextlib.redirect_stderr(err),
                self.assertRaises(SystemExit) as end,
            ):
                self.end_epochs([{"neg_elbo": 3.0}, {"neg_elbo": value}])
            self.assertEqual(end.exception.code, 2)
            self.assertIn("epoch 2: valid_neg_elbo is not finite", err.getvalue())

    def test_epoch_lines_fit_80_columns(self):
        """Also with the large densities of speech, error rates, and many hours left."""
        for figures in (
            {"neg_elbo": 72.15, "rec": 50.19, "kl": 21.96},
            {"neg_elbo": -4883.31, "rec": -5005.27, "kl": 121.96},
            {"error": 12.34, "neg_elbo": 1072.15},
        ):
            for seconds in (1, 300):
                with self.subTest(figures, seconds=seconds):
                    _, lines = self.end_epochs([figures], seconds)
                    self.assertLessEqual(len(lines[0]), 80, lines[0])
                    self.assertIn(f"{figures['neg_elbo']:.2f}", lines[0])

    def test_time_left_knows_that_epochs_differ(self):
        """The first of 150 epochs took 10 seconds; later ones may take three times as long."""

        def cost(epoch):
            return 1 if epoch == 0 else 3

        figures = [{"neg_elbo": 1.0}]
        _, lines = self.end_epochs(figures, 10)
        # 149 * 10 seconds, and the test: 2 * test_samples = 20 times the validation's 0.1 seconds
        self.assertIn("0:24:52 left", lines[0])
        _, lines = self.end_epochs(figures, 10, cost)
        self.assertIn("1:14:32 left", lines[0])  # 149 * 30 seconds, and the same

    def test_processes_share_each_step(self):
        """Two processes divide each batch between them, and draw different noise."""
        args = SimpleNamespace(seed=0, batch_size=50)
        orders = []
        noises = []
        for rank in (0, 1):
            with mock.patch.object(common, "rank_and_world", return_value=(rank, 2)):
                orders.append(common.epoch_order(args, 3, 200))
            noises.append(torch.rand(9))
        together = torch.stack(orders, 2).flatten(1)
        self.assert_same(together, common.epoch_order(args, 3, 200))
        self.assertFalse(torch.equal(*noises), "both draw the same noise")

    def test_examples_of_similar_length_share_a_step(self):
        args = SimpleNamespace(seed=0, batch_size=50)
        order = common.epoch_order(args, 3, 200, lengths=torch.arange(200))
        spread = order.amax(1) - order.amin(1)
        self.assertEqual(spread.tolist(), 4 * [49])

    def test_glyphs_are_digits_and_seeded(self):
        """Nearest neighbours tell most digits, and no two images are the same."""
        x, y = glyphs()
        self.assert_same(common.glyph_images(300), common.glyph_images(300))
        x = x.float().flatten(1)
        distance, nearest = torch.cdist(x[2000:], x[:2000]).min(1)
        self.assertGreater(distance.min(), 0, "two are the same")
        right = (y[nearest] == y[2000:]).float()
        self.assertGreater(right.mean(), 0.7)

    def test_pixels_are_binarised_anew_or_by_a_seed(self):
        """Their mean is the grey value."""
        x = torch.tensor([0, 51, 255]).byte().expand(20_000, 3)
        mean = common.binarise(x).mean(0)
        self.assert_close(mean, [0, 0.2, 1], 0.02)
        self.assert_same(common.binarise(x, 1), common.binarise(x, 1))
        self.assertFalse(torch.equal(common.binarise(x), common.binarise(x)))

    def test_own_images_are_split_by_their_names(self):
        """What is no image, or hidden, is counted."""
        parts = [set(), set(), set()]
        for n in (90, 120):  # more images move none from one part to another
            write_images("in", n)
            data, _ = images_of("--dataset folder --data-dir in --image-size 20")
            self.assertEqual(data.shape, (1, 20, 20))
            self.assertEqual(data.classes[:2], CLASSES[:2])
            pairs = [data.train, data.valid, data.test]
            for part, (x, y) in zip(parts, pairs, strict=True):
                values = x[:, 0, 3, 17].tolist()
                self.assertEqual([value % 3 for value in values], y.tolist())
                self.assertLessEqual(part, set(values))
                part.update(values)
        self.assertEqual(sum(map(len, parts)), 120)

        for name in (".cache/a/b.png", "12/.b.png", "12/notes.txt", "c.png"):
            Path("in", name).parent.mkdir(parents=True, exist_ok=True)
            Path("in", name).write_bytes(b"no image")
        data, out = images_of("--dataset folder --data-dir in")
        self.assertEqual(len(data.classes), 3)
        self.assertEqual(data.shape, (1, 28, 28))
        self.assertIn("left out: 4 files", out)
        self.assertIn("many pixels are grey", out)

    def test_own_images_are_read_as_a_person_sees_them(self):
        """Transparent paper, 16 bits, and turned by EXIF."""

        def read(**options):
            image.save("image.png", **options)
            return common.load_image(Path("image.png"), 8)[0, 4].tolist()

        for ink, paper in ((0, 255), (255, 0)):  # on transparent paper
            image = Image.new("LA", (8, 8), (ink, 0))
            image.paste((ink, 255), (0, 0, 4, 8))
            self.assertEqual(read(), 4 * [ink] + 4 * [paper])
        image = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))  # of 16 bits
        self.assertEqual(read(), 8 * [100])
        image = Image.new("L", (8, 8))
        image.paste(255, (0, 0, 8, 4))  # its upper half is white; EXIF turns it to the right
        exif = Image.Exif()
        exif[0x112] = 6
        self.assertEqual(read(exif=exif), 4 * [0] + 4 * [255])

    def test_floats_are_scaled_or_refused(self):
        """An image of floats is one of 0 to 1."""
        values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(values).save("a.tiff")
        Image.fromarray(2 * values).save("b.tiff")
        pixels = common.load_image(Path("a.tiff"), 8)[0]
        self.assert_close(pixels, 255 * values, 0.6)
        err = io.StringIO()
        with contextlib.redirect_stderr(err), self.assertRaises(SystemExit):
            common.load_image(Path("b.tiff"), 8)
        self.assertIn("b.tiff: not an image to learn from", err.getvalue())

    def test_images_of_all_kinds_are_taken(self):
        """The pixels of a GIF or a JFIF file are those of the PNG."""
        x, _ = glyphs()
        for i in range(60):
            image = Image.fromarray(x[i, 0].numpy())
            kinds = (
                ("png", {}),
                ("gif", {}),
                ("jfif", {"format": "JPEG"}),
            )
            for name, options in kinds:
                folder = Path(name, "ab"[i % 2])
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{i}.{name}", **options)
        for name in ("png", "gif", "jfif"):
            with self.subTest(name):
                data, out = images_of(f"--dataset folder --data-dir {name}")
                parts = [data.train[0], data.valid[0], data.test[0]]
                found = torch.cat(parts).float()
                self.assertEqual(len(found), 60)
                self.assert_close(found.mean(), x[:60].float().mean(), 0.05)  # JPEG rings
                self.assertNotIn("left out", out)

    def test_classes_without_training_images_are_left_out(self):
        """Their images are counted."""
        write_images("in", 90)
        os.mkdir("in/rare")
        count = 0
        for i in range(40):
            name = f"rare/{i}.png"
            if zlib.crc32(name.encode()) % 10 < 2:  # not for training
                Image.new("L", (8, 8), 9).save(f"in/{name}")
                count += 1
        data, out = images_of("--dataset folder --data-dir in")
        self.assertEqual(len(data.classes), 3)
        self.assertIn(f"left out: {count} files", out)

    def test_grey_images_are_said_to_become_black_or_white(self):
        write_images("in", 90)
        _, out = images_of("--dataset folder --data-dir in")
        self.assertIn("vae.py --likelihood gaussian --sigma 0.1", out)

    def test_mnist_is_downloaded_from_any_mirror_and_checked(self):
        """One mirror is dead, one is good, one has damaged files."""
        sums = write_mnist("good", 5000 * [1] + 100 * [2], 50 * [3])
        shutil.copytree("good", "bad")
        for path in Path("bad").iterdir():
            path.write_bytes(path.read_bytes()[:-9])
        url = serve(self)
        for mirrors, flags, expected in (
            (["http://127.0.0.1:9/", f"{url}/good/"], "--data-dir new", "mnist"),
            ([f"{url}/bad/"], "--data-dir new", "mnist"),  # what is there needs no network
            ([f"{url}/bad/"], "--data-dir damaged --dry-run", "glyphs"),
        ):
            with (
                self.subTest(flags),
                mock.patch.multiple(MNIST, mirrors=mirrors, resources=sums),
                mock.patch.object(common, "glyph_images", many_glyphs),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                data, _ = images_of(flags)
                self.assertEqual(data.dataset, expected)
                if expected == "mnist":
                    found = []
                    for x, y in (data.train, data.valid, data.test):
                        found.append((len(x), y.unique().item()))
                    self.assertEqual(found, [(100, 2), (5000, 1), (50, 3)])
        self.assertFalse(Path("damaged").exists())

    def test_without_network_it_says_not_mnist_and_deletes_nothing(self):
        """Not even the empty folders given as --data-dir."""
        os.makedirs("datasets/vision/new")
        with (
            mock.patch.object(MNIST, "mirrors", ["http://127.0.0.1:9/"]),
            mock.patch.object(common, "glyph_images", many_glyphs),
        ):
            flags = "--dry-run --data-dir datasets/vision/new"
            lines = self.train("vae", f"{flags} --out-dir run", load_images).splitlines()
            self.assertIn("NOT MNIST", lines[0])
            self.assertIn("NOT MNIST", lines[-1])
            self.assertEqual(results("run")["dataset"], "glyphs")
            self.assertNotIn("MNIST", self.train("vae", f"{flags} --dataset glyphs", load_images))
            flags += " --dataset mnist"
            self.assert_refused("vae", flags, "train-images-idx3-ubyte", load_images)
        self.assertEqual(os.listdir("datasets/vision/new"), [])


# ---------------------------------------------------------------------------
# vae.py


class TestVAE(BoundTests, Case):
    def models(self):
        x = torch.rand(6, 1, 4, 4).round()
        sizes = {"shape": (1, 4, 4), "hidden": (7, 5), "z_dim": 3}
        yield "bernoulli", vae.VAE(**sizes), (x,)
        yield "gaussian", vae.VAE(**sizes, likelihood="gaussian", sigma=0.5), (x,)
        yield "convolutions", vae.VAE(**sizes, channels=(2, 3)), (x,)
        yield "mixture", vae.VAE(**sizes, components=30), (x,)

    def test_kl(self):
        model = vae.VAE((1, 4, 4), (7,), z_dim=3)
        x = torch.rand(6, 1, 4, 4).round()
        _, kl, _ = model(x)
        q = normal(*model.encode(x))
        self.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(1))

    def test_linear_gaussian_bound_is_exact(self):
        """With the exact posterior as q, log_w is log p(x), which is known."""
        sigma = 0.5
        model = vae.VAE((1, 1, 5), (), 2, "gaussian", sigma=sigma).double()
        x = torch.randn(4, 1, 1, 5).double()
        b = torch.randn(5).double()
        w, _ = torch.linalg.qr(torch.randn(5, 2).double())
        w = w * torch.tensor([1.5, 0.7])  # orthogonal: the posterior is diagonal
        model.dec[0].weight.data = w
        model.dec[0].bias.data = b

        # the posterior
        var = 1 / (1 + (w**2).sum(0) / sigma**2)
        gain = var[:, None] * w.T / sigma**2
        model.enc[0].weight.data = torch.cat([gain, torch.zeros(2, 5)])
        model.enc[0].bias.data = torch.cat([-gain @ b, var.log()])

        covariance = w @ w.T + sigma**2 * torch.eye(5)
        exact = MultivariateNormal(b, covariance).log_prob(x.flatten(1))
        _, _, log_w = model(x)
        self.assert_close(log_w, exact, 1e-9)  # for every sample
        log_px, kl, _ = model(x, k=20_000)
        self.assert_close((log_px - kl).mean(0), exact, 0.02)

    def test_mixture_prior_draws_what_its_density_says(self):
        """Against the mixture of torch.distributions."""
        model = vae.VAE((1, 1, 4), (), 4, "gaussian", components=3)
        model.log_std.data = 0.5 * torch.randn(4)
        model.logits.data = torch.randn(3)
        model.dec = nn.Identity()
        z = model.sample(100_000).flatten(1)
        std = model.log_std.exp()
        gaussians = torch.distributions.Independent(Normal(model.means * std, std), 1)
        weights = torch.distributions.Categorical(logits=model.logits)
        p = torch.distributions.MixtureSameFamily(weights, gaussians)
        # log_prior leaves out z_dim / 2 * log(2 pi), and z_dim is 4
        log_p = model.log_prior(z[None])[0] - 2 * math.log(2 * math.pi)
        self.assert_close(log_p, p.log_prob(z))
        self.assert_close(z.mean(0), p.mean, 5e-2)
        self.assert_close(z.var(0), p.variance, 5e-2)

    def test_probabilities_sum_to_one(self):
        for components in (1, 5):
            with self.subTest(components=components):
                model = vae.VAE((1, 1, 4), (8,), 2, components=components)
                model.enc[-1].weight.data *= 0.3  # q is wide, as importance sampling needs
                self.assertAlmostEqual(total_probability(model, binary_images(4)), 1, delta=0.03)

    def test_fixed_pixels_are_drawn_once(self):
        """What is binarised in training is black or white before."""
        for script in ("vae", "draw"):
            with mock.patch.object(common, "binarise", wraps=common.binarise) as binarise:
                self.train(script, "--epochs 1 --binarise fixed")
            fixed = 0
            for call in binarise.call_args_list:
                x = call.args[0]
                if len(x) == 50:  # a batch of training
                    self.assertEqual(x.unique().tolist(), [0, 255])
                    fixed += 1
            self.assertEqual(fixed, 4)


# ---------------------------------------------------------------------------
# cvae.py


class TestCVAE(BoundTests, Case):
    def models(self):
        x = torch.rand(6, 1, 4, 4).round()
        given = {"label": torch.arange(6) % 3, "quadrants": cvae.hide(x, 1)}
        for condition, y in given.items():
            for z_dim in (3, 0):
                for channels in (None, (2, 3)):
                    model = cvae.CVAE((1, 4, 4), condition, z_dim, 3, (7, 5), channels)
                    yield f"{condition}, {z_dim=}, {channels=}", model, (x, y)

    def test_kl(self):
        for name, model, (x, y) in self.models():
            with self.subTest(name):
                _, kl, _ = model(x, y)
                h_y = model.features(y)
                q = normal(*model.posterior(x, h_y))
                p = normal(*model.prior(h_y))
                self.assert_close(kl, kl_divergence(q, p).sum(1), 1e-4)

    def test_probabilities_sum_to_one(self):
        x = binary_images(4)
        seen = torch.tensor([1.0, 0.0, -1.0, -1.0]).expand(4, 1, 1, 4)  # p(x_2, x_3 | x_0, x_1)
        for condition, images, y in (
            ("label", x, torch.full((16,), 2)),
            ("quadrants", torch.where(seen < 0, x[:4], seen), seen),
        ):
            with self.subTest(condition):
                model = cvae.CVAE((1, 1, 4), condition, 2, hidden=(8,))
                model.enc[-1].weight.data *= 0.3
                self.assertAlmostEqual(total_probability(model, images, y), 1, delta=0.03)

    def test_the_label_is_used(self):
        """A model that ignores its condition would pass all other tests."""
        self.assert_label_is_used(cvae.CVAE(hidden=(64,), z_dim=6))

    def test_hidden_pixels_stay_hidden_and_observed_ones_come_back(self):
        """log_px is that of the hidden pixels."""
        a = torch.rand(6, 1, 5, 7).round()
        for quadrants in (1, 2, 3):
            for channels in (None, (2, 3)):
                with self.subTest(quadrants=quadrants, channels=channels):
                    y = cvae.hide(a, quadrants)
                    b = torch.where(y < 0, 1 - a, a)  # differs in every hidden pixel
                    self.assert_same(cvae.hide(b, quadrants), y)
                    model = cvae.CVAE((1, 5, 7), "quadrants", 3, 10, (8,), channels)
                    self.assert_same(model.sample(y)[y >= 0], a[y >= 0])
                    seen = recorded(model, "dec")
                    log_px, _, _ = model(a, y)
                    _, logits = seen["dec"][0]
                    each = Bernoulli(logits=logits).log_prob(a.flatten(1))
                    hidden = y.flatten(1) < 0
                    self.assert_close(log_px, (each * hidden).sum(1), 1e-4)

    def test_the_weight_of_the_kl_rises_to_one(self):
        """In the log, loss is rec + weight * kl."""
        self.train("cvae", "--epochs 4 --warm-up 3 --out-dir run")
        for row in load("run/checkpoint.pt")["rows"]:
            loss = row["train_rec"] + min(1, row["epoch"] / 3) * row["train_kl"]
            self.assert_close(row["train_loss"], loss)


# ---------------------------------------------------------------------------
# ssl_vae.py


class Bounds(nn.Module):
    """An SSLVAE as a model whose three terms are its classifier and its two bounds."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.sample = model.sample

    def forward(self, x, y):
        logits = self.model.classify(x)
        return logits[:, 0], self.model.labelled_bound(x, y), self.model.unlabelled_bound(x)


class TestSSLVAE(ModelTests, Case):
    def make(self, shape=(1, 4, 4)):
        """M2 and the auxiliary model."""
        for auxiliary in (False, True):
            model = ssl_vae.SSLVAE(shape, 3, 3, auxiliary, (7, 5), a_dim=2)
            yield f"{auxiliary=}", model.eval()

    def models(self):
        x = torch.rand(6, 1, 4, 4).round()
        y = torch.arange(6) % 3
        for name, model in self.make():
            yield name, Bounds(model), (x, y)

    def test_the_sum_over_labels_is_the_brute_force(self):
        """U is the expectation of L under q(y|x), plus its entropy (eq. 7)."""
        x = torch.rand(6, 1, 4, 4).round()
        for name, model in self.make():
            with self.subTest(name), no_noise(), torch.no_grad():
                log_q = model.classify(x).log_softmax(1)
                bounds = []
                for label in range(3):
                    bounds.append(model.labelled_bound(x, torch.full((6,), label)))
                bounds = torch.stack(bounds, 1)
                expected = (log_q.exp() * (bounds - log_q)).sum(1)
                self.assert_close(model.unlabelled_bound(x), expected, 1e-4)
                model.head.bias[1] += 1e4  # q(y|x) is one-hot: U becomes L
                self.assert_close(model.unlabelled_bound(x), bounds[:, 1], 1e-4)

    def shrink(self, model, *layers):
        """Small weights for last layers: q comes close to the posterior."""
        if model.auxiliary:
            layers = (*layers, model.q_a[-1][-1], model.p_a[-1])
        for layer in layers:
            layer.weight.data *= 0.1

    def test_bounds_are_bounds(self):
        """exp of the bounds, summed over all images, is below 1."""

        def total(bounds):
            return bounds.view(400, 16).mean(0).exp().sum().item()

        x = binary_images(4).repeat(400, 1, 1, 1)
        for name, model in self.make((1, 1, 4)):
            with self.subTest(name), torch.no_grad():
                self.shrink(model, model.enc[-1], model.dec[-1])
                labelled = 0
                for label in range(3):
                    y = torch.full((len(x),), label)
                    labelled += total(model.labelled_bound(x, y))
                unlabelled = total(model.unlabelled_bound(x))
                for value in (labelled, unlabelled):  # a term too many would show
                    self.assertGreater(value, 0.2)
                    self.assertLess(value, 1.01)

    def test_probabilities_sum_to_one(self):
        for name, model in self.make((1, 1, 4)):
            with self.subTest(name), torch.no_grad():
                self.shrink(model, model.enc[-1])
                log_px = common.log_mean_exp(model.log_weights(binary_images(4), 10_000))
                self.assertAlmostEqual(log_px.exp().sum().item(), 1, delta=0.03)

    def test_labels_are_balanced(self):
        """As many of each class, the same for a seed."""
        y = glyphs()[1][:200]
        chosen = ssl_vae.choose_labels(y, 20, 4)
        self.assertEqual(len(chosen.unique()), 20)
        self.assertEqual(torch.bincount(y[chosen]).tolist(), 10 * [2])
        self.assert_same(ssl_vae.choose_labels(y, 20, 4), chosen)
        self.assertNotEqual(ssl_vae.choose_labels(y, 20, 5).tolist(), chosen.tolist())

    def test_other_labels_change_nothing(self):
        """Training with wrong labels of the unlabelled images gives the same model."""

        def relabelled(args):
            data = few_images(args)
            x, y = data.train
            chosen = ssl_vae.choose_labels(y, 20, 0)
            changed = torch.zeros_like(y)
            changed[chosen] = y[chosen]
            data.train = (x, changed)
            return data

        y = glyphs()[1][:200]
        chosen = ssl_vae.choose_labels(y, 20, 0)
        self.train("ssl_vae", "--epochs 1 --out-dir a")
        with mock.patch.object(ssl_vae, "choose_labels", return_value=chosen):
            self.train("ssl_vae", "--epochs 1 --out-dir b", relabelled)
        self.assert_same(load("a/best.pt")["model"], load("b/best.pt")["model"])
        self.assert_refused("ssl_vae", "--labels 30", "has 2 images", relabelled)

    def test_augmentation_keeps_the_picture(self):
        """Maps are moderate, and move the ink, but lose none of it."""
        x = torch.zeros(500, 1, 36, 20)
        x[:, :, 12:24, 8:12] = 1
        theta = ssl_vae.random_affine(len(x))
        ink = ssl_vae.warp(x, theta).sum((1, 2, 3))
        mass = ink * theta[:, :, :2].det()
        self.assert_close(mass / 48, torch.ones(500), 0.15)
        self.assertGreater(theta.std(0).min(), 0.03)
        self.assertLessEqual(theta[:, :, 2].abs().max(), 0.1)


# ---------------------------------------------------------------------------
# draw.py and cdraw.py


class TestDraw(BoundTests, Case):
    module = draw
    kind = draw.DRAW
    more = {}  # arguments of the class
    given = ()  # inputs of the model beside x

    def make(self, **sizes):
        """A small model, whose learned prior and initial state are not zero."""
        small = {"shape": (1, 4, 4), "glimpses": 2, "z_dim": 3, "hidden": 5}
        small.update(read_size=2, write_size=3)
        model = self.kind(**{**small, **self.more, **sizes})
        nn.init.normal_(model.h_0, std=0.3)
        if model.prior.weight.requires_grad:
            nn.init.normal_(model.prior.weight, std=0.3)
            nn.init.normal_(model.prior.bias, std=0.3)
        return model

    def models(self, attentions=(True, False), shape=(1, 4, 4), **sizes):
        x = torch.rand(6, *shape).round()
        for attention in attentions:
            for prior in ("standard", "learned"):
                model = self.make(shape=shape, attention=attention, prior=prior, **sizes)
                yield f"{prior}, {attention=}", model, (x, *self.given)

    def test_filters_have_the_centre_stride_and_variance_asked_for(self):
        """Moments of the filters on a wide image, against eqs. 19-26."""
        n = 5
        sizes = {"x": 60, "y": 40}
        params = torch.tensor(
            [
                [0.1, -0.2, 1.4, -2.0, 0.3],
                [0.0, 0.0, 0.7, -2.5, -0.1],
            ]
        )
        g_x, g_y, log_var, log_delta, log_gamma = params.split(1, 1)
        F_y, F_x, gamma = self.module.filterbank(params, n, sizes["y"], sizes["x"])
        self.assert_close(gamma, log_gamma.exp())
        delta = (60 - 1) / (n - 1) * log_delta.exp()
        i = torch.arange(n) - (n - 1) / 2
        for axis, filters, g in (("x", F_x, g_x), ("y", F_y, g_y)):
            with self.subTest(axis):
                size = sizes[axis]
                at = torch.arange(1.0, size + 1)  # the paper counts pixels from 1
                mean = (filters * at).sum(2)
                var = (filters * (at - mean[:, :, None]) ** 2).sum(2)
                self.assert_close(filters.sum(2), torch.ones(2, n))
                self.assert_close(mean, (size + 1) / 2 * (g + 1) + i * delta, 1e-3)
                self.assert_close(var, log_var.exp().expand(2, n), 1e-2)

    def test_windows_off_the_image_and_without_size_are_finite(self):
        """So are the gradients."""
        for value in (1e4, -1e4):
            for n in (1, 3):
                with self.subTest(value=value, n=n):
                    params = torch.full((2, 5), value, requires_grad=True)
                    filters = self.module.filterbank(params, n, 40, 60)
                    sum((f**2).sum() for f in filters).backward()
                    for values in (*filters, params.grad):
                        self.assertTrue(values.isfinite().all(), values)

    def test_it_reads_and_writes_where_the_windows_are(self):
        """Windows of one narrow filter per pixel copy the image."""
        for channels in (1, 3):
            with self.subTest(channels=channels):
                model = self.make(shape=(channels, 6, 6), read_size=6, write_size=6)
                x, x_hat = torch.rand(2, 1, channels, 6, 6)
                window = torch.tensor([0.0, 0.0, -6.0, 0.0, 0.5])  # a filter for each pixel
                model.read_window.bias.data = model.write_window.bias.data = window
                model.patch.bias.data = x.flatten()
                h_dec = torch.zeros(1, 5)
                gamma = math.exp(0.5)
                images = torch.cat([x, x_hat], 1).flatten(1)
                self.assert_close(model.read(x, x_hat, h_dec).data, gamma * images, 1e-3)
                self.assert_close(model.write(h_dec).data, x / gamma, 1e-3)

    def test_one_glimpse_without_attention_is_a_vae(self):
        """Terms of T = 1, against torch.distributions."""
        models = self.models((False,), (1, 4, 5), glimpses=1)
        for name, model, (x, *given) in models:
            with self.subTest(name):
                seen = recorded(model, "posterior", "prior", "decoder", "patch")
                log_px, kl, log_w = model(x, *given)
                q = normal(*seen["posterior"][0][1].chunk(2, 1))
                p = normal(*seen["prior"][0][1].chunk(2, 1))
                if "standard" in name:
                    p = Normal(torch.zeros(3), torch.ones(3))
                inputs, _ = seen["decoder"][0]
                z = inputs[0][:, :3]
                logits = model.c_0 + seen["patch"][0][1].view(x.shape)
                each = Bernoulli(logits=logits).log_prob(x)
                self.assert_close(log_px, each.sum((1, 2, 3)), 1e-4)
                self.assert_close(kl, kl_divergence(q, p).sum(1), 1e-4)
                difference = (p.log_prob(z) - q.log_prob(z)).sum(1)
                self.assert_close(log_w, log_px + difference, 1e-4)

    def test_it_samples_by_the_prior_that_the_bound_uses(self):
        """Given the z of `forward`, `sample` ends with the same canvas."""

        def noise(mu):  # with which `sample` draws the z of `forward`
            # the prior has been called once per step so far, this one included
            z = zs[len(seen["prior"]) - 1]
            p = normal(*seen["prior"][-1][1].chunk(2, 1))
            return (z - p.mean) / p.stddev

        for name, model, inputs in self.models(glimpses=3):
            with self.subTest(name):
                seen = recorded(model, "prior", "decoder")
                log_px, _, _ = model(*inputs)
                zs = [call[0][0][:, :3] for call in seen["decoder"]]
                priors = [out for _, out in seen["prior"]]
                self.assert_close(priors[0], priors[0][:1].expand(6, -1))  # the same for every x
                spread = (priors[2] - priors[2][0]).abs().max()
                self.assertEqual(spread > 1e-3, "learned" in name)
                seen["prior"].clear()
                with mock.patch.object(torch, "randn_like", noise):
                    p = Bernoulli(self.draw(model, inputs)[-1])
                each = p.log_prob(inputs[0])
                self.assert_close(each.sum((1, 2, 3)), log_px, 1e-3)

    def test_every_step_has_noise_of_its_own(self):
        """It is not drawn once and shared by all steps."""
        for name, model, inputs in self.models(glimpses=3):
            with (
                self.subTest(name),
                mock.patch.object(torch, "randn_like", wraps=torch.randn_like) as noise,
            ):
                model(*inputs)
                self.assertEqual(noise.call_count, 3)
                self.draw(model, inputs)
                self.assertEqual(noise.call_count, 6)

    def test_temperature_zero_leaves_the_noise_of_the_first_step(self):
        """Later z are the means of their priors."""
        for name, model, inputs in self.models(glimpses=3):
            with self.subTest(name):
                seen = recorded(model, "prior", "decoder")
                first = model.sample(*(inputs[1:] or [6]), 0.0)[0]
                self.assertGreater(first.std(0).max(), 1e-3)
                z = seen["decoder"][-1][0][0][:, :3]
                self.assert_close(z, seen["prior"][-1][1][:, :3])

    def test_probabilities_sum_to_one(self):
        x = binary_images(4)
        models = self.models(shape=(1, 1, 4), read_size=1, write_size=1, z_dim=2)
        for name, model, (_, *given) in models:
            with self.subTest(name):
                model.posterior.weight.data *= 0.5
                model.prior.weight.data *= 0.5
                given = [y[:1].expand(16) for y in given]
                self.assertAlmostEqual(total_probability(model, x, *given), 1, delta=0.03)

    def test_early_epochs_take_fewer_glimpses_and_results_say_how_many(self):
        """Checkpoints and results name those of the tested model."""
        script = self.module.__name__
        with mock.patch.object(common, "end_epoch", wraps=common.end_epoch) as end_epoch:
            self.train(script, "--dry-run --glimpses 9 --out-dir run")
        cost_of = end_epoch.call_args.kwargs["cost_of"]
        costs = [cost_of(epoch) for epoch in range(6)]
        self.assertEqual(costs, [4, 4, 8, 8, 9, 9])
        self.assertEqual(results("run")["model_args"]["glimpses"], 4)
        self.assertEqual(load("run/best.pt")["model_args"]["glimpses"], 4)
        self.train(script, "--resume run --glimpses 10 --epochs 7 --out-dir more")
        self.assertEqual(load("more/checkpoint.pt")["model_args"]["glimpses"], 10)


class TestCDraw(TestDraw):
    module = cdraw
    kind = cdraw.CDRAW
    more = {"num_classes": 3}
    given = (torch.arange(6) % 3,)

    def test_the_attention_is_that_of_draw_to_the_letter(self):
        """No script imports another, so the code is there twice."""
        for name in ("filterbank", "tiled_window"):
            ours = inspect.getsource(getattr(cdraw, name))
            self.assertEqual(ours, inspect.getsource(getattr(draw, name)))
        for name in ("read", "write"):
            ours = inspect.getsource(getattr(cdraw.CDRAW, name))
            self.assertEqual(ours, inspect.getsource(getattr(draw.DRAW, name)))

    def test_the_label_is_used(self):
        """A model that ignores its condition would pass all other tests."""
        self.assert_label_is_used(cdraw.CDRAW(glimpses=3, hidden=32, z_dim=6))


# ---------------------------------------------------------------------------
# vrnn.py


def write_wav(path, n, rate=8000, channels=1, width=2):
    """A tone of n samples of so many bytes; above 2, with an EXTENSIBLE header."""
    tone = 8000 * np.sin(np.arange(n) / rate * 880 * np.pi)
    samples = (tone * 2**16).astype("<i4").repeat(channels)
    data = samples.view(np.uint8).reshape(-1, 4)[:, -width:]
    if width == 1:
        data = data ^ 128  # unsigned
    tag = 0xFFFE if width > 2 else 1
    bits = 8 * width
    header = struct.pack("<HHIIHH", tag, channels, rate, 0, width * channels, bits)
    # size of the extension, valid bits, speakers, format 1 (integers), rest of its GUID
    header += struct.pack("<HHIH14x", 22, bits, 0, 1)
    body = b"WAVEfmt " + struct.pack("<I", len(header)) + header
    body += b"data" + struct.pack("<I", data.size) + data.tobytes()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def drawing(i):
    """A line of ndjson: of two strokes, of which the first is a move to (i, 3)."""
    strokes = [[[0, i], [0, 3]], [[9], [9]]]
    return json.dumps({"word": f"the {i % 2}", "drawing": strokes}) + "\n"


def wav_bytes(n):
    """A plain WAV file of n samples of 16 bits."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", None))
        file.writeframes(bytes(2 * n))
    return content.getvalue()


def save_array(path, x):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x)


def make_bad_sequences():
    """Files that vrnn.py can't read, in the folder bad."""
    for name, content in (
        ("wav/a.wav", b"?"),
        ("cut/a.wav", wav_bytes(900)[:-90]),
        ("silent/a.wav", wav_bytes(0)),
        # after the size of its header, 16, its format 1 (integers) becomes 3 (floats)
        ("floats/a.wav", wav_bytes(900).replace(b"\x10\0\0\0\1\0", b"\x10\0\0\0\3\0")),
        ("points/a.ndjson", b'{"word": "a", "drawing": [[[0.5, 1], [2, 3]]]}'),
        ("utf16/a.ndjson", '{"word": "a"}'.encode("utf-16")),
        ("ndjson/a.ndjson", b"{}"),
        ("pendigits/pendigits-orig.tra.Z", b"\x1f\x9d\x90short"),
    ):
        path = Path("bad", name)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    for name, x in (
        ("nan", np.array([[1.0, math.nan]])),
        ("cube", np.zeros((2, 2, 2))),
        ("none", np.zeros((0, 2))),
        ("objects", np.array([None])),
        ("words", np.array(["a"])),
        ("many", np.zeros(2001)),
        ("wide", np.zeros((2, 3))),
    ):
        save_array(f"bad/{name}/b.npy", x)
    save_array("bad/wide/a.npy", np.zeros((5, 2)))
    Path("bad/text").mkdir()
    Path("bad/text/b.npy").write_bytes(b"1, 2, 3")
    write_wav("bad/long/long.wav", 400_001)
    for i in range(30):
        write_wav(f"bad/flat/{i}.wav", 900)


class TestVRNN(BoundTests, Case):
    def models(self, stops=(False, True)):
        lengths = torch.tensor([5, 3, 1, 4])
        y = torch.tensor([0, 2, 1, 2])
        sizes = {"num_classes": 3, "mixtures": 2, "hidden": 7, "features": 6}
        likelihoods = (
            ("bernoulli", 4, 0),  # of 4 values of x_t, those from 0 on are binary
            ("gaussian", 4, 4),
            ("pen", 3, 2),
        )
        for likelihood, x_dim, binary in likelihoods:
            for prior, z_dim in (("learned", 2), ("standard", 2), ("learned", 0)):
                for stop in stops:
                    name = f"{likelihood}, {prior}, {z_dim=}, {stop=}"
                    model = vrnn.VRNN(x_dim, z_dim, likelihood, prior, stop=stop, **sizes)
                    nn.init.normal_(model.h_0)
                    x = torch.randn(5, 4, x_dim)
                    x[..., binary:] = (x[..., binary:] > 0).float()
                    yield name, model, (x, lengths, y)

    def draw(self, model, inputs):
        x, _ = model.sample(4, y=inputs[2])
        return x

    def test_labels_are_needed_or_unwanted(self):
        """Depending on num_classes."""
        x = torch.zeros(2, 4, 28)
        lengths = torch.full((4,), 2)
        for num_classes, y in ((0, lengths), (3, None)):
            model = vrnn.VRNN(num_classes=num_classes, hidden=4)
            with self.assertRaisesRegex(ValueError, "labels"):
                model(x, lengths, y)

    def test_priors_see_the_past_alone_and_the_last_step_reaches_the_first(self):
        """x_2 changes priors from step 3 on; gradients go back to x_0."""
        for name, model, (x, _, y) in self.models(stops=(False,)):
            with self.subTest(name), no_noise():
                changed = x.clone()
                changed[2] = 1 - x[2]
                lengths = torch.full((4,), 5)
                net = "prior_net"  # whose inputs are of earlier steps
                step = 3
                if model.prior_net is None:
                    net = "dec"  # which also sees z_t, whose posterior sees x_t
                    step = 2
                seen = recorded(model, "dec", net)
                x.requires_grad_()
                model(x, lengths, y)
                model(changed, lengths, y)
                (_, before), (_, after) = seen[net][-2:]
                self.assert_close(before[:step], after[:step], 1e-6)
                change = before[3] - after[3]
                self.assertGreater(change.abs().max(), 1e-4)
                seen["dec"][0][1][-1].sum().backward()
                self.assertGreater(x.grad[0].abs().sum(1).min(), 0)

    def test_padding_is_ignored(self):
        """Padding of NaN changes no term and no gradient."""

        def results(model, *inputs):
            terms = model(*inputs)
            total = sum(term.sum() for term in terms)
            parameters = list(model.parameters())
            grads = torch.autograd.grad(
                total, parameters, allow_unused=True, materialize_grads=True
            )
            return terms, grads

        for name, model, (x, lengths, y) in self.models():
            with self.subTest(name), no_noise():
                inside = torch.arange(5)[:, None, None] < lengths[:, None]
                terms, grads = results(model, x, lengths, y)
                padded = results(model, torch.where(inside, x, math.nan), lengths, y)
                self.assert_same(padded, (terms, grads))

                # the same one by one, without padding
                for b, n in enumerate(lengths):
                    alone = model(x[:n, [b]], lengths[[b]], y[[b]])
                    for term, one in zip(terms, alone, strict=True):
                        self.assert_close(one[0], term[b], 1e-4)

    def test_densities_integrate_to_one(self):
        """Mixtures of Gaussians, on a grid."""
        at = torch.linspace(-16, 16, 641)
        for mixtures in (1, 3):
            for likelihood, d in (("pen", 3), ("gaussian", 2)):
                with self.subTest(likelihood, mixtures=mixtures):
                    model = vrnn.VRNN(d, 2, likelihood, mixtures=mixtures, hidden=4, features=4)
                    out = torch.randn(model.dec[-1].out_features)
                    x = nn.functional.pad(torch.cartesian_prod(at, at), (0, d - 2))
                    total = model.log_density(x, out).exp().sum()
                    if likelihood == "pen":
                        x[:, 2] = 1
                        total += model.log_density(x, out).exp().sum()
                    self.assert_close(total * 0.05**2, 1, 1e-3)

    def test_probabilities_sum_to_one(self):
        x = binary_images(4).view(16, 2, 2).transpose(0, 1)  # all of two steps of two pixels
        lengths = torch.full((16,), 2)
        for z_dim, prior in ((2, "learned"), (2, "standard"), (0, "learned")):
            with self.subTest(prior, z_dim=z_dim):
                model = vrnn.VRNN(2, z_dim, "bernoulli", prior, hidden=4, features=4)
                self.assertAlmostEqual(total_probability(model, x, lengths), 1, delta=0.03)
        with self.subTest("all lengths"):
            model = vrnn.VRNN(1, 0, "bernoulli", stop=True, hidden=4, features=4)
            model.end.bias.data.fill_(2.0)  # all sequences but 1 in 30,000 end within five steps
            total = 0
            for steps in range(1, 6):
                x = binary_images(steps).view(-1, steps, 1).transpose(0, 1)
                lengths = torch.full((x.shape[1],), steps)
                total += total_probability(model, x, lengths, k=1)
            self.assertAlmostEqual(total, 1, delta=1e-3)

    def test_it_draws_what_its_density_says(self):
        """Means, covariances and shares of components; temperature scales them."""
        pen = vrnn.VRNN(3, 2, "pen", hidden=4, features=4)
        out = torch.tensor(
            [0.0, 1.0, -2.0, math.log(4.0), 0.0, 0.8, 1.0]
        )  # in the order of model.sizes
        r = 0.99 * math.tanh(0.8)
        for temperature in (1.0, 0.5):
            with self.subTest(temperature=temperature):
                x = pen.sample_x(out.expand(50_000, -1), temperature)
                up = 1 / (1 + math.exp(-1 / temperature))
                self.assert_close(x.mean(0), [1, -2, up], 3e-2)
                covariance = torch.cov(x[:, :2].T) / temperature**2
                self.assert_close(covariance, [[4, 2 * r], [2 * r, 1]], 5e-2)

    def test_it_draws_components_by_their_weights(self):
        """A temperature sharpens them."""
        model = vrnn.VRNN(1, 2, "gaussian", mixtures=3, hidden=4, features=4)
        weights = torch.tensor([0.5, 0.3, 0.2])
        means = torch.tensor([-9.0, 0.0, 9.0])
        out = torch.cat([weights.log(), means, torch.zeros(3)])
        for temperature in (1.0, 0.5):
            with self.subTest(temperature=temperature):
                x = model.sample_x(out.expand(50_000, -1), temperature)
                shares = torch.histc(x, 3, -13.5, 13.5) / len(x)
                expected = weights ** (1 / temperature)
                self.assert_close(shares, expected / expected.sum(), 1e-2)

    def test_samples_end_by_themselves(self):
        """With stop=True, sequences have all lengths, and zeros behind their end."""
        for name, model, _ in self.models():
            with self.subTest(name):
                ends = 1
                if model.end is not None:
                    model.end.bias.data.fill_(-0.7)
                    ends = 6
                x, lengths = model.sample(6, y=torch.arange(300) % 3, z_temperature=0.0)
                self.assertEqual(len(lengths.unique()), ends)
                self.assertEqual(lengths.max(), 6)
                after = torch.arange(6)[:, None] >= lengths
                self.assertEqual(x[after].abs().sum(), 0)

    def test_beginnings_are_continued(self):
        """They come back unchanged; with none, it is the same as without."""
        for name, model, (x, _, y) in self.models():
            with self.subTest(name):
                if model.end is not None:
                    model.end.bias.data.fill_(1.0)
                for steps in (3, 5):
                    drawn, lengths = model.sample(5, y=y, given=x[:steps])
                    self.assert_same(drawn[:steps], x[:steps])
                    self.assertGreaterEqual(lengths.min(), steps)
                torch.manual_seed(1)
                expected = model.sample(5, y=y)
                torch.manual_seed(1)
                self.assert_same(model.sample(5, y=y, given=x[:0]), expected)
                with self.assertRaisesRegex(ValueError, "given"):
                    model.sample(4, y=y, given=x)
                with self.assertRaisesRegex(ValueError, "given"):
                    model.sample(9, y=y[:2], given=x)

    def test_continuations_have_their_conditional_probabilities(self):
        """The frequencies of x_3, x_4 given x_1, x_2, for all binary sequences of one pixel.

        With latent variables q(z|x) is an approximation, which training makes better.
        """
        x = binary_images(4).view(16, 4, 1).transpose(0, 1)  # (4, 16, 1)
        lengths = torch.full((16,), 4)
        weights = torch.rand(16) ** 4
        data = x[:, torch.multinomial(weights, 300, replacement=True)]
        for z_dim, tolerance in ((0, 0.02), (2, 0.05)):
            with self.subTest(z_dim=z_dim):
                model = vrnn.VRNN(1, z_dim, "bernoulli", hidden=8, features=8)
                fit(model, (data, torch.full((300,), 4)), 150)
                with torch.no_grad():
                    _, _, log_w = model(x, lengths, k=4000)
                p = common.log_mean_exp(log_w).exp().view(4, 4)  # of beginning, continuation
                expected = p / p.sum(1, keepdim=True)
                given = x[:2, ::4].repeat_interleave(10_000, 1)
                drawn, _ = model.sample(4, given=given)
                _, _, x_3, x_4 = drawn[:, :, 0]
                which = (2 * x_3 + x_4).long().view(4, -1)  # of beginning, repetition
                found = nn.functional.one_hot(which, 4).double().mean(1)
                self.assertGreater(expected.max() - expected.min(), 0.2)  # not all the same
                self.assert_close(found, expected, tolerance)

    def test_completions_see_the_beginning_alone(self):
        """What comes later in the recording changes the truth only."""
        args = SimpleNamespace(classes=None, temperature=1.0, z_temperature=1.0)
        facts = {"classes": ["a", "b"], "steps": 8}
        model = vrnn.VRNN(3, num_classes=2, likelihood="pen", hidden=8)
        frames = torch.rand(20, 3).round()
        pictures = []
        for later in (0.0, 1.0):
            frames[9:] = later  # of a recording of 6 steps, and of one of 14
            lengths = torch.tensor([6, 14])
            y = torch.tensor([1, 0])
            data = vrnn.Sequences(frames, lengths, y)
            torch.manual_seed(0)
            pictures.append(vrnn.completions(model, facts, args, data))
        one, two = pictures
        self.assertEqual(one.row_names, ["a", "b"])
        self.assertEqual(one.seen, 9 * [7] + 9 * [3])
        self.assert_same(one.x[0, :3], frames[6:9])
        self.assertEqual(one.lengths[8::9], [14, 6])
        beginning = one.x[17, :3]  # of the second truth
        for way in one.x[10:17]:
            self.assert_same(way[:3], beginning)
        self.assert_same(one.x[9:], two.x[9:])

    def test_sequences_are_padded_per_batch(self):
        """To the longest of the batch, rounded up to 8."""
        lengths = torch.tensor([3, 1000, 2, 5])
        frames = lengths.repeat_interleave(lengths)[:, None].expand(-1, 2).float()
        data = vrnn.Sequences(frames, lengths, torch.tensor([1, 0, 0, 1]))
        index = torch.tensor([0, 3, 2])
        x, n, y, joined = data.batch(index, cpu_index=index)
        self.assertEqual(x.shape, (8, 3, 2))
        self.assertEqual(n.tolist(), [3, 5, 2])
        self.assertEqual(y.tolist(), [1, 1, 0])
        for b, length in enumerate(n.tolist()):
            self.assertEqual(x[:length, b].unique().tolist(), [length])
            expected = 8 * [False]
            expected[: length - 1] = (length - 1) * [True]
            self.assertEqual(joined[:, b].tolist(), expected)

    def test_rounding_of_strokes_is_undone_by_noise(self):
        x = torch.zeros(2, 900, 3)
        x[0, :, 0] = x[1, :, 1] = 100
        x[1, :, 2] = 1
        fixed = vrnn.prepare_pen(x, torch.ones(3), None, seed=1)
        again = vrnn.prepare_pen(x, torch.ones(3), None, seed=1)
        self.assert_same(again, fixed)
        self.assert_same(fixed[..., 2], x[..., 2])
        noise = fixed - x
        self.assertLessEqual(noise.abs().max(), 0.5)
        self.assertGreater(fixed[..., :2].abs().min(), 0)  # or densities would be without bound

    def test_strokes_are_stretched_and_slanted(self):
        x = torch.zeros(2, 900, 3)
        x[0, :, 0] = x[1, :, 1] = 100
        x[1, :, 2] = 1
        lengths = torch.full((900,), 2)
        scale = torch.ones(3)
        moved, lengths = vrnn.stretch_pen(x, lengths, scale)
        self.assertEqual(lengths.unique().tolist(), [2])
        self.assert_same(moved[..., 2], x[..., 2])
        # x and y of the step to the right, then of the step up: the four numbers of a 2x2 matrix
        change = (moved - x)[..., :2] / 100
        covariance = torch.cov(change.transpose(0, 1).flatten(1).T)
        self.assert_close(covariance, 0.08**2 * torch.eye(4), 2e-3)

    def test_some_drawings_are_written_faster(self):
        """They have fewer points, on the same lines, with the same strokes and the same ends."""
        # 900 times: 20 steps to the right, one step without the pen, 10 steps up
        x = torch.zeros(40, 900, 3)
        x[1:21, :, 0] = 10
        x[21, :, 0] = 50
        x[22:, :, 1] = 10  # the last 8 are padding
        x[20, :, 2] = 1
        x[31:, :, 2] = 1
        lengths = torch.full((900,), 32)
        scale = torch.ones(3)
        with mock.patch("torch.randn", torch.zeros):  # not stretched
            moved, lengths = vrnn.vary_pen(x, lengths, scale)
        is_fast = (moved[:32] != x[:32]).any(0).any(1)
        self.assert_close(is_fast.float().mean(), torch.tensor(0.25), 0.05)
        self.assertEqual(lengths[~is_fast].unique().tolist(), [32])
        self.assertGreaterEqual(lengths.min(), 17)
        self.assertLess(lengths.min(), 20)
        for i in is_fast.nonzero().flatten():
            drawing = moved[: lengths[i], i]
            points = drawing[:, :2].cumsum(0)
            pen_up = drawing[:, 2] == 1
            self.assertEqual(points[pen_up].tolist(), [[200, 0], [250, 100]])
            self.assertEqual(points[-1].tolist(), [250, 100])
            self.assert_same(points, points.round())
            right, up = points.T
            first = (up == 0) & (right <= 200)
            second = right == 250
            in_the_air = ~(first | second)
            self.assertLessEqual(in_the_air.sum(), 1)

    def test_speech_starts_late_in_training(self):
        x = torch.arange(1000.0, 1800).view(4, 1, 200)
        joined = torch.tensor([[True], [True], [True], [False]])
        delays = set()
        for _ in range(9):
            prepared = vrnn.samples_of(vrnn.prepare_speech(x, torch.ones(1), joined), joined)
            # x rises by 1 per sample, so a start n samples later lowers it by n
            late = (x - prepared).flatten()
            n = late[-1].round().item()
            delays.add(n)
            self.assertIn(n, range(201))
            self.assert_close(late[200:], torch.full((600,), n), 0.6)
        self.assertGreater(len(delays), 3)

    def test_the_lapped_transform_is_an_mdct_and_orthogonal(self):
        """Two recordings, one after the other or padded: nothing passes between them."""
        n = 8
        lengths = torch.tensor([4, 1, 3])
        x = torch.randn(8, n)
        data = vrnn.Sequences(x, lengths, None)
        basis = vrnn.cosine_transform(n, "cpu")
        self.assert_close(basis @ basis.T, torch.eye(n))
        coefficients = vrnn.rotate_borders(x, data.joined) @ basis
        self.assert_close(coefficients.square().sum(), x.square().sum())
        self.assert_close(vrnn.samples_of(coefficients, data.joined), x)

        # frame 1 by the definition of the MDCT, whose windows reach over half of the frames beside
        i = torch.arange(2 * n)
        window = (math.pi / (2 * n) * (i + 0.5)).sin()
        time = i + 0.5 - n / 2
        frequency = torch.arange(n) + 0.5
        waves = (math.pi / n * time[:, None] * frequency).cos()
        around = x.flatten()[n // 2 : n // 2 + 2 * n]
        self.assert_close(coefficients[1], (window * around) @ waves * (2 / n) ** 0.5)

        padded, _, _, joined = data.batch(torch.arange(3), torch.arange(3))
        padded = vrnn.rotate_borders(padded, joined) @ basis
        for b, own in enumerate(coefficients.split(lengths.tolist())):
            self.assert_close(padded[: len(own), b], own)

    def test_generated_speech_does_not_click(self):
        """Whatever the coefficients: samples jump no more at the borders of frames."""
        frames = torch.randn(4000, 40) * torch.linspace(1, 0, 40) ** 4  # like speech, mostly low
        joined = torch.arange(4000) < 3999
        steps = vrnn.samples_of(frames, joined).flatten().diff().square()
        at_borders = steps[39::40].mean()
        self.assertLess(at_borders, 1.2 * steps.mean())

    def test_recordings_of_all_formats_sound_the_same(self):
        """8 to 32 bits, stereo, another rate."""
        write_wav("low.wav", 8000)
        low = vrnn.read_frames(Path("low.wav")).flatten()
        for width in (1, 2, 3, 4):
            with self.subTest(width=width):
                write_wav("high.wav", 32_000, rate=32_000, channels=2, width=width)
                high = vrnn.read_frames(Path("high.wav")).flatten()
                tolerance = 300 if width == 1 else 40  # of 32,768
                self.assertLess((high - low)[200:-200].abs().max(), tolerance)

    def test_own_recordings(self):
        """Their folders are labels; their names choose the part."""
        for i in range(40):
            write_wav(f"in/{'ab'[i % 2]}/{i}.wav", 200 * i + 1)
        lengths = []
        for part, x, label in vrnn.read_wav(SimpleNamespace(data_dir="in")):
            i = len(x) - 1
            self.assertEqual(label, "ab"[i % 2])
            self.assertEqual(part, vrnn.hash_split(f"{label}/{i}.wav"))
            lengths.append(len(x))
        self.assertEqual(sorted(lengths), list(range(1, 41)))
        self.train("vrnn", "--dataset wav --data-dir in --conditional --dry-run --out-dir run")
        sound = vrnn.read_frames(Path("run/sounds/a_0.wav"))
        self.assertEqual(sound.shape[1], 200)

    def test_own_drawings(self):
        """A file with a byte order mark and an empty last line."""
        os.mkdir("in")
        Path("in/a.ndjson").write_text("\ufeff" + "".join(map(drawing, range(40))) + "\n")
        parts = []
        for i, (part, x, label) in enumerate(vrnn.read_ndjson(SimpleNamespace(data_dir="in"))):
            self.assertEqual(label, f"the {i % 2}")
            self.assertEqual(x[1].tolist(), [i, -3, 1])  # y points up
            parts.append(part)
        self.assertEqual(len(parts), 40)
        self.assertEqual(set(parts), {0, 1, 2})
        self.train("vrnn", "--dataset ndjson --data-dir in --conditional --dry-run")

    def test_raw_drawings_and_jsonl_are_taken(self):
        """The raw format has the times of the points, which are left out."""
        os.mkdir("in")
        line = '{"word": "cat", "drawing": [[[0, 5], [1, 3], [0, 17]]]}'
        Path("in/a.jsonl").write_text(line)
        Path("in/b.ndjson.gz").write_bytes(b"?")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            ((_, x, label),) = vrnn.read_ndjson(SimpleNamespace(data_dir="in"))
        self.assertEqual(label, "cat")
        self.assertEqual(x.tolist(), [[0, 0, 0], [5, -2, 1]])
        self.assertIn("left out: 1 file", out.getvalue())

    def test_own_series(self):
        """Of any numeric type; each dimension gets mean 0 and variance 1."""
        kinds = ("<f8", ">f4", "f2", "i2", "u8")
        for i in range(60):
            steps = 3 + i % 30
            x = np.random.default_rng(i).normal((1000, -7), (50, 0.25), (steps, 2))
            save_array(f"in/{'ab'[i % 2]}/{i}.npy", np.abs(x).astype(kinds[i % 5]))
        flags = "--dataset arrays --data-dir in --conditional"
        args, _ = common.parse(vrnn.flags("arrays"), shlex.split(f"--device cpu {flags}"))
        train, valid, test, facts = vrnn.load_data(args, None)
        self.assertEqual(sum(facts["examples"]), 60)
        self.assert_close(train.frames.mean(0), torch.zeros(2))
        self.assert_close(train.frames.std(0, correction=0), torch.ones(2), 1e-4)
        self.assert_close(facts["shift"], [1000, 7], 0.05)
        back = train.frames * torch.tensor(facts["scale"]) + torch.tensor(facts["shift"])
        paths = sorted(Path("in").rglob("*.npy"))
        names = [path.relative_to("in").as_posix() for path in paths]
        first = [name for name in names if vrnn.hash_split(name) == 0][0]
        x = torch.from_numpy(np.load(f"in/{first}").astype("f4"))
        noise = back[: len(x)] - x  # of integers
        self.assertLessEqual(noise.abs().max(), 0.51)
        self.train("vrnn", f"{flags} --epochs 1 --out-dir run")
        self.train("vrnn", "--resume run --epochs 2")
        self.train("vrnn", "--resume run --sample 3 --out-dir drawn")
        self.assertLessEqual({"samples.png", "completions.png"}, set(os.listdir("run")))
        self.assertTrue(load("run/best.pt")["model_args"]["stop"])

    def test_series_far_from_zero_keep_their_digits(self):
        """As seconds since 1970 do."""
        time = 1.7e9 + np.arange(9.0)
        for i in range(60):
            save_array(f"in/{i}.npy", time)
        flags = "--dataset arrays --data-dir in --device cpu"
        args, _ = common.parse(vrnn.flags("arrays"), shlex.split(flags))
        train, _, _, facts = vrnn.load_data(args, None)
        expected = (np.arange(9) - 4) / np.arange(9).std()
        self.assert_close(train.frames[:9, 0], expected)

    def test_series_of_one_length_do_not_end_by_themselves(self):
        """One dimension may be left out: (T,) is (T, 1)."""
        for i in range(60):
            save_array(f"in/{'ab'[i % 2]}/{i}.npy", np.full(9, 5.0))  # constants have no scale
        flags = "--dataset arrays --data-dir in --conditional --epochs 1 --out-dir run"
        self.train("vrnn", flags)
        state = load("run/best.pt")
        self.assertFalse(state["model_args"]["stop"])
        self.assertEqual((state["shift"], state["scale"]), ([5.0], [1.0]))

    def test_streamed_recordings_have_no_size(self):
        """A program that writes into a pipe can't know it."""
        write_wav("a.wav", 900)
        content = bytearray(Path("a.wav").read_bytes())
        at = content.index(b"data") + 4
        content[at : at + 4] = b"\xff\xff\xff\xff"
        Path("b.wav").write_bytes(content)
        self.assert_same(vrnn.read_frames(Path("b.wav")), vrnn.read_frames(Path("a.wav")))

    def test_pendigits_are_split_by_their_files(self):
        """The last tenth of the training file validates."""
        os.mkdir("pendigits")
        digit = '.SEGMENT DIGIT 0-1 ? "7"\n.PEN_DOWN\n 1 2\n 4 8\n.PEN_UP\n'
        Path("pendigits/pendigits-orig.tra").write_text(7494 * digit)
        Path("pendigits/pendigits-orig.tes").write_text(3498 * digit)
        counts = [0, 0, 0]
        for part, x, label in vrnn.read_pendigits(SimpleNamespace(data_dir=".")):
            counts[part] += 1
            self.assertEqual(label, "7")
            self.assertEqual(x.tolist(), [[0, 0, 0], [3, 6, 1]])
        self.assertEqual(counts, [6745, 749, 3498])

    def test_speech_is_split_by_the_number_of_the_recording(self):
        folder = "free-spoken-digit-dataset-1.0.10/recordings"
        for name in ("0_x_4", "1_x_5", "2_x_10", "9_yweweler_9"):
            write_wav(f"{folder}/{name}.wav", 300)
        examples = vrnn.read_speech(SimpleNamespace(data_dir="."))
        parts = {label: part for part, _, label in examples}
        self.assertEqual(parts, {"0": 2, "1": 1, "2": 0, "9": 1})

    def test_downloads_are_checked(self):
        """A wrong checksum leaves no folder."""
        with zipfile.ZipFile("a.zip", "w") as pack:
            pack.writestr("deep/b.txt", "content")
            pack.writestr("deep/c.dat", "other")
        url = serve(self) + "/a.zip"
        right = hashlib.sha256(b"b.txtcontent").hexdigest()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            vrnn.download(url, Path("new"), ".*txt", right)
            with self.assertRaises(SystemExit):
                vrnn.download(url, Path("wrong"), ".*txt", "0")
        self.assertEqual(os.listdir("new"), ["b.txt"])
        self.assertIn("checksum", err.getvalue())
        self.assertFalse(Path("wrong").exists())


# ---------------------------------------------------------------------------
# what all scripts share as programs

# other paths through the scripts than that of their defaults
PATHS = [
    ("vae", "--likelihood gaussian --z-dim 2"),
    ("vae", "--channels 2 3 --iw 3 --components 3"),
    ("cvae", "--quadrants 2 --channels 2 3"),
    ("cvae", "--quadrants 1 --z-dim 0"),
    ("ssl_vae", "--auxiliary --no-augment"),
    ("ssl_vae", "--supervised-only"),
    ("draw", "--no-attention --prior standard --binarise fixed"),
    ("draw", "--read-size 1 --write-size 28 --temperature 0"),
    ("cdraw", "--no-attention --prior standard"),
    ("vrnn", "--conditional --classes 2 7 --temperature 2 --z-temperature 0.5"),
    ("vrnn", "--prior standard"),
    ("vrnn", "--z-dim 0"),
]
# script, flags, and a part of the last line of the error
BAD = [
    ("vae", "--epochs -1", "--epochs: must be from 0 to 2147483648, not -1"),
    ("vae", "--epochs 12345678901234567890", "from 0 to 2147483648"),
    ("vae", "--epochs 1.5", "--epochs"),
    ("vae", "--batch-size 0", "--batch-size"),
    ("vae", "--lr 0", "--lr"),
    ("vae", "--lr nan", "--lr"),
    ("vae", "--lr fast", "--lr"),
    ("vae", "--seed -3", "--seed"),
    ("vae", "--z-dim 0", "--z-dim"),
    ("vae", "--hidden 0", "--hidden"),
    ("vae", "--channels 3", "--channels"),
    ("vae", "--test-samples 0", "--test-samples"),
    ("vae", "--likelihood x", "--likelihood"),
    ("vae", "--binarise fixed --likelihood gaussian", "--binarise fixed"),
    ("vae", "--dataset x", "--dataset"),
    ("vae", "--nonsense", "--nonsense"),
    ("vae", "--device abacus", "--device abacus"),
    ("vae", "--device cuda:99", "--device cuda:99"),
    ("vae", "--sample 3", "--resume"),
    ("vae", "--resume none.pt", "none.pt"),
    ("vae", "--resume run/log.csv", "run/log.csv"),
    ("vae", "--resume cut.pt", "cut.pt"),
    ("vae", "--resume other.pt", "not a checkpoint"),
    ("vae", "--resume code.pt", "code.pt"),
    ("vae", "--resume run --z-dim 7", "z_dim"),
    ("vae", "--out-dir run", "exists"),
    ("vae", "--out-dir cut.pt/deep", "Not a directory"),
    ("vae", "--dataset mnist --data-dir cut.pt/deep", "cut.pt is not a folder"),
    ("vae", "--dataset mnist --data-dir bad", "MNIST"),
    ("vae", "--data-dir bad", "MNIST"),
    ("vae", "--dataset folder --data-dir none", "none"),
    ("vae", "--dataset folder --data-dir bad", "bad/12/1.png"),
    ("vae", "--dataset folder --data-dir flat", "all pixels have the value 7"),
    ("vae", "--dataset folder --data-dir parts", "test, train, val are not classes"),
    ("vae", "--epoch 3", "did you mean --epochs?"),
    ("vae", "--resume model.pt", "it lacks 'model'"),
    ("vae", "--resume args.pt", "it lacks 'model_args'"),
    ("vae", "--resume half.pt", "damaged, or of another model"),
    ("vae", "--resume compiled.pt --sample 1", "_orig_mod."),
    ("vae", "--resume unknown.pt --sample 1", "unexpected keyword argument 'colour'"),
    ("vae", "--resume shapes.pt --sample 1", "size mismatch"),
    ("draw", "--hidden 99999999999", "--hidden: must be from 1"),
    ("cvae", "--quadrants 4", "--quadrants"),
    ("cvae", "--z-dim -1", "--z-dim"),
    ("cvae", "--warm-up 0", "--warm-up"),
    ("cvae", "--resume run", "but of vae.py"),
    ("ssl_vae", "--labels 0", "--labels"),
    ("ssl_vae", "--labels 7", "--labels 7"),
    ("ssl_vae", "--labels 60000", "--labels 60000"),
    ("ssl_vae", "--alpha -1", "--alpha"),
    ("draw", "--glimpses 0", "--glimpses"),
    ("draw", "--prior flat", "--prior"),
    ("cdraw", "--write-size two", "--write-size"),
    ("cdraw", "--classes 1 x", "x: must be among 0, 1, 2"),
    ("vrnn", "--resume earlier.pt", "of an earlier version of vrnn.py"),
    ("vrnn", "--temperature 0", "--temperature"),
    ("vrnn", "--mixtures 0", "--mixtures"),
    ("vrnn", "--classes 1", "--classes needs --conditional"),
    ("vrnn", "--conditional --classes 12", "12: must be among"),
    ("vrnn", "--dataset wav --data-dir bad/flat --conditional", "label"),
    ("vrnn", "--dataset wav --data-dir none", "none"),
    ("vrnn", "--dataset wav --data-dir bad/wav", "a.wav: not a WAV file"),
    ("vrnn", "--dataset wav --data-dir bad/cut", "a.wav: cut short: 1710 bytes"),
    ("vrnn", "--dataset wav --data-dir bad/silent", "a.wav: its header says that it has no"),
    ("vrnn", "--dataset wav --data-dir bad/floats", "a.wav: its samples are floats"),
    ("vrnn", "--dataset ndjson --data-dir bad/points", "must be whole numbers"),
    ("vrnn", "--dataset ndjson --data-dir bad/utf16", "a.ndjson: not UTF-8 text"),
    ("vrnn", "--dataset ndjson --data-dir none", "no such folder"),
    ("vrnn", "--dataset wav --data-dir bad/long", "long.wav: 400001 samples"),
    ("vrnn", "--dataset ndjson --data-dir bad/ndjson", "a.ndjson: line 1 is no drawing"),
    ("vrnn", "--dataset arrays --data-dir none", "no such folder, or no .npy files"),
    ("vrnn", "--dataset arrays --data-dir bad/nan", "b.npy: has values that are not finite"),
    (
        "vrnn",
        "--dataset arrays --data-dir bad/cube",
        "b.npy: must be numbers (T, D), not float64 (2,",
    ),
    (
        "vrnn",
        "--dataset arrays --data-dir bad/none",
        "b.npy: must be numbers (T, D), not float64 (0,",
    ),
    ("vrnn", "--dataset arrays --data-dir bad/objects", "b.npy: not an array of numbers"),
    ("vrnn", "--dataset arrays --data-dir bad/text", "b.npy: not an array of numbers"),
    ("vrnn", "--dataset arrays --data-dir bad/words", "b.npy: must be numbers (T, D), not <U1"),
    ("vrnn", "--dataset arrays --data-dir bad/many", "b.npy: 2001 steps; must be 1 to 2000"),
    ("vrnn", "--dataset arrays --data-dir bad/wide", "b.npy: D is 3, but 2 in"),
    ("vrnn", "--dataset pendigits --data-dir bad", "pendigits-orig.tra.Z: damaged"),
]


def run_two_processes():
    """What each of the two processes does in the test of torchrun."""

    def share(model):
        own = flat([p.grad for p in model.parameters()])
        share_gradients(model)
        mean = flat([p.grad for p in model.parameters()])
        steps.append([own, mean, flat(model.parameters())])

    def terms(x, k):
        evaluated.extend(x.tolist())
        return 3 * [x.expand(k, -1)]

    share_gradients = common.share_gradients
    steps = []
    evaluated = []
    with mock.patch.object(common, "share_gradients", share):
        status, _, err = run("vae", "--epochs 2 --channels 2 3 --out-dir run")
    if status != 0:
        sys.exit(err)
    figures = common.evaluate(terms, torch.arange(10.0), at_once=3)
    rank = os.environ["RANK"]
    torch.save([steps, evaluated, figures["rec"]], f"{rank}.pt")


def flat(tensors):
    """Copies of all values, in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


class TestScripts(Case):
    def assert_equal_runs(self, a, b):
        """Two runs have the same checkpoints, logs and test figures, but for times."""
        states = {}
        figures = {}
        for folder in (a, b):
            state = load(f"{folder}/checkpoint.pt")
            names = ("weights", "average", "optimizer", "model")
            states[folder] = [state[name] for name in names]
            with open(f"{folder}/log.csv") as log:
                self.assertEqual(len(list(csv.DictReader(log))), len(state["rows"]))
            figures[folder] = []
            for row in [*state["rows"], results(folder)]:
                kept = {}
                for name, value in row.items():
                    is_figure = name.startswith(("test", "train", "valid", "best"))
                    if is_figure and "second" not in name:
                        kept[name] = value
                figures[folder].append(kept)
        self.assert_same(states[a], states[b])
        self.assertEqual(figures[a], figures[b])

    def test_every_script_as_its_users_run_it(self):
        """As a program, on own images whose classes have unusual names."""

        def dry_run(script):
            leftover = {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
            }  # of a launcher; must have no effect
            process = popen(
                script,
                f"--dry-run --dataset folder --data-dir in --out-dir {script}",
                env={**os.environ, **leftover},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            return script, process.communicate(), process.returncode

        scripts = {path.stem for path in HERE.glob("*.py")} - {"common", "test_all"}
        self.assertEqual(scripts, set(SCRIPTS), "a script without tests")
        write_images("in", 60)
        with ThreadPoolExecutor(2) as pool:
            for script, (out, err), status in pool.map(dry_run, SCRIPTS):
                with self.subTest(script):
                    self.assertEqual(status, 0, err)
                    self.assertIn("-log p", out.splitlines()[-2])
                    self.assert_complete(script, script)
                    self.train(script, f"--resume {script} --sample 12 --out-dir {script}-s", None)
                    self.assertIn("samples.png", os.listdir(f"{script}-s"))

    def assert_complete(self, script, folder):
        """A run's folder has all its files, and its pictures can go on a slide."""
        names = ["best.pt", "checkpoint.pt", "curve.png", "log.csv", "results.json", "samples.png"]
        self.assertLessEqual(set(names), set(os.listdir(folder)))
        for path in Path(folder).glob("*.png"):
            with Image.open(path) as image:
                self.assertGreaterEqual(image.width, 800, path)
        found = set(results(folder))
        self.assertLessEqual({"script", "dataset", "args", "model_args", "params"}, found)
        self.assertLessEqual({"epochs", "seconds", "examples_per_second", "torch"}, found)
        self.assertLessEqual({"test_neg_elbo", "test_nll", "test_samples"}, found)
        if script == "ssl_vae":
            self.assertLessEqual({"val_error", "test_error"}, found)

    def test_other_paths(self):
        """Train, test and draw with other flags; then draw without data."""
        for i, (script, flags) in enumerate(PATHS):
            with self.subTest(f"{script} {flags}"):
                self.train(script, f"{flags} --dry-run --out-dir {i}")
                self.assert_complete(script, str(i))
                if "quadrants" not in flags:
                    read = mock.Mock(side_effect=AssertionError("data are read"))
                    self.train(script, f"--resume {i} --sample 3 --out-dir {i}s", read)

    def test_help(self):
        """As a program; every flag is explained, with a default that means something."""

        def ask(script):
            process = popen(script, "--help", stdout=subprocess.PIPE, text=True)
            return script, process.communicate()[0], process.returncode

        with ThreadPoolExecutor(2) as pool:
            for script, out, status in pool.map(ask, SCRIPTS):
                with self.subTest(script):
                    self.assertEqual(status, 0)
                    self.assertNotIn("default: None", out)
                    self.assertNotIn("default: True", out)
                    for action in importlib.import_module(script).flags()._actions:
                        self.assertIn(action.option_strings[-1], out)
                        self.assertTrue(action.help, action)

    def test_importing_changes_nothing(self):
        """Nor does building the parser: hooks, handlers, streams, environment."""
        Path("fresh.py").write_text(
            "import os, signal, sys, torch\n"
            "def state():\n"
            "    handlers = [signal.getsignal(n) for n in signal.valid_signals()]\n"
            "    return sys.excepthook, sys.stdout, sys.stderr, handlers, dict(os.environ)\n"
            "before = state()\n"
            "for name in sys.argv[1:]:\n"
            "    __import__(name).flags()\n"
            "    assert state() == before, name\n"
        )
        done = subprocess.run(
            [sys.executable, "fresh.py", *SCRIPTS],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_defaults_of_class_and_flags_agree(self):
        """Who copies DRAW() gets the model of python draw.py."""
        for script, kind in SCRIPTS.items():
            flags = vars(importlib.import_module(script).flags().parse_args([]))
            for name, parameter in inspect.signature(kind).parameters.items():
                if name in flags:
                    with self.subTest(script, name=name):
                        default = parameter.default
                        if isinstance(default, tuple):
                            default = list(default)
                        self.assertEqual(flags[name], default)

    def test_a_copied_class_needs_only_torch(self):
        """Without our files, torchvision and matplotlib it imports, trains and samples."""
        x = (torch.rand(4, 1, 28, 28) < 0.1).float()
        y = torch.arange(4)
        rows = x[:, 0].transpose(0, 1)
        inputs = {
            "vae": (x,),
            "draw": (x,),
            "vrnn": (rows, torch.full((4,), 28)),
        }
        blocked = dict.fromkeys(("common", "torchvision", "matplotlib", *SCRIPTS))
        for script, kind in SCRIPTS.items():
            with self.subTest(script), mock.patch.dict(sys.modules, blocked):
                tree = ast.parse((HERE / f"{script}.py").read_text())
                exec(compile(tree, script, "exec"), {"__name__": "copied"})
                names = [getattr(part, "name", "") for part in tree.body]
                del tree.body[names.index(kind.__name__) + 1 :]  # nothing behind the class
                content = {"__name__": "copied"}
                exec(compile(tree, script, "exec"), content)
                model = content[kind.__name__]()
                given = inputs.get(script, (x, y))
                if script == "ssl_vae":
                    losses = fit(Bounds(model), given, 12)
                else:
                    losses = fit(model, given, 12)
                self.assertLess(min(losses[6:]), losses[0] - 3)
                if script == "vrnn":
                    drawn, _ = model.sample(6, 4)
                else:
                    drawn = model.sample(*given[1:] or [4])
                self.assertFalse(drawn.requires_grad)
                self.assertEqual(drawn.shape[-1], 28)

    def test_resuming_at_an_epochs_end_changes_nothing(self):
        """2 + 2 epochs are 4 epochs, bit for bit."""
        for script in SCRIPTS:
            with self.subTest(script):
                self.train(script, f"--epochs 4 --out-dir {script}/whole")
                self.train(script, f"--epochs 2 --out-dir {script}/parts")
                self.train(script, f"--epochs 4 --resume {script}/parts")
                self.assert_equal_runs(f"{script}/whole", f"{script}/parts")

    def test_the_test_set_is_evaluated_once_after_training(self):
        """Of 90 images; validation has 100."""

        def evaluate(model, x, *others, **options):
            events.append(len(x))
            return FIGURES

        def save(*parts):
            events.append("save")

        events = []
        for script in SCRIPTS:
            events.clear()
            with (
                self.subTest(script),
                mock.patch.multiple(common, evaluate=evaluate, save=save),
            ):
                self.train(script, "--epochs 2")
                times = 1
                if script == "ssl_vae":  # once the error, once the bound
                    times = 2
                epoch = times * [100] + ["save"]
                self.assertEqual(events, 2 * epoch + times * [90])

    def test_runs_have_folders_of_their_own(self):
        """The same seed gives the same run; data are not read in vain."""
        os.makedirs("out/vae-2")  # of a run that has just begun
        for flags in ("", "", "--seed 1"):
            self.train("vae", f"--epochs 1 {flags}")
        self.assertEqual(os.listdir("out/vae-2"), [])
        self.assert_equal_runs("out/vae-1", "out/vae-3")
        self.assertNotEqual(
            results("out/vae-1")["test_neg_elbo"], results("out/vae-4")["test_neg_elbo"]
        )
        read = mock.Mock()
        self.assert_refused("vae", "--out-dir out/vae-1", "exists", read)
        read.assert_not_called()

    def test_a_finished_run_is_not_tested_again_but_in_a_new_folder(self):
        """It says that it is finished; --epochs 0 tests it again, in a new folder."""
        self.train("vae", "--epochs 1 --out-dir run")
        before = contents()
        with mock.patch.object(common, "evaluate") as evaluate:
            self.assertIn("finished", self.train("vae", "--resume run"))
        evaluate.assert_not_called()
        self.assertEqual(contents(), before)
        self.train("vae", "--resume run/checkpoint.pt --epochs 0")
        self.assertEqual(results("run")["test_nll"], results("out/vae-1")["test_nll"])
        self.assertLessEqual(before.items(), contents().items())

    def test_resuming_takes_new_flags_and_keeps_the_best_model(self):
        """The best model stays the best if no further epoch is better."""
        self.train("vae", "--epochs 1 --out-dir a")
        with mock.patch.object(common, "evaluate", return_value=FIGURES):
            self.train("vae", "--resume a --epochs 2 --lr 0.5 --out-dir b")
        self.assert_same(load("b/best.pt")["model"], load("a/best.pt")["model"])
        self.assertEqual(load("b/checkpoint.pt")["optimizer"]["param_groups"][0]["lr"], 0.5)

    def test_resuming_with_other_data(self):
        """Is said, or refused."""

        def fewer(args):
            data = few_images(args)
            x, y = data.train
            data.train = (x[:100], y[:100])
            return data

        def other(args):
            data = few_images(args)
            data.dataset = "mnist"
            return data

        self.train("vae", "--epochs 1 --out-dir run")
        self.assertIn(
            "NOT THE CHECKPOINT'S DATA", self.train("vae", "--resume run --epochs 2", fewer)
        )
        self.assertNotIn("NOT", self.train("vae", "--resume run --dry-run"))
        self.assert_refused("vae", "--resume run --epochs 3", "trained on glyphs", other)
        with self.subTest("weights alone begin anew on any data"):
            state = load("run/best.pt")
            for name in ("weights", "average", "optimizer"):
                del state[name]
            torch.save({**state, "rows": []}, "weights.pt")
            self.train("vae", "--resume weights.pt --epochs 1 --out-dir tuned", other)

    def test_shipped_weights_draw(self):
        """Every file of weights in the repository fits its script."""
        paths = list((HERE / ".github/weights").glob("*.pt"))
        self.assertGreater(len(paths), 0)
        for path in paths:
            flags = "--sample 2"
            if path.name == "cvae.pt":  # it completes images of the test set
                flags = "--epochs 0 --test-samples 1"
            with self.subTest(path.name):
                self.train(load(path)["script"], f"--resume {path} {flags}")

    def test_sigkill_at_any_moment_loses_nothing(self):
        """Checkpoints are whole at all times, and resuming gives the same run."""
        scripts = random.sample(list(SCRIPTS), 1)
        kills = 1
        if "SEQVAE_KILLS" in os.environ:
            scripts = list(SCRIPTS)
            kills = int(os.environ["SEQVAE_KILLS"])
        for script in scripts:
            with self.subTest(script):
                whole = f"{script}/whole"
                parts = f"{script}/parts"
                began = time.time()
                start(script, f"--epochs 2 --out-dir {whole}").join()
                seconds = time.time() - began

                # kill it, then resume it, or begin again
                killed = 0
                status = None
                while killed < kills or status != 0:
                    flags = f"--resume {parts}"
                    if status == 0 or not Path(parts, "checkpoint.pt").exists():
                        shutil.rmtree(parts, ignore_errors=True)
                        flags = f"--epochs 2 --out-dir {parts}"
                    process = start(script, flags)
                    if killed < kills:
                        process.join(seconds * random.random())
                        process.kill()
                    process.join()
                    status = process.exitcode
                    self.assertIn(status, (0, -signal.SIGKILL))
                    if status != 0:
                        killed += 1
                    for path in Path(parts).glob("*.pt"):
                        load(path)  # is whole
                self.assert_equal_runs(whole, parts)

    def test_a_full_disk_loses_nothing(self):
        """A limit on the size of files stands for the disk."""
        self.train("vae", "--epochs 1 --out-dir run")
        before = {name: Path("run", name).read_bytes() for name in ("best.pt", "checkpoint.pt")}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes per file
        self.assert_refused("vae", "--resume run --epochs 2", "File too large")
        for name, content in before.items():
            self.assertEqual(Path("run", name).read_bytes(), content, name)

    def test_a_loss_that_is_not_finite_leaves_a_checkpoint_to_resume(self):
        """As the advice says, with a lower rate."""
        for batch_size in (50, 200):  # 4 steps per epoch, or 1
            with self.subTest(batch_size=batch_size):
                folder = str(batch_size)
                self.train("vae", f"--epochs 1 --batch-size {batch_size} --out-dir {folder}")
                advice = f"not finite; try --resume {folder}"
                self.assert_refused("vae", f"--resume {folder} --epochs 4 --lr 2e9", advice)
                self.train("vae", f"--resume {folder} --epochs 4 --lr 1e-3")

    def test_ctrl_c_says_how_to_resume_and_a_terminal_sees_a_live_line(self):
        """On a pseudo-terminal."""
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        terminal, end = pty.openpty()
        write_images("in", 600)
        flags = "--dataset folder --data-dir in --batch-size 4 --iw 16 --epochs 99 --out-dir run"
        process = popen("vae", f"{flags} --device cpu", stdout=end)
        os.close(end)
        said = ""
        sent = False
        with contextlib.suppress(OSError):  # which Linux raises at the end
            while part := os.read(terminal, 65536):
                said += part.decode()
                if "epoch 2, step" in said and not sent:
                    process.send_signal(signal.SIGINT)
                    sent = True
        self.assertEqual(process.wait(), 130, said)
        self.assertRegex(said, r"  epoch 1, step \d+ of 120 *\r")
        self.assertIn("--resume run", said.splitlines()[-1])

    def test_torchrun_shares_gradients_and_evaluation(self):
        """Two processes on this machine."""
        Path("two.py").write_text("import test_all\ntest_all.run_two_processes()\n")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "two.py"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        steps_0, evaluated_0, rec_0 = load("0.pt")
        steps_1, evaluated_1, rec_1 = load("1.pt")
        for (own_0, mean_0, weights_0), (own_1, mean_1, weights_1) in zip(
            steps_0, steps_1, strict=True
        ):
            self.assertFalse(torch.equal(own_0, own_1))
            self.assert_close(mean_0, (own_0 + own_1) / 2)
            self.assert_same([mean_0, weights_0], [mean_1, weights_1])
        self.assertEqual(evaluated_0, [0, 1, 2, 6, 7, 8])
        self.assertEqual(evaluated_1, [3, 4, 5, 9])
        self.assertEqual([rec_0, rec_1], [-4.5, -4.5])
        self.assertTrue(Path("run/results.json").exists())

    def test_a_misspelt_test_is_an_error(self):
        """The message lists the known names."""
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(main(["TestDrwa"]), 2)
        self.assertIn("TestDraw.test_probabilities_sum_to_one", err.getvalue())

    def make_bad_checkpoints(self):
        """Changed copies of run/best.pt."""
        state = load("run/best.pt")
        args = state["model_args"]
        compiled = {f"_orig_mod.{name}": value for name, value in state["model"].items()}
        torch.save({**state, "model": compiled}, "compiled.pt")
        torch.save({**state, "model_args": {**args, "colour": 3}}, "unknown.pt")
        torch.save({**state, "model_args": {**args, "z_dim": 7}}, "shapes.pt")
        torch.save({**state, "script": "vrnn"}, "earlier.pt")
        for name, missing in (("model", "model"), ("args", "model_args"), ("half", "weights")):
            kept = {key: value for key, value in state.items() if key != missing}
            torch.save(kept, f"{name}.pt")

    def make_bad_images(self):
        """Images of one grey, and folders that are parts instead of classes."""
        for i in range(60):
            for name in ("flat/a", "parts/train", "parts/val", "parts/test"):
                Path(name).mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 7).save(f"{name}/{i}.png")

    def test_a_notebooks_backend_and_closed_output_do_no_harm(self):
        """MPLBACKEND is one that can't be imported here."""
        write_images("in", 60)
        flags = "--dry-run --dataset folder --data-dir in --hidden 8"
        command = f"{sys.executable} {HERE}/vae.py {flags} --out-dir run >&-"
        env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.nowhere"}
        done = subprocess.run(command, shell=True, env=env, stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(Path("run/samples.png").exists())

    def test_bad_input_is_one_line_and_status_2(self):
        """And no file is changed or left."""
        self.train("vae", "--epochs 1 --out-dir run")
        self.make_bad_checkpoints()
        self.make_bad_images()
        Path("cut.pt").write_bytes(Path("run/best.pt").read_bytes()[:1000])
        torch.save({"x": 1}, "other.pt")
        torch.save(SimpleNamespace(script="vae"), "code.pt")
        os.makedirs("bad/12")
        Path("bad/12/1.png").write_bytes(b"no image")
        os.makedirs("bad/MNIST/raw")
        for part in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                path = Path(f"bad/MNIST/raw/{part}-{kind}-ubyte")
                path.write_bytes(b"\0\0\x08\x03no images")
        make_bad_sequences()
        before = contents()
        for script, flags, expected in BAD:
            with self.subTest(f"{script} {flags}"):
                read = few_images
                if "--data-dir" in flags:
                    read = load_images
                self.assert_refused(script, flags, expected, read)
                self.assertEqual(contents(), before)


# ---------------------------------------------------------------------------
# real data


@unittest.skipUnless("SEQVAE_DATA" in os.environ, "SEQVAE_DATA is not set")
class TestRealData(Case):
    def test_mnist(self):
        args = f"--data-dir {REAL} --epochs 1 --hidden 64 --test-samples 1 --out-dir run"
        self.train("vae", args, load_images)
        found = results("run")
        self.assertEqual(found["examples"], [55_000, 5000, 10_000])
        self.assertGreater(found["test_neg_elbo"], 100)
        self.assertLess(found["test_neg_elbo"], 200)

    def test_sequences(self):
        for read, expected in (
            (vrnn.read_pendigits, [6745, 749, 3498]),
            (vrnn.read_speech, [2400, 300, 300]),
        ):
            with self.subTest(read.__name__):
                counts = [0, 0, 0]
                labels = set()
                for part, _, label in read(SimpleNamespace(data_dir=REAL)):
                    counts[part] += 1
                    labels.add(label)
                self.assertEqual(counts, expected)
                self.assertEqual(labels, set("0123456789"))


# ---------------------------------------------------------------------------
# running


def main(names):
    """Run all tests, or those named: a class, or a class and one of its tests."""
    classes = {}
    tests = {}
    for name, kind in globals().items():
        if name.startswith("Test"):
            classes[name] = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
            for test in classes[name]:
                tests[test.id().partition(".")[2]] = test
    known = {**classes, **tests}
    asked = unittest.TestSuite()
    for name in names or classes:
        if name not in known:
            print(*known, sep="\n", file=sys.stderr)
            print(f"test_all.py: {name} is none of these tests", file=sys.stderr)
            return 2
        asked.addTest(known[name])
    return not unittest.TextTestRunner(descriptions=False, verbosity=2).run(asked).wasSuccessful()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
