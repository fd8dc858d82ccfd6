"""The tests: `python test_all.py`, or pytest. SEQVAE_DATA=DIR adds checks on the real MNIST in DIR.

Each test names a bug that someone shipped. They run without a network, in under three minutes.
"""
import contextlib
import csv
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import wave
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import cdraw
import common
import cvae
import draw
import ssl_vae
import vae
import vrnn

HERE = Path(__file__).resolve().parent
SCRIPTS = ("vae", "cvae", "ssl_vae", "draw", "cdraw", "vrnn")
REAL = os.environ.get("SEQVAE_DATA")
glyphs = functools.lru_cache(common.glyph_images)   # drawn once for all tests of this process
common.glyph_images = lambda n, seed: glyphs(n, seed)
torch.set_num_threads(1)   # the models are tiny, and threads that wait for one another are slow on a busy machine


def close(a, b, tol=1e-5):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert torch.allclose(a, b, rtol=tol, atol=tol), f"{a} is not {b}"


@contextlib.contextmanager
def folder():
    """An empty folder to stand in."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as path:
        os.chdir(path)
        try:
            yield Path(path)
        finally:
            os.chdir(before)


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def no_noise():
    """Within, noise is zero: models become functions of their input."""
    stack = contextlib.ExitStack()
    stack.enter_context(patched(torch, "randn", lambda *s, device=None, **_: torch.zeros(*s, device=device)))
    stack.enter_context(patched(torch, "randn_like", torch.zeros_like))
    return stack


def tiny_glyphs(args):
    """common.images, cut to what a test can train on."""
    x, y = common.glyph_images(2400, seed=0)
    x, y = x[:600].to(args.device), y[:600].to(args.device)
    args.dataset = "glyphs"
    n = args.batch_size if args.dry_run else 400
    return SimpleNamespace(train=(x[:n], y[:n]), valid=(x[400:500], y[400:500]), test=(x[500:], y[500:]),
                           shape=(1, 28, 28), num_classes=10)


SMALL = {"vae": ["--hidden", "16", "--z-dim", "4"], "cvae": ["--hidden", "16", "--z-dim", "4"],
         "ssl_vae": ["--z-dim", "4", "--labels", "20"],
         "draw": ["--hidden", "16", "--z-dim", "4", "--glimpses", "3"],
         "cdraw": ["--z-dim", "4", "--glimpses", "3"], "vrnn": ["--z-dim", "4", "--mixtures", "2"]}


# Sizes that the flags leave to the constructor, for the tests that train.
SMALLER = {"vae": ("VAE", {}), "cvae": ("CVAE", {}), "ssl_vae": ("SSLVAE", {"hidden": 16}), "draw": ("DRAW", {}),
           "cdraw": ("CDRAW", {"hidden": 16}), "vrnn": ("VRNN", {"hidden": 16, "features": 16})}


def tiny_strokes(args):
    """common.sequences, cut to what a test can train on."""
    x, y = common.glyph_strokes(170, seed=0)
    lengths = torch.tensor([min(len(s), 25) for s in x])
    padded = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)[:, :25].to(args.device)
    args.dataset = "glyphs"
    parts = [(padded[a:b], lengths[a:b], y[a:b]) for a, b in ((0, 100), (100, 130), (130, 170))]
    return SimpleNamespace(train=parts[0], valid=parts[1], test=parts[2], kind="pen", scale=1.0, unit=0.0, num_classes=10)


def train(script, *flags, images=tiny_glyphs, sequences=tiny_strokes):
    """Run main() in this process on a tiny set; returns what it printed."""
    out, size = io.StringIO(), "50" if script == "vrnn" else "100"
    module, (name, sizes) = __import__(script), SMALLER[script]
    with patched(common, "images", images), patched(common, "sequences", sequences), \
            patched(module, name, functools.partial(getattr(module, name), **sizes)), contextlib.redirect_stdout(out):
        module.main(["--batch-size", size, "--test-samples", "5", *SMALL[script], *map(str, flags)])
    return out.getvalue()


def binary_images(pixels):
    """Every binary image of (1, 1, pixels)."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=pixels))).view(-1, 1, 1, pixels)


def models():
    """One of each code path of each model, with a function of x alone that gives (log_px, kl, log_w)."""
    torch.manual_seed(0)
    shape, y = (1, 4, 4), torch.arange(6) % 3
    for net, hidden in (("mlp", (7, 5)), ("conv", (4, 6))):
        for likelihood in ("bernoulli", "gaussian"):
            m = vae.VAE(shape, hidden, z_dim=3, likelihood=likelihood, net=net)
            yield f"vae {net} {likelihood}", m, lambda x, k=None, m=m: m(x, k)
        m = cvae.CVAE(shape, "label", z_dim=3, num_classes=3, hidden=hidden, net=net)
        yield f"cvae {net} label", m, lambda x, k=None, m=m: m(x, y[torch.arange(len(x)) % 6], k)
        for z_dim in (3, 0):
            m = cvae.CVAE(shape, "quadrants", z_dim=z_dim, hidden=hidden, net=net)
            yield f"cvae {net} quadrants {z_dim}", m, lambda x, k=None, m=m: m(x, cvae.hide(x, 1), k)
    for attention in (True, False):
        sizes = dict(glimpses=2, read_size=2, write_size=3, attention=attention, z_dim=3, hidden=5)
        m = draw.DRAW(shape, **sizes)
        yield f"draw {attention}", m, lambda x, k=None, m=m: m(x, k)
        m = cdraw.CDRAW(shape, num_classes=3, **sizes)
        torch.nn.init.normal_(m.label.weight)
        yield f"cdraw {attention}", m, lambda x, k=None, m=m: m(x, y[torch.arange(len(x)) % 6], k)


# ------------------------------------------------------------------- 1, 2: KL and the bound itself

def test_kl_equals_torch_distributions_and_monte_carlo():
    torch.manual_seed(0)
    mu_q, logvar_q, mu_p, logvar_p = torch.randn(4, 5, 7, 3, dtype=torch.float64)  # T, B and z all different
    q, p = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mu_q, logvar_q), (mu_p, logvar_p)))
    kl = common.gaussian_kl(mu_q, logvar_q, mu_p, logvar_p)
    close(kl, torch.distributions.kl_divergence(q, p), 1e-12)
    close(common.gaussian_kl(mu_q, logvar_q, mu_q, logvar_q), torch.zeros(5, 7, 3), 1e-12)
    z = q.sample((200_000,))
    terms = q.log_prob(z) - p.log_prob(z)
    assert ((terms.mean(0) - kl).abs() < 6 * terms.std(0) / len(z) ** 0.5 + 1e-9).all()


def test_kl_of_each_model_is_the_reference():
    x = (torch.rand(6, 1, 4, 4) < 0.5).float()
    m = vae.VAE((1, 4, 4), 7, z_dim=3)
    mu, logvar = m.encode(x)
    close(m(x)[1], common.gaussian_kl(mu, logvar, torch.zeros(3), torch.zeros(3)).sum(-1))
    m = cvae.CVAE((1, 4, 4), "quadrants", z_dim=3, hidden=(7,))
    y = cvae.hide(x, 2)
    posterior = m.enc(torch.cat([m.phi_x(x.flatten(1)), m.features(y)], -1)).chunk(2, -1)
    close(m(x, y)[1], common.gaussian_kl(*posterior, *m.prior(y)).sum(-1))


def test_log_w_averages_to_the_bound():
    for name, m, bound in models():
        x = (torch.rand(6, 1, 4, 4) < 0.5).float()
        with torch.inference_mode():
            log_px, kl, log_w = bound(x, 20_000)
        error = 6 * (log_px - kl - log_w).std(0) / 20_000 ** 0.5 + 1e-4
        assert ((log_px - kl - log_w).mean(0).abs() < error).all(), name


def test_linear_gaussian_bound_is_exact_at_the_posterior_and_off_by_the_kl_elsewhere():
    torch.manual_seed(0)
    m = vae.VAE((1, 1, 5), hidden=(), z_dim=2, likelihood="gaussian").double()
    w = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7])  # orthogonal columns
    b = torch.randn(5, dtype=torch.float64)
    var = 1 / (1 + (w ** 2).sum(0))          # of the posterior, which is diagonal
    x = torch.randn(4, 1, 1, 5, dtype=torch.float64)
    log_p = torch.distributions.MultivariateNormal(b, w @ w.T + torch.eye(5)).log_prob(x.flatten(1))

    def set_posterior(shift, scale):
        with torch.no_grad():
            m.dec[0].weight.copy_(w), m.dec[0].bias.copy_(b)
            m.enc[0].weight.copy_(torch.cat([var[:, None] * w.T, torch.zeros(2, 5)]))
            m.enc[0].bias.copy_(torch.cat([-var * (w.T @ b) + shift, (var * scale).log()]))

    torch.set_default_dtype(torch.float64)
    try:
        set_posterior(0.0, 1.0)
        close(m(x)[2], log_p, 1e-9)          # every single sample
        set_posterior(0.4, 1.7)
        log_px, kl, _ = m(x, 400_000)
        gap = common.gaussian_kl(torch.full((2,), 0.4), (var * 1.7).log(), torch.zeros(2), var.log()).sum()
        close((log_px - kl).mean(0), log_p - gap, 5e-3)
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- 3, 4: reductions and normalisation

def test_terms_are_per_example_and_sums_over_pixels():
    x = (torch.rand(6, 1, 4, 4) < 0.5).float()
    with no_noise():
        for name, m, bound in models():
            for once, twice in zip(bound(x), bound(x.repeat(2, 1, 1, 1))):
                assert once.shape == (6,), name
                close(twice, once.repeat(2), 1e-4)
        m = ssl_vae.SSLVAE((1, 4, 4), z_dim=3, num_classes=3, hidden=7, channels=(2, 3, 4)).eval()
        close(m.unlabelled_bound(x.repeat(2, 1, 1, 1)), m.unlabelled_bound(x).repeat(2), 1e-4)
    logits = torch.randn(6, 16)
    close(vae.bernoulli_log_px(x.flatten(1).repeat(1, 2), logits.repeat(1, 2)),
          2 * vae.bernoulli_log_px(x.flatten(1), logits))
    close(vae.bernoulli_log_px(x.flatten(1), logits),
          -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(-1))


def test_probabilities_sum_to_one():
    torch.manual_seed(1)
    x = binary_images(4)
    with torch.inference_mode():
        close(vae.bernoulli_log_px(x.flatten(1), torch.randn(4) * 3).exp().sum(), 1)
        m = vae.VAE((1, 1, 4), 8, z_dim=2)
        for _ in range(2):                      # p(x) by importance sampling, summed over all x
            close(common.log_mean_exp(m(x, 40_000)[2]).exp().sum(), 1, 2e-2)
            m.dec[-1].weight *= 4
        c = cvae.CVAE((1, 1, 4), "label", z_dim=2, num_classes=3, hidden=(8,))
        close(common.log_mean_exp(c(x, torch.full((16,), 2), 40_000)[2]).exp().sum(), 1, 2e-2)
        for attention in (True, False):
            sizes = dict(glimpses=2, read_size=1, write_size=1, attention=attention, z_dim=2, hidden=4)
            for m, given in ((draw.DRAW((1, 1, 4), **sizes), ()),
                             (cdraw.CDRAW((1, 1, 4), **sizes), (torch.full((16,), 2),))):
                close(common.log_mean_exp(m(x, *given, 20_000)[2]).exp().sum(), 1, 2e-2)
        for z_dim in (2, 0):                    # given x_0 and x_1, the hidden x_2 and x_3
            c = cvae.CVAE((1, 1, 4), "quadrants", z_dim=z_dim, hidden=(8,))
            given = x[:4].clone()
            given[..., :2], given[..., 2:] = 1.0, -1.0
            whole = torch.cat([torch.ones(4, 1, 1, 2), x[:4, ..., 2:]], -1)
            close(common.log_mean_exp(c(whole, given, 40_000)[2]).exp().sum(), 1, 2e-2)
        for auxiliary in (False, True):
            s = ssl_vae.SSLVAE((1, 1, 4), 2, 3, auxiliary, hidden=8, channels=(2, 3, 4), a_dim=2).eval()
            for last in [s.enc[-1], s.dec[-1], *([s.q_a[-1][-1], s.p_a[-1]] if auxiliary else [])]:
                last.weight *= 0.3              # a q that importance sampling can work with
            total = torch.stack([common.log_mean_exp(s.log_weights(x, 4000)) for _ in range(4)])
            close(common.log_mean_exp(total).exp().sum(), 1, 2e-2)
        g = vae.VAE((1, 1, 1), 8, z_dim=2, likelihood="gaussian")
        g.enc[-1].weight *= 0.1                 # a wide q, as importance sampling over all x wants it
        line = torch.linspace(-12, 12, 2001)[:, None, None, None]
        close(common.log_mean_exp(g(line, 2000)[2]).exp().sum() * 24 / 2000, 1, 2e-2)


# ------------------------------------------------------------------------- 5: importance weighting

def test_importance_weighted_bound():
    torch.manual_seed(0)
    m = vae.VAE((1, 2, 3), 8, z_dim=2)
    with torch.no_grad():
        m.dec[-1].weight *= 6
    x = (torch.rand(50, 1, 2, 3) < 0.5).float()
    with torch.inference_mode():
        log_px, kl, log_w = m(x, 6000)
        elbo = (log_px - kl).mean()
        bounds = [common.log_mean_exp(log_w.view(k, -1, 50)).mean() for k in (1, 5, 50, 6000)]
    assert abs(bounds[0] - elbo) < 0.02
    assert all(b > a for a, b in zip(bounds, bounds[1:])), bounds
    assert bounds[-1] - bounds[0] > 0.05
    close(bounds[1], log_w.view(5, -1, 50).double().exp().mean(0).log().mean())   # not by logsumexp


def test_evaluate_is_the_same_in_any_batching():
    torch.manual_seed(0)
    m = vae.VAE((1, 2, 3), 8, z_dim=2)
    x, y = (torch.rand(30, 1, 2, 3) < 0.5).float(), torch.zeros(30)
    one = common.evaluate(lambda x, y, k: m(x, k), x, y, samples=2000, rows=64)  # one image at a time
    all_ = common.evaluate(lambda x, y, k: m(x, k), x, y, samples=2000, rows=4096)
    assert abs(one["nll"] - all_["nll"]) < 5e-3 and abs(one["neg_elbo"] - all_["neg_elbo"]) < 0.1
    state = torch.get_rng_state()
    assert common.evaluate(lambda x, y, k: m(x, k), x, y, 70) == common.evaluate(lambda x, y, k: m(x, k), x, y, 70)
    assert torch.equal(state, torch.get_rng_state()), "evaluation disturbs the noise of training"
    seen = []
    common.evaluate(lambda x, y, k: seen.append(k * len(x)) or m(x, k), x, y, samples=130)
    assert sum(seen) == 130 * 30, "not the number of samples asked for"
    seen.clear()
    common.evaluate(lambda x, y, k: seen.append(k * len(x)) or m(x, k), x, y, samples=50, rows=32)
    assert max(seen) <= 32 and sum(seen) == 50 * 30, "more samples at once than was allowed, or not all of them"


# -------------------------------------------------------------------------------------------- 10: M2

def ssl_models():
    for auxiliary in (False, True):
        torch.manual_seed(2)
        yield ssl_vae.SSLVAE((1, 4, 4), z_dim=3, num_classes=3, hidden=(7, 5), channels=(2, 3, 4), a_dim=2,
                             auxiliary=auxiliary).eval()


def test_m2_sum_over_y_is_the_brute_force():
    x = (torch.rand(6, 1, 4, 4) < 0.5).float()
    for m in ssl_models():
        with no_noise():
            log_q = m.classify(x).log_softmax(-1)
            expected = sum(log_q[:, c].exp() * (m.labelled_bound(x, torch.full((6,), c)) - log_q[:, c])
                           for c in range(3))
            close(m.unlabelled_bound(x), expected, 1e-4)
            with torch.no_grad():
                m.head.bias[1] += 1e4             # q(y|x) is one-hot at 1: U becomes L
            close(m.unlabelled_bound(x), m.labelled_bound(x, torch.ones(6, dtype=torch.int64)), 1e-4)


def test_m2_bounds_are_bounds():
    """Over all binary x: sum of exp(E log w) is at most 1, for p(x, y) summed over y as well as for p(x)."""
    x = binary_images(4)
    for m in (ssl_vae.SSLVAE((1, 1, 4), 2, 3, a, hidden=8, channels=(2, 3, 4), a_dim=2).eval() for a in (False, True)):
        with torch.inference_mode():
            for last in [m.enc[-1], m.dec[-1], *([m.q_a[-1][-1], m.p_a[-1]] if m.auxiliary else [])]:
                last.weight *= 0.1              # q near the posterior, so that a term too many shows
            mean = lambda f: sum(f() for _ in range(400)) / 400
            unlabelled = mean(lambda: m.unlabelled_bound(x)).exp().sum()
            labelled = sum(mean(lambda: m.labelled_bound(x, torch.full((16,), c))).exp().sum() for c in range(3))
        assert 0.2 < unlabelled < 1.01 and 0.2 < labelled < 1.01, (unlabelled, labelled)


def test_m2_trains_the_classifier_and_ignores_labels_it_was_not_given():
    with folder():
        train("ssl_vae", "--epochs", 1, "--out-dir", "a")

        def scrambled(args):
            data = tiny_glyphs(args)
            x, y = data.train
            keep = ssl_vae.choose_labels(y, 20, args.seed)
            y = y.clone()
            hidden = torch.ones(len(y), dtype=torch.bool)
            hidden[keep] = False
            y[hidden] = y[hidden].flip(0)
            data.train, data.keep = (x, y), keep
            return data
        keep = scrambled(SimpleNamespace(device="cpu", batch_size=100, dry_run=False, seed=0)).keep
        with patched(ssl_vae, "choose_labels", lambda *_: keep):
            train("ssl_vae", "--epochs", 1, "--out-dir", "b", images=scrambled)
        a, b = (torch.load(f"{d}/checkpoint.pt", weights_only=True)["model"] for d in "ab")
        assert all(torch.equal(a[k], b[k]) for k in a), "an unlabelled image's label changed the model"
        fresh = ssl_vae.SSLVAE(hidden=16, z_dim=4)
        torch.manual_seed(0)
        loss = F.cross_entropy(fresh.classify(torch.rand(8, 1, 28, 28)), torch.arange(8))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh.head.parameters())


def test_labels_are_exactly_n_balanced_and_always_the_same():
    y = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(3))
    for n in (10, 100, 1000):
        chosen = ssl_vae.choose_labels(y, n, seed=4)
        assert len(set(chosen.tolist())) == n and (torch.bincount(y[chosen]) == n // 10).all()
        torch.rand(7)
        assert torch.equal(chosen, ssl_vae.choose_labels(y, n, seed=4))
    assert not torch.equal(ssl_vae.choose_labels(y, 100, 4), ssl_vae.choose_labels(y, 100, 5))


# ------------------------------------------------------------------------------------ 6, 7: attention

def test_filterbanks_have_the_centre_and_variance_that_were_asked_for():
    torch.manual_seed(0)
    height, width = 40, 60
    windows = draw.Windows(height, width, (5, 1, 2))
    raw = torch.tensor([[[0.1, -0.2, math.log(4.0), -2.0, 0.3]] * 3, [[0.0, 0.0, math.log(2.0), -2.5, -0.1]] * 3])
    f_y, f_x, log_gamma = windows(raw)
    assert f_y.shape == (2, 8, height) and f_x.shape == (2, 8, width)
    close(log_gamma, raw[..., 4])
    for f, rows in ((f_y, torch.arange(height)), (f_x, torch.arange(width))):
        close(f.sum(-1), torch.ones(2, 8))
        mean = (f * rows).sum(-1)
        close((f * rows ** 2).sum(-1) - mean ** 2, torch.tensor([4.0, 2.0])[:, None].expand(2, 8), 1e-3)
    centre = ((f_x * torch.arange(width)).sum(-1), (f_y * torch.arange(height)).sum(-1))
    grid = lambda n: torch.arange(n) - (n - 1) / 2
    for got, size, g in ((centre[0], width, (0.1, 0.0)), (centre[1], height, (-0.2, 0.0))):
        for b, delta in ((0, math.exp(-2.0)), (1, math.exp(-2.5))):
            middle = (size + 1) / 2 * (g[b] + 1) - 1          # eq. 22, and pixels counted from 0
            for n, part in ((5, got[b, :5]), (1, got[b, 5:6]), (2, got[b, 6:])):
                close(part, middle + grid(n) * delta * (max(height, width) - 1) / max(1, n - 1), 1e-3)
    moved = raw.clone()
    moved[..., 1] += 0.1                                        # g_y moves rows only
    assert torch.equal(windows(moved)[1], f_x) and not torch.allclose(windows(moved)[0], f_y)
    for extreme in (1e4, -1e4):                                 # off the image, or of no size
        wild = torch.full((2, 3, 5), extreme, requires_grad=True)
        f_y, f_x, log_gamma = windows(wild)
        ((f_y ** 2).sum() + (f_x ** 2).sum() + log_gamma.exp().sum()).backward()
        assert f_y.isfinite().all() and f_x.isfinite().all() and wild.grad.isfinite().all()
        close(f_x.sum(-1), torch.ones(2, 8))


def test_draw_reads_and_writes_where_the_windows_are():
    """Windows as large as the image, one narrow filter a pixel: reading is the identity, and so is writing."""
    torch.manual_seed(0)
    for channels in (1, 3):
        m = draw.DRAW((channels, 6, 6), glimpses=1, read_size=6, write_size=6, z_dim=2, hidden=4)
        raw = torch.tensor([0.0, 0.0, -6.0, 0.0, 0.5]).expand(2, 2, 5).flatten(1)
        picture = torch.rand(2, 6, 6 * channels)                # rows, then channels, then columns
        canvas, filters = m.write(torch.zeros_like(picture), torch.cat([picture.flatten(1), raw], -1))
        close(canvas, picture * math.exp(-0.5), 1e-4)           # 1 / gamma
        seen = m.read(picture, torch.zeros_like(picture), filters)
        close(seen, math.exp(0.5) * torch.cat([picture.flatten(1), picture.flatten(1) - 0.5], -1), 1e-4)
        x = torch.rand(2, channels, 6, 6).round()
        with no_noise(), torch.no_grad():                       # a canvas written as the picture is the picture
            m.output.weight.zero_()
            m.output.bias.copy_(torch.cat([torch.zeros(36 * channels), raw[0]]))
            m.canvas.copy_((x[0] * 40 - 20).transpose(0, 1).flatten(1))
            close(m.sample(2)[0, 0], x[0], 1e-4)
            close(m(x[:1])[0], torch.zeros(1), 1e-4)
    assert list(inspect.signature(draw.DRAW.sample).parameters) == ["self", "n"]
    assert list(inspect.signature(cdraw.CDRAW.sample).parameters) == ["self", "y"]


def test_draw_noise_differs_between_steps_and_step_kls_add_up():
    torch.manual_seed(0)
    x, y = (torch.rand(6, 1, 4, 4) < 0.5).float(), torch.arange(6)
    sizes = dict(glimpses=4, read_size=2, write_size=3, z_dim=3, hidden=5)
    for m, given in ((draw.DRAW((1, 4, 4), **sizes), ()), (cdraw.CDRAW((1, 4, 4), **sizes), (y,))):
        drawn = []
        normal = torch.randn_like
        with patched(torch, "randn_like", lambda t: drawn.append(normal(t)) or drawn[-1]):
            m(x, *given)
        assert len(drawn) == 4 and len({round(float(d.sum()), 5) for d in drawn}) == 4
        with no_noise():
            log_px, kl, log_w = m.terms(x, *given)
            assert kl.shape == (4, 6) and (kl >= 0).all()
            close(kl.sum(0), m(x, *given)[1])
        z = torch.randn(4, 6, 3)
        changed = z.clone()
        changed[2] += 1                                         # a step's noise changes its canvas and later ones only
        a, b = (m.trace(t, *given)[0] for t in (z, changed))
        assert a.shape == (4, 6, 1, 4, 4) and torch.equal(a[:2], b[:2]) and not torch.allclose(a[2], b[2])


def test_draw_of_one_glimpse_without_attention_is_a_vae():
    """The bound, put together from the networks' own weights as that of a VAE: encoder, KL, decoder, likelihood."""
    torch.manual_seed(0)
    x, y, hidden = (torch.rand(6, 1, 4, 5) < 0.5).float(), torch.arange(6), 7
    sizes = dict(glimpses=1, attention=False, z_dim=3, hidden=hidden)
    for m, given in ((draw.DRAW((1, 4, 5), **sizes), ()), (cdraw.CDRAW((1, 4, 5), **sizes), (y,))):
        torch.nn.init.normal_(m.start)
        label = torch.zeros(6, 8 * hidden)
        if given:
            torch.nn.init.normal_(m.label.weight)
            label = m.label(y)

        def cell(layer, inputs, c, extra):
            i, f, o, g = (layer(inputs) + extra).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh()
        h_enc, c_enc, h_dec, c_dec = (s.expand(6, -1) for s in m.start)
        error = x - m.canvas.sigmoid().view(1, 1, 4, 5)
        inputs = torch.cat([x.flatten(1), error.flatten(1), h_enc, h_dec], -1)
        mu, logvar = m.posterior(cell(m.encoder, inputs, c_enc, label[:, :4 * hidden])).chunk(2, -1)
        q, p = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
        torch.manual_seed(5)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        logits = m.canvas + m.output(cell(m.decoder, torch.cat([z, h_dec], -1), c_dec, label[:, 4 * hidden:])).view(6, 4, 5)
        expected = torch.distributions.Bernoulli(logits=logits).log_prob(x[:, 0]).sum((1, 2))
        torch.manual_seed(5)
        log_px, kl, log_w = m(x, *given)
        close(log_px, expected, 1e-4)
        close(kl, torch.distributions.kl_divergence(q, p).sum(-1), 1e-4)
        close(log_w, expected + (p.log_prob(z) - q.log_prob(z)).sum(-1), 1e-4)


def test_draw_and_cdraw_share_their_attention_to_the_letter():
    for name in ("Windows", "lstm", "animate"):
        assert inspect.getsource(getattr(draw, name)) == inspect.getsource(getattr(cdraw, name)), name
    for name in ("read", "write", "begin"):
        assert inspect.getsource(getattr(draw.DRAW, name)) == inspect.getsource(getattr(cdraw.CDRAW, name)), name


# --------------------------------------------------------------------------------- 8, 9: VRNN, padding

def vrnns(stops=(False, True), **sizes):
    """One of each code path of the VRNN: its name, the model, x (T, B, D), lengths and labels."""
    lengths, y = torch.tensor([5, 3, 1, 4]), torch.tensor([0, 2, 1, 2])
    for likelihood, prior, z_dim, stop in itertools.product(
            ("bernoulli", "gaussian", "pen"), ("learned", "standard"), (2, 0), stops):
        torch.manual_seed(0)
        d = 3 if likelihood == "pen" else 4
        m = vrnn.VRNN(d, z_dim, likelihood, prior, 3, stop, **{"mixtures": 2, "hidden": 7, "features": 6, **sizes})
        x = torch.randn(5, 4, d)
        if likelihood != "gaussian":
            x[..., 2 if likelihood == "pen" else 0:] = (x[..., 2 if likelihood == "pen" else 0:] > 0).float()
        yield f"{likelihood} {prior} {z_dim} {stop}", m, x, lengths, y


def test_vrnn_terms_are_per_sequence_and_importance_weights_average_to_the_bound():
    for name, m, x, lengths, y in vrnns():
        with torch.inference_mode():
            log_px, kl, log_w = m(x, lengths, y, 4000)
            assert log_px.shape == kl.shape == log_w.shape == (4000, 4), name
            difference = log_px - kl - log_w
            assert (difference.mean(0).abs() < 6 * difference.std(0) / 4000 ** 0.5 + 1e-4).all(), name
            with no_noise():
                for once, twice in zip(m(x, lengths, y), m(x.repeat(1, 2, 1), lengths.repeat(2), y.repeat(2))):
                    close(twice, once.repeat(2), 1e-4)
                once, many = m(x, lengths, y), m(x, lengths, y, 3)
                close(many[2], once[2].expand(3, -1), 1e-4)
            assert m.z_dim or kl.abs().sum() == 0


def test_vrnn_probabilities_sum_to_one():
    torch.manual_seed(0)
    for mixtures, likelihood in itertools.product((1, 3), ("pen", "gaussian")):
        m = vrnn.VRNN(3 if likelihood == "pen" else 2, 2, likelihood, mixtures=mixtures, hidden=4, features=4)
        out = torch.randn(m.out[-1].out_features)
        at = torch.linspace(-16, 16, 801)
        grid = torch.cartesian_prod(at, at)
        total = 0.0
        for up in (0.0, 1.0) if likelihood == "pen" else (None,):
            points = grid if up is None else torch.cat([grid, torch.full((len(grid), 1), up)], -1)
            total = total + m.log_px(points, out).exp().sum() * (at[1] - at[0]) ** 2
        close(total, 1, 1e-3)
    x = binary_images(4).view(16, 2, 2).transpose(0, 1)         # every sequence of two steps of two
    for z_dim, prior in ((2, "learned"), (2, "standard"), (0, "learned")):
        m = vrnn.VRNN(2, z_dim, "bernoulli", prior, hidden=4, features=4)
        with torch.inference_mode():
            close(common.log_mean_exp(m(x, torch.full((16,), 2), k=20_000)[2]).exp().sum(), 1, 2e-2)
    m = vrnn.VRNN(2, 0, "bernoulli", stop=True, hidden=4, features=4)
    whole = torch.cat([x, torch.zeros(1, 16, 2)])
    one, two, more = (m.terms(whole, torch.full((16,), n))[2].exp() for n in (1, 2, 3))
    close(one[0, ::4].sum() + two[:2].prod(0).sum() + more[:2].prod(0).sum(), 1, 1e-4)   # ends at 1, at 2, later


def test_vrnn_priors_see_the_past_alone_and_the_last_step_reaches_the_first():
    for name, m, x, lengths, y in vrnns():
        lengths = torch.full((4,), 5)
        if m.z_dim:
            seen, prior_of = [], m.prior_of
            m.prior_of = lambda h, label: seen.append(torch.cat(prior_of(h, label), -1)) or seen[-1].chunk(2, -1)
            changed = x.clone()
            changed[2] = 1 - changed[2]
            with no_noise():
                m(x, lengths, y), m(changed, lengths, y)
            before, after = seen
            assert torch.equal(before[:3], after[:3]), name
            assert torch.equal(before, after) if m.prior is None else not torch.allclose(before[3], after[3], atol=1e-6), name
            assert m.prior is not None or (before == 0).all(), name
        x = x.clone().requires_grad_()
        m.terms(x, lengths, y)[0][-1].sum().backward()
        assert (x.grad[0].abs().sum(-1) > 0).all(), name


def test_vrnn_of_one_step_is_a_vae():
    for name, m, x, _, y in vrnns(stops=(False,)):
        torch.nn.init.normal_(m.start)
        x, h = x[:1], m.start.expand(4, -1)
        _, enc, prior, out = m.label(y).split(m.sizes, -1)
        torch.manual_seed(3)
        log_px, kl, log_w = m(x, torch.ones(4, dtype=torch.int64), y)
        torch.manual_seed(3)
        if m.z_dim:
            mu, logvar = m.enc(m.enc_x(m.phi_x(x[0])) + m.enc_h(h) + enc).chunk(2, -1)
            q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
            mu_p, logvar_p = m.prior(m.prior_h(h) + prior).chunk(2, -1) if m.prior else (0 * mu, 0 * mu)
            p = torch.distributions.Normal(mu_p, (0.5 * logvar_p).exp())
            z = mu + q.scale * torch.randn_like(mu)
            parameters = m.out(m.out_h(h) + out + m.out_z(m.phi_z(z)))
            close(kl, torch.distributions.kl_divergence(q, p).sum(-1), 1e-4)
            ratio = (p.log_prob(z) - q.log_prob(z)).sum(-1)
        else:
            parameters, ratio = m.out(m.out_h(h) + out), 0
        if m.likelihood == "bernoulli":
            expected = torch.distributions.Bernoulli(logits=parameters).log_prob(x[0]).sum(-1)
        elif m.likelihood == "gaussian":
            w, mu, logvar = parameters[:, :2], parameters[:, 2:10].view(4, 2, 4), parameters[:, 10:].view(4, 2, 4)
            each = torch.distributions.Normal(mu, (0.5 * logvar).exp())
            expected = torch.logsumexp(w.log_softmax(-1) + each.log_prob(x[0][:, None]).sum(-1), -1)
        else:
            w, mu, logvar = parameters[:, :2], parameters[:, 2:6].view(4, 2, 2), parameters[:, 6:10].view(4, 2, 2)
            r, (a, b) = 0.99 * parameters[:, 10:12].tanh(), (0.5 * logvar).exp().unbind(-1)
            cov = torch.stack([a ** 2, r * a * b, r * a * b, b ** 2], -1).view(4, 2, 2, 2)
            each = torch.distributions.MultivariateNormal(mu, cov).log_prob(x[0][:, None, :2])
            up = torch.distributions.Bernoulli(logits=parameters[:, 12]).log_prob(x[0][:, 2])
            expected = torch.logsumexp(w.log_softmax(-1) + each, -1) + up
        close(log_px, expected, 1e-4), close(log_w, expected + ratio, 1e-4)


def test_padding_plays_no_part():
    for name, m, x, lengths, y in vrnns():
        with no_noise():
            m.zero_grad()
            terms = m(x, lengths, y)
            sum(t.sum() for t in terms).backward()
            grads = [p.grad.clone() for p in m.parameters() if p.grad is not None]
            dirty = x.clone()
            for b, n in enumerate(lengths):
                dirty[n:, b] = float("nan")
            m.zero_grad()
            again = m(dirty, lengths, y)
            sum(t.sum() for t in again).backward()
            assert all(map(torch.equal, terms, again)), name
            assert all(map(torch.equal, grads, [p.grad for p in m.parameters() if p.grad is not None])), name
            m.zero_grad()
            for b, n in enumerate(lengths):         # each on its own, at its own length
                alone = m(x[:n, b:b + 1], lengths[b:b + 1], y[b:b + 1])
                for one, all_ in zip(alone, terms):
                    close(one[0], all_[b], 1e-4)
                sum(t.sum() for t in alone).backward()
            for a, b in zip(grads, (p.grad for p in m.parameters() if p.grad is not None)):
                close(a, b, 1e-3)


def test_vrnn_draws_what_its_density_says():
    torch.manual_seed(0)
    m = vrnn.VRNN(3, 2, "pen", hidden=4, features=4)
    out = torch.tensor([0.0, 1.0, -2.0, math.log(4.0), 0.0, 0.8, 1.0]).expand(100_000, -1)
    x = m.draw(out, 1.0)
    r = 0.99 * math.tanh(0.8)
    close(x.mean(0), torch.tensor([1.0, -2.0, 1 / (1 + math.exp(-1.0))]), 3e-2)
    close(torch.cov(x[:, :2].T), torch.tensor([[4.0, 2 * r], [2 * r, 1.0]]), 5e-2)
    cold = m.draw(out, 0.25)
    close(torch.cov(cold[:, :2].T) * 16, torch.tensor([[4.0, 2 * r], [2 * r, 1.0]]), 5e-2)
    assert cold[:, 2].mean() > 0.97
    m = vrnn.VRNN(1, 2, "gaussian", mixtures=3, hidden=4, features=4)
    out = torch.tensor([0.5, 0.3, 0.2]).log().tolist() + [-9.0, 0.0, 9.0] + [0.0] * 3     # log weights, means, log variances
    for temperature, share in ((1.0, torch.tensor([0.5, 0.3, 0.2])), (0.5, torch.tensor([0.25, 0.09, 0.04]) / 0.38)):
        x = m.draw(torch.tensor(out).expand(100_000, -1), temperature)[:, 0]
        close(torch.stack([(x < -4.5), (x.abs() < 4.5), (x > 4.5)]).float().mean(1), share, 1e-2)
    for name, m, *_ in vrnns():
        with torch.no_grad():
            if m.stop:
                m.end.bias.fill_(-0.7)
            x, lengths = m.sample(6, y=torch.arange(300) % 3)
        assert x.shape == (6, 300, m.x_dim) and x.isfinite().all(), name
        if m.stop:                                  # it ends at different times, and nothing is written after that
            assert lengths.min() == 1 and lengths.max() == 6 and (lengths < 6).any()
            assert all((x[n:, b] == 0).all() for b, n in enumerate(lengths))
        else:
            assert (lengths == 6).all()
    m = vrnn.VRNN(4, 2, hidden=4, features=4)
    assert m.sample(3, n=5)[0].shape == (3, 5, 4)


def test_vrnn_stays_finite_at_silence_and_at_extremes():
    for likelihood, d in (("gaussian", 6), ("pen", 3)):
        m = vrnn.VRNN(d, 2, likelihood, stop=True, mixtures=2, hidden=8, features=8)
        optimizer = torch.optim.Adam(m.parameters(), 1e-2)
        for x in (torch.zeros(7, 2, d), torch.full((1, 2, d), 1e3), torch.full((200, 2, d), -1e3)):
            x[..., 2] = float(x[0, 0, 2] > 0)       # of the pen, whether it is up
            for _ in range(5):
                log_px, kl, log_w = m(x, torch.full((2,), len(x)))
                optimizer.zero_grad()
                (kl - log_px).mean().backward()
                assert torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0).isfinite()
                optimizer.step()
                assert log_px.isfinite().all() and kl.isfinite().all() and log_w.isfinite().all()


# -------------------------------------------------------------------------------------- 11: condition

def test_the_condition_is_used():
    x, y = common.glyph_images(2400, seed=0)
    x = common.binarise(x, seed=0)
    for build in (lambda: cvae.CVAE(hidden=(64,), z_dim=8), lambda: cdraw.CDRAW(glimpses=3, hidden=32, z_dim=4)):
        torch.manual_seed(0)
        m = build()
        optimizer = torch.optim.Adam(m.parameters(), 3e-3)
        for i in range(120):
            batch = torch.arange(i * 100, i * 100 + 100) % 2000
            log_px, kl, _ = m(x[batch], y[batch])
            optimizer.zero_grad()
            (kl - log_px).mean().backward()
            optimizer.step()
        score = lambda y: common.evaluate(m, x[2000:], y)["neg_elbo"]
        assert score(y[2000:].roll(7)) > score(y[2000:]) + 1, (score(y[2000:].roll(7)), score(y[2000:]))


def test_hidden_pixels_stay_hidden_and_observed_ones_come_back():
    torch.manual_seed(0)
    a = (torch.rand(6, 1, 5, 7) < 0.5).float()
    for quadrants in (1, 2, 3):
        y = cvae.hide(a, quadrants)
        b = torch.where(y < 0, 1 - a, a)                  # differs in every hidden pixel
        assert (a != b).any()
        for net, hidden in (("mlp", (8,)), ("conv", (3, 4))):
            m = cvae.CVAE((1, 5, 7), "quadrants", z_dim=3, hidden=hidden, net=net)
            for p, q in zip(m.prior(y), m.prior(cvae.hide(b, quadrants))):
                assert torch.equal(p, q)
            drawn = m.sample(y)
            assert torch.equal(drawn[y >= 0], a[y >= 0]) and ((drawn >= 0) & (drawn <= 1)).all()
            with no_noise(), torch.inference_mode():      # log p counts hidden pixels only
                full, h_y = m.sample(y).clamp(1e-6, 1 - 1e-6), m.features(y)
                z = m.enc(torch.cat([m.phi_x(a.flatten(1)), h_y], -1)).chunk(2, -1)[0]
                p = m.decode(z, h_y).sigmoid()
                each = torch.where(a.flatten(1) > 0, p, 1 - p).log() * (y.flatten(1) < 0)
                close(m(a, y)[0], each.sum(-1), 1e-4)
    x = torch.zeros(1, 1, 4, 4)
    assert [int((cvae.hide(x, q) < 0).sum()) for q in (1, 2, 3)] == [12, 8, 4]
    assert cvae.hide(x, 1)[0, 0, 3, 0] == 0 and cvae.hide(x, 1)[0, 0, 0, 0] == -1
    assert cvae.hide(x, 3)[0, 0, 3, 3] == -1 and cvae.hide(x, 3)[0, 0, 3, 2] == -1


# --------------------------------------------------------------------- 12, 13: resume and test split

def test_resume_is_exact():
    for script in SCRIPTS:
        with folder():
            train(script, "--epochs", 4, "--out-dir", "whole")
            train(script, "--epochs", 2, "--out-dir", "parts")
            train(script, "--epochs", 4, "--resume", "parts/checkpoint.pt")
            train(script, "--epochs", 1, "--out-dir", "other")
            train(script, "--epochs", 4, "--resume", "other/checkpoint.pt", "--out-dir", "elsewhere")
            for name in ("parts", "elsewhere"):
                a, b = (torch.load(f"{d}/checkpoint.pt", weights_only=True) for d in ("whole", name))
                for part in ("model", "weights"):
                    assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), (script, part)
                assert Path("whole/log.csv").read_text() == Path(name, "log.csv").read_text(), script
                a, b = (json.loads(Path(d, "results.json").read_text()) for d in ("whole", name))
                same = [k for k in a if k.startswith(("test", "val", "epochs", "params"))]
                assert len(same) > 5 and all(a[k] == b[k] for k in same), script
            first = json.loads(Path("whole/results.json").read_text())
            train(script, "--epochs", 0, "--resume", "whole/best.pt", "--out-dir", "only")
            again = json.loads(Path("only/results.json").read_text())
            assert first["test_neg_elbo"] == again["test_neg_elbo"] and first["params"] == again["params"]


def test_interrupt_inside_an_epoch_saves_and_goes_on_exactly():
    with folder():
        train("vae", "--epochs", 2, "--out-dir", "whole")
        whole = torch.load("whole/checkpoint.pt", weights_only=True)
        log, steps = common.Run.log, whole["step"] // 2
        for parts, last in (("middle", steps + 2), ("end", steps), ("all", 2 * steps)):   # step of the interrupt
            calls = []

            def interrupting(self, *args, **kwargs):
                log(self, *args, **kwargs)
                calls.append(1)
                self.stop = len(calls) == last
            with patched(common.Run, "log", interrupting):
                try:
                    train("vae", "--epochs", 2, "--out-dir", parts)
                    raise AssertionError("went on")
                except SystemExit as stop:
                    assert stop.code == 130 and len(calls) == last
            if parts == "middle":
                with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
                    train("vae", "--resume", f"{parts}/checkpoint.pt", "--batch-size", 3)
                assert "--batch-size 3" in said.getvalue() and said.getvalue().count("\n") == 1
            train("vae", "--resume", f"{parts}/checkpoint.pt")
            b = torch.load(f"{parts}/checkpoint.pt", weights_only=True)["weights"]
            assert all(torch.equal(v, b[k]) for k, v in whole["weights"].items())
            assert Path("whole/log.csv").read_text() == Path(parts, "log.csv").read_text()


def test_interrupt_in_the_test_phase_keeps_the_training():
    with folder():
        with patched(common, "evaluate", lambda *args, **_: signal.raise_signal(signal.SIGINT) if len(args) > 3 else
                     {"neg_elbo": 1.0}), contextlib.redirect_stderr(io.StringIO()):
            try:
                train("vae", "--epochs", 1, "--out-dir", "a")
                raise AssertionError("went on")
            except SystemExit as stop:
                assert stop.code == 130
        assert Path("a/checkpoint.pt").exists() and not Path("a/results.json").exists()
        train("vae", "--resume", "a/checkpoint.pt")
        assert Path("a/results.json").exists()


def child(script, flags, save_every, limit):
    import resource
    common.Run.save_every = save_every
    with open("error.txt", "w") as errors, contextlib.redirect_stderr(errors):
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train(script, *flags)


def start(script, *flags, save_every=180, limit=None):
    """Train in a process of its own, forked from one that has imported torch; `limit` bytes may a file have."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.utils", "torchvision.datasets", "matplotlib.figure"])
    process = context.Process(target=child, args=(script, flags, save_every, limit))
    process.start()
    return process


def newest(run):
    """The flags that go on with what a run has left."""
    return next((["--resume", f"{run}/{name}"] for name in ("checkpoint.pt", "best.pt") if Path(run, name).exists()), [])


def test_kill_at_any_moment_loses_nothing():
    """SEQVAE_KILLS=N: of every script, in the place of one."""
    g = random.Random(time.time_ns())
    for script in SCRIPTS:
        with folder():
            began = time.time()
            train(script, "--epochs", 2, "--out-dir", "whole")
            seconds, kills = 2 * (time.time() - began) + 1, 0     # a process of its own takes longer
            while kills < int(os.environ.get("SEQVAE_KILLS", 1)):
                run = start(script, "--epochs", 2, "--out-dir", "parts", *newest("parts"), save_every=0)
                run.join(seconds * g.random())
                run.kill()
                run.join()
                assert run.exitcode in (-signal.SIGKILL, 0), (script, run.exitcode)
                kills += run.exitcode != 0
            end = start(script, "--epochs", 2, "--out-dir", "parts", *newest("parts"))
            end.join()
            assert end.exitcode == 0, script
            for name in ("best.pt", "checkpoint.pt"):
                a, b = (torch.load(f"{d}/{name}", weights_only=True) for d in ("whole", "parts"))
                assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "weights") for k in a[part]), script
            assert Path("whole/log.csv").read_text() == Path("parts/log.csv").read_text(), script
            a, b = (json.loads(Path(d, "results.json").read_text()) for d in ("whole", "parts"))
            assert all(a[k] == b[k] for k in a if k.startswith("test_")), script


def test_a_full_disk_or_memory_ends_with_a_line_and_nothing_lost():
    with folder() as here:
        for flags in (["--out-dir", "new"], ["--out-dir", "old"]):
            run = start("vae", "--epochs", 1, *flags, limit=20_000 if flags[-1] == "new" else None)
            run.join()
        before = {p: p.read_bytes() for p in here.glob("old/*")}
        assert not Path("new/checkpoint.pt").exists() and {"checkpoint.pt", "best.pt"} <= {p.name for p in before}
        run = start("vae", "--resume", "old/checkpoint.pt", "--epochs", 2, limit=20_000)
        run.join()
        error = Path("error.txt").read_text()
        assert run.exitcode == 2 and error.count("\n") == 1 and "can't write old" in error, error
        torch.load("old/checkpoint.pt", weights_only=True)
        assert all(p.read_bytes() == text for p, text in before.items() if p.suffix == ".pt")
        done = subprocess.run([sys.executable, HERE / "vae.py", "--dataset", "glyphs", "--hidden", "100000000000"],
                              capture_output=True, text=True, timeout=170)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "out of memory" in done.stderr, done.stderr


def test_noise_of_several_processes_is_that_of_one():
    draws = (lambda n: torch.randn(3, n, 5), lambda n: torch.rand(torch.Size((n, 1, 4, 4))), lambda n: torch.rand(6, n),
             lambda n: torch.randn_like(torch.zeros(n, 7)), lambda n: torch.randint(9, (n,)), lambda n: torch.randn(4, 4))
    for draw_ in draws:
        torch.manual_seed(0)
        whole = draw_(20)
        parts = []
        for rank in range(2):
            torch.manual_seed(0)
            with common.SharedNoise(rank, 10, 2):
                parts.append(draw_(10))
            after = torch.rand(1)
        torch.manual_seed(0)
        draw_(20)
        assert torch.equal(after, torch.rand(1))
        dim = next((i for i, n in enumerate(whole.shape) if n == 20), None)
        assert torch.equal(parts[0], parts[1]) if dim is None else torch.equal(torch.cat(parts, dim), whole)


def test_two_processes_learn_as_one_does():
    with folder():
        flags = ["--epochs", "5", "--test-samples", "1", *SMALL["draw"], "--batch-size", "100", "--out-dir"]
        train("draw", *flags, "one")
        Path("both.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport common, draw, test_all\n"
                                   f"common.images = test_all.tiny_glyphs\ndraw.main({[*flags, 'two']})\n")
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "both.py"],
                              capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        one, two = (list(csv.DictReader(open(f"{d}/log.csv"))) for d in ("one", "two"))
        assert len(one) == len(two) == 5
        for a, b in zip(one, two):
            for name in a:
                close(float(b[name]) / float(a[name]), 1, 1e-4)
        with contextlib.redirect_stdout(io.StringIO()):        # and one goes on where two stopped
            train("draw", "--resume", "two/checkpoint.pt", "--epochs", "6")


def test_the_test_split_is_touched_once_at_the_end():
    class Guarded(SimpleNamespace):
        def __getattribute__(self, name):
            if name == "test":
                events.append("test")
            return super().__getattribute__(name)
    best = common.Run.best_model
    for script in SCRIPTS:
        events = []
        with folder(), patched(common.Run, "best_model", lambda run: events.append("chosen") or best(run)):
            train(script, "--epochs", 1, images=lambda args: Guarded(**vars(tiny_glyphs(args))),
                  sequences=lambda args: Guarded(**vars(tiny_strokes(args))))
        assert events[0] == "chosen" and "test" in events, (script, events)


def test_a_second_run_leaves_the_first_alone():
    with folder():
        for _ in range(2):
            train("vae", "--epochs", 1)
        assert Path("out/vae/results.json").exists() and Path("out/vae-2/results.json").exists()
        Path("out/vae-3").mkdir()                 # a run's that has just begun
        train("vae", "--epochs", 1)
        assert not any(Path("out/vae-3").iterdir()) and Path("out/vae-4/results.json").exists()


def test_a_validation_that_is_not_a_number_is_not_the_best():
    values = iter([3.0, math.nan, 2.0, 4.0])
    with folder(), patched(common, "evaluate", lambda *args, **_: {"neg_elbo": next(values, 5.0)}):
        train("vae", "--epochs", 4, "--out-dir", "a")
        assert torch.load("a/best.pt", weights_only=True)["epoch"] == 3


# ----------------------------------------------------------------------------- 14: extremes stay finite

def test_extreme_logits_are_finite():
    for name, m, bound in models():
        linear = m.canvas if hasattr(m, "canvas") else [p for n, p in m.dec.named_parameters() if n.endswith("bias")][-1]
        for value in (1e4, -1e4):
            with torch.no_grad():
                linear.fill_(value)
            x = (torch.rand(6, 1, 4, 4) < 0.5).float()
            terms = bound(x)
            m.zero_grad()
            sum(t.sum() for t in terms).backward()
            assert all(t.isfinite().all() for t in terms), name
            assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters()), name
    logits = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    value = vae.bernoulli_log_px(torch.tensor([1.0, 1.0, 1.0]), logits)
    value.backward()
    close(value, -1e4 - math.log(2)), close(logits.grad, torch.tensor([0.0, 1.0, 0.5]))


def test_a_loss_that_is_not_finite_stops_the_run():
    with folder():
        train("vae", "--epochs", 1, "--out-dir", "a")
        status, line = outcome("vae", "--resume", "a/checkpoint.pt", "--epochs", "3", "--lr", "1e30", images=tiny_glyphs)
        assert status == 2 and "the loss of step" in line and "a/checkpoint.pt" in line, line
        saved = torch.load("a/checkpoint.pt", weights_only=True)
        assert all(v.isfinite().all() for v in saved["weights"].values())


# --------------------------------------------------------------------------------------------- 15: use

PATHS = {
    "vae": [[], ["--likelihood", "gaussian", "--z-dim", "2"], ["--net", "conv", "--hidden", "4", "8", "--iw", "3"]],
    "cvae": [[], ["--condition", "quadrants", "--quadrants", "2"], ["--condition", "quadrants", "--z-dim", "0"],
             ["--net", "conv", "--hidden", "4", "8"],
             ["--net", "conv", "--hidden", "4", "8", "--condition", "quadrants", "--quadrants", "3"]],
    "ssl_vae": [["--labels", "100"], ["--labels", "100", "--auxiliary", "--no-augment"],
                ["--labels", "100", "--supervised-only"]],
    "draw": [["--glimpses", "3"], ["--glimpses", "12", "--read-size", "1", "--write-size", "28", "--hidden", "8"],
             ["--no-attention", "--glimpses", "1", "--hidden", "8"]],
    "cdraw": [["--glimpses", "2"], ["--glimpses", "2", "--no-attention", "--digits", "31"]],
    "vrnn": [[], ["--conditional", "--digits", "27", "--temperature", "0.5"], ["--prior", "standard", "--mixtures", "3"],
             ["--z-dim", "0"]],
}
PICTURES = {"vae": ("samples.png", "reconstructions.png", "interpolation.png"), "cvae": ("samples.png",),
            "ssl_vae": ("samples.png", "analogies.png"), "draw": ("samples.png", "drawing.gif"),
            "cdraw": ("samples.png", "drawing.gif"), "vrnn": ("samples.png",)}


def test_every_script_and_path_as_a_user_runs_it():
    scripts = {p.stem for p in HERE.glob("*.py")} - {"common", "test_all"}
    assert scripts == set(PATHS) == set(SCRIPTS), "a script without a test"
    runs = {s: [[*flags, "--dry-run", "--dataset", "glyphs", "--out-dir", f"{s}{i}"] for i, flags in enumerate(paths)]
            for s, paths in PATHS.items()}

    def run(script):
        return subprocess.run([sys.executable, HERE / f"{script}.py", *runs[script][0]], capture_output=True, text=True,
                              timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with folder(), ThreadPoolExecutor(2) as pool:
        firsts = {script: pool.submit(run, script) for script in PATHS}
        for script, paths in runs.items():
            for path in paths[1:]:               # the rest in this process: importing torch takes seconds
                with contextlib.redirect_stdout(io.StringIO()):
                    __import__(script).main([*path, "--batch-size", "50"])
        for script, paths in runs.items():
            assert firsts[script].result().returncode == 0, firsts[script].result().stderr
            for i, _ in enumerate(paths):
                names = ("checkpoint.pt", "best.pt", "log.csv", "results.json", *PICTURES[script])
                assert all(Path(f"{script}{i}", n).stat().st_size for n in names), (script, i)
                result = json.loads(Path(f"{script}{i}", "results.json").read_text())
                needed = {"script", "dataset", "args", "params", "epochs", "seconds", "examples_per_second",
                          "test_neg_elbo", "test_nll", "test_samples"}
                assert needed <= set(result) and math.isfinite(result["test_neg_elbo"])
                assert script != "ssl_vae" or 0 <= result["test_error"] <= 100 and 0 <= result["val_error"] <= 100
            rows = list(csv.DictReader(open(f"{script}0/log.csv")))
            assert len(rows) == 1
        assert Path("vae1/manifold.png").exists() and not Path("vae0/manifold.png").exists()


def test_compile_captures_graphs_on_cuda_and_only_when_asked():
    modes = []
    for device in ("cpu", "cuda", "cuda:1"):
        with patched(torch, "compile", lambda f, mode: modes.append(mode) or f):
            common.compiled(len, SimpleNamespace(compile=True, device=device))
            common.compiled(len, SimpleNamespace(compile=True, device=device), steady=False)
    assert modes == ["default", "default", "reduce-overhead", "default", "reduce-overhead", "default"]
    assert common.compiled(len, SimpleNamespace(compile=False, device="cuda")) is len


def test_help_shows_every_flag_and_their_number_is_limited():
    for script in SCRIPTS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                __import__(script).main(["--help"])
            except SystemExit as stop:
                assert stop.code == 0
        flags = [line.split()[0] for line in out.getvalue().splitlines() if line.startswith("  --")]
        assert {"--dataset", "--resume", "--test-samples"} <= set(flags) and len(flags) <= 18, (script, flags)
        assert f"python {script}.py" in out.getvalue()


COPIED = {
    "vae": "m = VAE((1, 6, 7), 8, 2); loss = lambda: sum((k - l).mean() for l, k, _ in [m(x)]); s = lambda: m.sample(3)",
    "cvae": "m = CVAE((1, 6, 7), z_dim=2, hidden=8); loss = lambda: sum((k - l).mean() for l, k, _ in [m(x, y)]);"
            "s = lambda: m.sample(y[:3])",
    "ssl_vae": "m = SSLVAE((1, 6, 7), z_dim=2, hidden=8);"
               "loss = lambda: -(m.labelled_bound(x, y) + m.unlabelled_bound(x)).mean()"
               " + torch.nn.functional.cross_entropy(m.classify(x), y); s = lambda: m.sample(y[:3])",
    "draw": "m = DRAW((1, 6, 7), glimpses=3, hidden=16, z_dim=2); loss = lambda: sum((k - l).mean() for l, k, _ in [m(x)]);"
            "s = lambda: m.sample(3)[-1]",
    "cdraw": "m = CDRAW((1, 6, 7), glimpses=3, hidden=16, z_dim=2);"
             "loss = lambda: sum((k - l).mean() for l, k, _ in [m(x, y)]); s = lambda: m.sample(y[:3])[-1]",
    "vrnn": "m = VRNN(7, 2, hidden=32, features=32); n = torch.arange(8) % 3 + 4; rows = x[:, 0].transpose(0, 1);"
            "loss = lambda: sum((k - l).mean() for l, k, _ in [m(rows, n)]);"
            "s = lambda: m.sample(6, n=3)[0].transpose(0, 1)[:, None]",
}


def test_a_copied_file_without_main_trains_and_samples():
    assert set(COPIED) == set(SCRIPTS)
    with folder():
        for script, use in COPIED.items():
            text = (HERE / f"{script}.py").read_text()
            alone = text[:text.index("\ndef main(")]
            code = (f"import sys; sys.modules['common'] = None\n{alone}\nx = (torch.rand(8, 1, 6, 7) < .5).float()\n"
                    f"y = torch.arange(8) % 10\n{use}\no = torch.optim.Adam(m.parameters(), 1e-2)\nfirst = loss().item()\n"
                    "for _ in range(30):\n    o.zero_grad(); v = loss(); v.backward(); o.step()\n"
                    "assert v.item() < first - 1, (first, v)\nassert s().shape == (3, 1, 6, 7)\n")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code.replace("import sys; sys.modules['common'] = None", ""), script, "exec"),
                     {"__name__": "copied"})
        for script in SCRIPTS:
            text = (HERE / f"{script}.py").read_text()
            assert not any(f"import {other}" in text for other in SCRIPTS), "a script imports another"
            assert text.index("import common") > text.index("def main("), "common belongs inside main"


def outcome(script, *flags, images=None):
    """Status and standard error of main(flags)."""
    error, status = io.StringIO(), 0
    swap = patched(common, "images", images) if images else contextlib.nullcontext()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()), swap:
            __import__(script).main([*SMALL[script], "--batch-size", "100", *map(str, flags)])
    except SystemExit as stop:
        status = stop.code
    return status, error.getvalue()


def test_bad_input_gets_one_line_and_status_2():
    with folder() as here:
        train("vae", "--epochs", 1, "--out-dir", "run")
        raw = here / "bad" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03not an image")
        Path("text.pt").write_text("hello")
        torch.save({"x": 1}, "dict.pt")
        torch.save(SimpleNamespace(script="vae"), "code.pt")
        Path("kept").mkdir()
        Path("kept/best.pt").write_bytes(Path("run/best.pt").read_bytes())
        Path("cut.pt").write_bytes(Path("run/best.pt").read_bytes()[:1000])
        for i in range(3):
            wav_file(f"wavs/{i}.wav", 900)
        for kind, given in (("cut", 500), ("text", 0), ("empty", 0), ("8bit", 500), ("24bit", 500), ("long", 400_001)):
            wav_file(f"bad_{kind}/{kind}.wav", given, width={"8bit": 1, "24bit": 3}.get(kind, 2))
        Path("bad_cut/cut.wav").write_bytes(Path("bad_cut/cut.wav").read_bytes()[:30])
        Path("bad_text/text.wav").write_text("hello")
        for kind, points in (("none", 0), ("broken", 5), ("long", 2001)):
            iam_file(f"iam_{kind}/lineStrokes/a01/a01-000/a01-000u-01.xml", [points])
        Path("iam_broken/lineStrokes/a01/a01-000/a01-000u-01.xml").write_text("<WhiteboardCaptureSession><Stroke")
        Path("bad/pendigits").mkdir()
        for name in ("tra", "tes"):
            Path(f"bad/pendigits/pendigits-orig.{name}.Z").write_bytes(b"\x1f\x9d\x90short")
        glyph = ("--dataset", "glyphs")
        table = [  # script, flags, what the line must say
            ("vae", ["--epochs", "-1"], "--epochs: must be a whole number of at least 0"),
            ("vae", ["--epochs", "1.5"], "--epochs"),
            ("vae", ["--batch-size", "0"], "--batch-size: must be a whole number of at least 1"),
            ("vae", ["--lr", "0"], "--lr: must be a number of at least 1e-09"),
            ("vae", ["--lr", "nan"], "--lr"),
            ("vae", ["--lr", "fast"], "--lr"),
            ("vae", ["--seed", "-3"], "--seed"),
            ("vae", ["--z-dim", "0"], "--z-dim"),
            ("vae", ["--iw", "0"], "--iw"),
            ("vae", ["--hidden", "0"], "--hidden"),
            ("vae", ["--test-samples", "0"], "--test-samples"),
            ("vae", ["--net", "conv", "--hidden", "3"], "two numbers of channels"),
            ("vae", ["--likelihood", "poisson"], "--likelihood"),
            ("vae", ["--dataset", "cifar"], "--dataset"),
            ("vae", ["--device", "abacus"], "--device abacus"),
            ("vae", ["--device", "cuda:99"], "--device cuda:99"),
            ("vae", ["--nonsense"], "--nonsense"),
            ("vae", ["--dataset", "mnist", "--data-dir", "bad"], "damaged"),
            ("vae", ["--data-dir", "bad"], "damaged"),
            ("vae", ["--resume", "none.pt"], "No such file"),
            ("vae", ["--resume", "."], "--resume"),
            ("vae", ["--resume", "text.pt"], "not a checkpoint"),
            ("vae", ["--resume", "dict.pt"], "not a checkpoint"),
            ("vae", ["--resume", "code.pt"], "not a checkpoint"),
            ("vae", ["--resume", "cut.pt"], "damaged"),
            ("vae", ["--resume", "run/best.pt", "--z-dim", "7"], "z_dim"),
            ("cvae", ["--resume", "run/best.pt"], "written by vae.py"),
            ("ssl_vae", ["--resume", "run/best.pt"], "written by vae.py"),
            ("vae", [*glyph, "--out-dir", "run"], "already holds a run"),
            ("vae", [*glyph, "--out-dir", "kept"], "already holds a run"),
            ("vae", [*glyph, "--out-dir", "text.pt"], "can't write"),
            ("vae", [*glyph, "--out-dir", "text.pt/deep"], "can't write"),
            ("cvae", ["--quadrants", "4"], "--quadrants"),
            ("cvae", ["--z-dim", "-1"], "--z-dim"),
            ("cvae", ["--condition", "text"], "--condition"),
            ("ssl_vae", [*glyph, "--labels", "7"], "multiple of 10"),
            ("ssl_vae", [*glyph, "--labels", "60000"], "up to"),
            ("ssl_vae", [*glyph, "--labels", "0"], "--labels"),
            ("ssl_vae", ["--alpha", "-1"], "--alpha"),
            ("draw", ["--glimpses", "0"], "--glimpses"),
            ("draw", ["--read-size", "0"], "--read-size"),
            ("draw", [*glyph, "--read-size", "29"], "at most 28"),
            ("draw", [*glyph, "--write-size", "29"], "at most 28"),
            ("draw", ["--resume", "run/best.pt"], "written by vae.py"),
            ("cdraw", ["--digits", "x"], "--digits 'x': must be digits"),
            ("cdraw", ["--digits", ""], "must be digits"),
            ("cdraw", ["--glimpses", "two"], "--glimpses"),
            ("cdraw", ["--resume", "run/best.pt"], "written by vae.py"),
            ("vrnn", ["--digits", "12"], "--conditional"),
            ("vrnn", ["--conditional", "--digits", "-1"], "--digits"),
            ("vrnn", ["--temperature", "0"], "--temperature"),
            ("vrnn", ["--mixtures", "0"], "--mixtures"),
            ("vrnn", ["--dataset", "wav", "--data-dir", "wavs", "--conditional"], "has no labels"),
            ("vrnn", ["--dataset", "wav", "--data-dir", "none"], "none: 0 / 0 / 0 sequences"),
            *(("vrnn", ["--dataset", "wav", "--data-dir", f"bad_{kind}"], f"{kind}.wav: {text}") for kind, text in (
                ("cut", "not a WAV"), ("text", "not a WAV"), ("empty", "0 samples"), ("8bit", "8 bit"), ("24bit", "24 bit"),
                ("long", "400001 samples"))),
            ("vrnn", ["--dataset", "iam-ondb", "--data-dir", "none"], "registered"),
            *(("vrnn", ["--dataset", "iam-ondb", "--data-dir", f"iam_{kind}"], text) for kind, text in (
                ("none", "has 0 points"), ("broken", "not a file of strokes"), ("long", "has 2001 points"))),
            ("vrnn", ["--dataset", "pendigits", "--data-dir", "bad"], "pendigits-orig.tra.Z: damaged"),
            ("vrnn", ["--resume", "run/best.pt"], "written by vae.py"),
        ]
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in here.rglob("*") if p.is_file()}
        for script, flags, text in table:
            status, error = outcome(script, *flags)
            assert status == 2, (script, flags, status, error)
            assert error.count("\n") == 1 and text in error, (script, flags, error)
        after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in here.rglob("*") if p.is_file()}
        assert before == after, "bad input changed a file"
        assert not Path("out").exists()


# --------------------------------------------------------------------------------------------- data

def idx_files(n):
    """MNIST's four files with n training images, gzipped: {name: bytes}."""
    x, y = torch.randint(256, (n, 28, 28), dtype=torch.uint8), (torch.arange(n) % 10).to(torch.uint8)
    files = {}
    for part, k in (("train", n), ("t10k", 50)):
        files[f"{part}-images-idx3-ubyte.gz"] = struct.pack(">iiii", 2051, k, 28, 28) + x[:k].numpy().tobytes()
        files[f"{part}-labels-idx1-ubyte.gz"] = struct.pack(">ii", 2049, k) + y[:k].numpy().tobytes()
    return {name: gzip.compress(data, 1) for name, data in files.items()}


@contextlib.contextmanager
def server(files):
    """A local mirror of {name: bytes}; yields its address."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = files.get(self.path.strip("/"))
            self.send_response(200 if data is not None or self.path == "/" else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{host.server_port}/"
    finally:
        host.shutdown()


def test_download_from_a_mirror_is_checked():
    from torchvision import datasets
    torch.manual_seed(0)
    files = idx_files(5100)
    sums = [(name, hashlib.md5(data).hexdigest()) for name, data in files.items()]
    broken = {**files, "train-images-idx3-ubyte.gz": files["train-images-idx3-ubyte.gz"][:-9]}
    args = lambda d, name=None: SimpleNamespace(dataset=name, data_dir=d, device="cpu", dry_run=False, batch_size=9)
    quiet = contextlib.redirect_stderr(io.StringIO())
    with folder(), server(files) as good, server(broken) as bad, patched(datasets.MNIST, "resources", sums), quiet, \
            contextlib.redirect_stdout(io.StringIO()) as said:
        dead = "http://127.0.0.1:9/"
        with patched(datasets.MNIST, "mirrors", [dead, good]):    # a dead mirror gives way to the next
            data = common.images(args("one"))
            assert [len(s[0]) for s in (data.train, data.valid, data.test)] == [100, 5000, 50]
            assert data.train[1][0] == 5000 % 10 and data.valid[1][1] == 1
        with patched(datasets.MNIST, "mirrors", [bad]):           # a cut file is not taken for a whole one
            try:
                common.images(args("two", "mnist"))
                raise AssertionError("took a damaged download")
            except SystemExit as stop:
                assert stop.code == 2
        with patched(datasets.MNIST, "mirrors", [dead]):
            start = time.time()
            assert common.images(args("three")).train[0].shape[1:] == (1, 28, 28)
            assert "NOT MNIST" in said.getvalue() and time.time() - start < 20
            try:
                common.images(args("three", "mnist"))
                raise AssertionError("found what is not there")
            except SystemExit as stop:
                assert stop.code == 2


def test_glyphs_are_digits_seeded_and_different():
    x, y = common.glyph_images(2400, seed=0)
    assert x.dtype == torch.uint8 and x.shape == (2400, 1, 28, 28) and (torch.bincount(y, minlength=10) > 150).all()
    draw = glyphs.__wrapped__
    assert torch.equal(draw(300, 5)[0], draw(300, 5)[0]) and not torch.equal(draw(300, 5)[0], draw(300, 6)[0])
    ink = (x > 128).float().mean((1, 2, 3))
    assert ((ink > 0.03) & (ink < 0.6)).float().mean() > 0.99 and len(common.glyph_fonts()) > 10
    means = torch.stack([x[y == d].float().mean(0) for d in range(10)]).flatten(1)
    held = (torch.cdist(x[2000:].float().flatten(1), means).argmin(1) == y[2000:]).float().mean()
    assert held > 0.5, f"nearest mean recognises {held:.0%}"
    strokes, labels = common.glyph_strokes(50, seed=0)
    again, _ = common.glyph_strokes(50, seed=0)
    assert len(strokes) == len(labels) == 50 and all(torch.equal(a, b) for a, b in zip(strokes, again))
    for s, label in zip(strokes, labels):
        assert s.shape[1] == 3 and s[-1, 2] == 1 and s.isfinite().all() and (s[0, :2] == 0).all()
        assert label not in (0, 8) or s[:, 2].sum() >= 2         # an 8 has holes, each a stroke of its own
        height = s[:, 1].cumsum(0)
        assert 0.5 < height.max() - height.min() < 2


def wav_file(path, samples, rate=8000, channels=1, width=2, tone=440.0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with wave.open(path, "wb") as file:
        file.setnchannels(channels), file.setsampwidth(width), file.setframerate(rate)
        wave_ = (8000 * torch.sin(torch.arange(samples) / rate * tone * 2 * math.pi)).to(torch.int16)
        sound = wave_[:, None].expand(-1, channels).contiguous().numpy().tobytes()
        file.writeframes(sound if width == 2 else bytes(samples * width * channels))


def iam_file(path, strokes):
    """An XML file as of IAM-OnDB's lineStrokes, with strokes of so many points."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    body = "".join("<Stroke colour='black'>" + "".join(f"<Point x='{10 * i}' y='{5 * i + 100 * s}' time='{i}.5'/>"
                                                       for i in range(n)) + "</Stroke>" for s, n in enumerate(strokes))
    Path(path).write_text(f"<?xml version='1.0'?><WhiteboardCaptureSession><StrokeSet>{body}</StrokeSet>"
                          "</WhiteboardCaptureSession>")


def sequence_args(name, folder):
    return SimpleNamespace(dataset=name, data_dir=str(folder), device="cpu", dry_run=False, batch_size=9)


def test_wav_files_of_any_rate_are_framed_and_learned_from():
    with folder() as here:
        for i in range(20):
            wav_file(f"in/{i}.wav", 1000 + 100 * i, rate=8000)
        data = common.sequences(sequence_args("wav", here / "in"))
        assert [len(p[0]) for p in (data.train, data.valid, data.test)] == [16, 2, 2]
        assert data.kind == "speech" and data.num_classes == 0 and data.train[0].shape[2] == 200
        x, lengths, _ = data.train
        assert set(torch.cat([p[1] for p in (data.train, data.valid, data.test)]).tolist()) == {
            -(-(1000 + 100 * i) // 200) for i in range(20)}
        assert all((x[b, n:] == 0).all() for b, n in enumerate(lengths))
        kept = torch.cat([s[:n] for s, n in zip(x, lengths)])
        close(kept.square().mean(), 1, 1e-3)         # normalised on the training part
        wav_file("high.wav", 32_000, rate=32_000, channels=2)
        high = common.frames(Path("high.wav"), 8000).flatten()
        wav_file("low.wav", 8000, rate=8000)
        low = common.frames(Path("low.wav"), 8000).flatten()
        assert len(high) == len(low) == 8000 and (high - low)[200:-200].abs().max() < 40, (high - low).abs().max()
        basis, tone = common.dct(200).double(), torch.cos(math.pi / 200 * 30 * (torch.arange(200) + 0.5)).double()
        close(basis @ basis.T, torch.eye(200))       # so densities are those of the samples
        close((tone @ basis).square(), F.one_hot(torch.tensor(30), 200) * 100, 1e-4)
        with contextlib.redirect_stdout(io.StringIO()):
            vrnn.main(["--dataset", "wav", "--data-dir", "in", "--dry-run", "--out-dir", "run", "--mixtures", "2"])
        sounds = sorted(Path("run/sounds").glob("*.wav"))
        assert len(sounds) == 80 and Path("run/spectrograms.png").exists()
        with wave.open(str(sounds[0])) as file:
            assert file.getframerate() == 8000 and file.getsampwidth() == 2 and file.getnframes() % 200 == 0


def test_handwriting_is_read_and_split_by_the_users_lists_or_by_folder():
    with folder() as here:
        for form in range(20):
            iam_file(f"in/lineStrokes/a{form:02}/a{form:02}-000/a{form:02}-000u-01.xml", [4 + form, 3])
        data = common.sequences(sequence_args("iam-ondb", here / "in"))
        assert [len(p[0]) for p in (data.train, data.valid, data.test)] == [16, 2, 2]
        x, lengths, _ = data.train
        first = x[0, :lengths[0]]
        assert lengths[0] == 9 and (first[:, 2].nonzero().flatten() == torch.tensor([5, 8])).all()
        close(first[1:6, :2] * data.scale, torch.tensor([10.0, -5.0]).expand(5, 2), 1e-3)   # up is up
        close(first[6, :2] * data.scale, torch.tensor([-50.0, 25.0 - 100]), 1e-3)
        for file, forms in (("trainset", range(15)), ("testset_v", (15, 16)), ("testset_f", (17,))):
            Path(f"in/{file}.txt").write_text("".join(f"a{form:02}-000u\n" for form in forms))
        data = common.sequences(sequence_args("iam-ondb", here / "in"))
        assert [len(p[0]) for p in (data.train, data.valid, data.test)] == [15, 2, 1]


def test_an_archive_is_checked_and_stays_in_its_folder():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("a/recordings/0_x_1.wav", "a/recordings/../../../evil.wav", "a/other.txt", "/abs/recordings/0_y_1.wav"):
            archive.writestr(name, "content")
    content = content.getvalue()
    with folder() as here, server({"good.zip": content, "cut.zip": content[:-30]}) as url, \
            contextlib.redirect_stderr(io.StringIO()) as said:
        sha256 = hashlib.sha256(b"0_x_1.wavcontent" + b"0_y_1.wavcontent").hexdigest()
        for name, sha in (("good.zip", "0" * 64), ("cut.zip", sha256), ("none.zip", sha256)):
            try:
                common.download(url + name, here / "data" / "set", sha, r".*/recordings/(\d_[a-z]+_\d+\.wav)")
                raise AssertionError("took a damaged archive")
            except SystemExit as stop:
                assert stop.code == 2 and not (here / "data" / "set").exists()
        assert said.getvalue().count("\n") == 3 and "checksum" in said.getvalue()
        common.download(url + "good.zip", here / "data" / "set", sha256, r".*/recordings/(\d_[a-z]+_\d+\.wav)")
        assert sorted(p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()) == [
            "data/set/0_x_1.wav", "data/set/0_y_1.wav"]


def test_image_rows_are_rows_and_the_vrnn_trains_on_them():
    def as_mnist(args):
        data = tiny_glyphs(args)
        args.dataset = "mnist"
        return data
    sequences = common.sequences
    with folder(), patched(common, "images", as_mnist):
        data = sequences(sequence_args("mnist", "none"))
        x, lengths, y = data.train
        assert data.kind == "rows" and x.shape == (400, 28, 28) and (lengths == 28).all() and x.dtype == torch.uint8
        assert torch.equal(x[:, None], tiny_glyphs(sequence_args(None, "none")).train[0])
        train("vrnn", "--epochs", 2, "--out-dir", "run", images=as_mnist, sequences=sequences)
        rows = list(csv.DictReader(open("run/log.csv")))
        assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"]) and Path("run/samples.png").exists()


def test_binarisation_is_dynamic_in_training_and_fixed_for_a_seed():
    x = torch.full((50, 1, 20, 20), 64, dtype=torch.uint8)
    assert torch.equal(common.binarise(x, seed=1), common.binarise(x, seed=1))
    assert not torch.equal(common.binarise(x), common.binarise(x))
    assert abs(common.binarise(x).mean() - 64 / 255) < 0.02
    edge = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 2)
    assert torch.equal(common.binarise(edge), torch.tensor([0.0, 1.0]).expand(1000, 2))


def test_augmentation_moves_but_keeps_the_picture():
    x = torch.zeros(1, 1, 28, 28)
    x[..., 8:20, 12:16] = 1
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    close(common.warp(x, identity), x, 1e-4)
    theta = common.random_affine(500, torch.Generator().manual_seed(0))
    det = theta[:, 0, 0] * theta[:, 1, 1] - theta[:, 0, 1] * theta[:, 1, 0]
    assert (det > 0.5).all() and abs(theta[:, :, 2]).max() <= 0.1 and theta.std(0).min() > 0.03
    moved = common.warp(x.expand(500, -1, -1, -1), theta).sum((1, 2, 3)) * det
    assert (abs(moved / x.sum() - 1) < 0.15).all()


def test_real_data():
    if not REAL:
        return
    args = SimpleNamespace(dataset="mnist", data_dir=REAL, device="cpu", dry_run=False, batch_size=9)
    data = common.images(args)
    assert [len(s[0]) for s in (data.train, data.valid, data.test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(data.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pen, speech = (common.sequences(sequence_args(name, REAL)) for name in ("pendigits", "speech"))
    assert [len(p[0]) for p in (pen.train, pen.valid, pen.test)] == [6745, 749, 3498]
    assert [len(p[0]) for p in (speech.train, speech.valid, speech.test)] == [2400, 300, 300]
    for data in (pen, speech):
        assert data.num_classes == 10 and (torch.bincount(data.test[2]) > 29).all()
        assert all(p[0].isfinite().all() and (p[1] > 0).all() for p in (data.train, data.valid, data.test))
    with folder(), contextlib.redirect_stdout(io.StringIO()):
        vae.main(["--dataset", "mnist", "--data-dir", REAL, "--epochs", "1", "--test-samples", "1", "--hidden", "64"])
        result = json.loads(Path("out/vae/results.json").read_text())
        assert 100 < result["test_neg_elbo"] < 200, result


def speed(steps=30):
    """`python test_all.py speed`: the README's table, of training steps at default sizes, one thread.

    Each step is followed by a product of two square matrices, whose rate is the core's.
    """
    whole, a = common.Run.__iter__, torch.rand(1024, 1024)
    real = ["--data-dir", REAL, "--dataset"] if REAL else ["--dataset"]
    calls = [(script, [*real, "mnist" if REAL else "glyphs"]) for script in SCRIPTS]
    calls += [("vrnn", [*real, name]) for name in ("pendigits", "speech") if REAL]

    def watched(run):
        """The batches of a run; the first step's operations are counted, the others timed."""
        flops = None
        for batch in itertools.islice(whole(run), steps):
            size = len(batch[0]) * (batch[0].shape[1] if len(batch) == 3 else 1)        # sequences: time steps
            counter = FlopCounterMode(display=False) if flops is None else contextlib.nullcontext()
            began = time.perf_counter()
            with counter:
                yield batch
            middle = time.perf_counter()
            a @ a
            if flops is None:
                flops = counter.get_total_flops() / size
            else:
                rate = 2 * len(a) ** 3 / (time.perf_counter() - middle)
                figures.append((flops * size / len(batch[0]) / 1e6, len(batch[0]) / (middle - began), rate / 1e9,
                                flops * size / (middle - began) / rate))
        raise InterruptedError

    print("| script | data | MFLOP an example | examples/s | GFLOP/s of a product | share |\n|---|---|---|---|---|---|")
    for script, flags in calls:
        figures = []
        with folder(), patched(common.Run, "__iter__", watched), contextlib.suppress(InterruptedError), \
                contextlib.redirect_stdout(io.StringIO()):
            __import__(script).main([*flags, "--out-dir", "x"])
        example, examples, rate, share = map(statistics.median, zip(*figures))
        print(f"| `{script}.py` | {flags[-1]} | {example:.1f} | {examples:,.0f} | {rate:.0f} | {share:.2f} |", flush=True)


def run_all():
    tests = {k: v for k, v in globals().items() if k.startswith("test_") and sys.argv[-1] in (k, sys.argv[0])}
    failed, start = 0, time.time()
    for name, test in tests.items():
        began = time.time()
        try:
            test()
            print(f"ok    {name}  {time.time() - began:.1f}s", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{time.time() - start:.0f} seconds")
    print(f"{len(tests) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    if REAL:
        REAL = str(Path(REAL).resolve())
    sys.exit(speed() if sys.argv[-1] == "speed" else 1 if run_all() else 0)
