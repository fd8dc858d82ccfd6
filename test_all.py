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
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import cdraw
import common
import cvae
import draw
import ssl_vae
import vae

HERE = Path(__file__).resolve().parent
SCRIPTS = ("vae", "cvae", "ssl_vae", "draw", "cdraw")
REAL = os.environ.get("SEQVAE_DATA")
glyphs = functools.lru_cache(common.glyph_images)   # drawn once for all tests of this process
common.glyph_images = lambda n, seed: glyphs(n, seed)
torch.set_num_threads(min(2, os.cpu_count() or 1))


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
         "cdraw": ["--z-dim", "4", "--glimpses", "3"]}


def train(script, *flags, images=tiny_glyphs):
    """Run main() in this process on a tiny set; returns what it printed."""
    out = io.StringIO()
    with patched(common, "images", images), contextlib.redirect_stdout(out):
        __import__(script).main(["--batch-size", "100", "--test-samples", "5", *SMALL[script], *map(str, flags)])
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
        log, calls = common.Run.log, []

        def interrupting(self, *args, **kwargs):
            log(self, *args, **kwargs)
            calls.append(1)
            self.stop = len(calls) == 6           # in the middle of the second epoch
        with patched(common.Run, "log", interrupting):
            try:
                train("vae", "--epochs", 2, "--out-dir", "parts")
                raise AssertionError("went on")
            except SystemExit as stop:
                assert stop.code == 130
        train("vae", "--resume", "parts/checkpoint.pt")
        a, b = (torch.load(f"{d}/checkpoint.pt", weights_only=True)["weights"] for d in ("whole", "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert Path("whole/log.csv").read_text() == Path("parts/log.csv").read_text()


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
            train(script, "--epochs", 1, images=lambda args: Guarded(**vars(tiny_glyphs(args))))
        assert events[0] == "chosen" and "test" in events, (script, events)


def test_a_second_run_leaves_the_first_alone():
    with folder():
        for _ in range(2):
            train("vae", "--epochs", 1)
        assert Path("out/vae/results.json").exists() and Path("out/vae-2/results.json").exists()


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
}
PICTURES = {"vae": ("samples.png", "reconstructions.png", "interpolation.png"), "cvae": ("samples.png",),
            "ssl_vae": ("samples.png", "analogies.png"), "draw": ("samples.png", "drawing.gif"),
            "cdraw": ("samples.png", "drawing.gif")}


def test_every_script_and_path_as_a_user_runs_it():
    scripts = {p.stem for p in HERE.glob("*.py")} - {"common", "test_all"}
    assert scripts == set(PATHS) == set(SCRIPTS), "a script without a test"
    with folder():
        for script in PATHS:
            paths = [[*flags, "--dry-run", "--dataset", "glyphs", "--out-dir", f"{script}{i}"]
                     for i, flags in enumerate(PATHS[script])]
            call = [sys.executable, HERE / f"{script}.py"]
            first = subprocess.run([*call, *paths[0]], capture_output=True, text=True, timeout=120)
            assert first.returncode == 0, first.stderr
            for path in paths[1:]:               # the rest in this process: importing torch takes seconds
                with contextlib.redirect_stdout(io.StringIO()):
                    __import__(script).main([*path, "--batch-size", "50"])
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
        Path("cut.pt").write_bytes(Path("run/best.pt").read_bytes()[:1000])
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


def test_real_mnist():
    if not REAL:
        return
    args = SimpleNamespace(dataset="mnist", data_dir=REAL, device="cpu", dry_run=False, batch_size=9)
    data = common.images(args)
    assert [len(s[0]) for s in (data.train, data.valid, data.test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(data.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    with folder(), contextlib.redirect_stdout(io.StringIO()):
        vae.main(["--dataset", "mnist", "--data-dir", REAL, "--epochs", "1", "--test-samples", "1", "--hidden", "64"])
        result = json.loads(Path("out/vae/results.json").read_text())
        assert 100 < result["test_neg_elbo"] < 200, result


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
    sys.exit(1 if run_all() else 0)
