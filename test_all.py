# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Tests without a network, about three minutes: python test_all.py [NAME ...], or pytest; "speed"
prints a table of speeds. SEQVAE_DATA=DIR: also on real data in DIR; SEQVAE_KILLS=N: more kills."""
import ast, contextlib, csv, functools, gzip, hashlib, http.server, importlib, inspect, io
import itertools, json, math, multiprocessing.pool, os, pty, random, re, resource, shlex, shutil
import signal, struct, subprocess, sys, tempfile, threading, time, unittest, unittest.mock as mock
from pathlib import Path
from types import SimpleNamespace
os.environ.setdefault("OMP_NUM_THREADS", "1")    # more threads slow tiny models down
import torch, torch.nn as nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode
import cdraw, common, cvae, draw, ssl_vae, vae, vrnn
HERE, SCRIPTS = Path(__file__).resolve().parent, ("vae", "cvae", "ssl_vae", "draw", "cdraw", "vrnn")
REAL = os.environ.get("SEQVAE_DATA") and str(Path(os.environ["SEQVAE_DATA"]).resolve())
draw_glyphs, draw_strokes, read_data = common.glyph_images, vrnn.glyph_strokes, vrnn.read_data
patched, raises = mock.patch.object, unittest.TestCase().assertRaisesRegex
glyphs = functools.cache(lambda: draw_glyphs(2400))
no_noise = lambda: mock.patch.multiple(torch, randn=torch.zeros, randn_like=torch.zeros_like)
load = functools.partial(torch.load, weights_only=True)
identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
def close(a, b, tol=1e-5):
    a, b = [torch.as_tensor(v, dtype=torch.float64) for v in (a, b)]
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)
@contextlib.contextmanager
def folder():    # an empty one, to work in
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(path)
        yield Path(path)
def recorded(m, *names):    # lists that fill with (inputs, output) of modules of m
    seen = {name: [] for name in names}
    for name in names:
        getattr(m, name).register_forward_hook(lambda _, i, o, name=name: seen[name].append((i, o)))
    return seen
def tiny_images(args):    # stands for common.images
    args.dataset, args.run.about, (x, y) = "glyphs", {"classes": [*"0123456789"]}, glyphs()
    cuts = (0, args.batch_size if args.dry_run else 200), (200, 300), (300, 400)
    parts = {name: (x[a:b], y[a:b]) for name, (a, b) in zip(("train", "valid", "test"), cuts)}
    return SimpleNamespace(shape=(1, 28, 28), num_classes=10, classes=[*"0123456789"], **parts)
@functools.cache
def tiny_strokes(root):    # stands for vrnn.glyph_strokes
    few = itertools.islice(draw_strokes(root), 170)
    return [(int(i >= 100) + int(i >= 130), x[:25], label) for i, (_, x, label) in enumerate(few)]
SMALL = {"vae": "--hidden 16 --z-dim 4", "cvae": "--hidden 16 --z-dim 4 --warm-up 3",
         "ssl_vae": "--hidden 16 --channels 2 3 4 --z-dim 4 --labels 20",
         **dict.fromkeys(("draw", "cdraw"), "--hidden 16 --z-dim 4 --glimpses 3"),
         "vrnn": "--hidden 16 --features 16 --mixtures 2 --dataset glyphs --z-temperature 2"}
def outcome(script, flags="", images=tiny_images):    # of main() on a tiny set: status, stderr
    flags = f"--batch-size 50 --test-samples 5 --device cpu {SMALL[script]} {flags}"
    common.Run.hint, err, status = "", io.StringIO(), 0
    with patched(common, "images", images), patched(vrnn, "glyph_strokes", tiny_strokes), \
            patched(sys, "argv", [f"{script}.py"]), contextlib.redirect_stderr(err), \
            contextlib.redirect_stdout(io.StringIO()):
        try:
            importlib.import_module(script).main(shlex.split(flags))
        except OSError:
            status = 2
            raises(SystemExit, "2", sys.excepthook, *sys.exc_info())
        except SystemExit as stop:
            status = stop.code
    return status, err.getvalue()
def train(script, flags="", images=tiny_images):
    status, error = outcome(script, flags, images)
    assert not status, error
binary_images = lambda n: torch.tensor([*itertools.product((0.0, 1.0), repeat=n)]).view(-1, 1, 1, n)
def draws(shape=(1, 4, 4), attentions=(True, False), **sizes):    # each path: name, model, inputs
    torch.manual_seed(0)
    x, y = torch.rand(6, *shape).round(), torch.arange(6) % 3
    sizes = {"glimpses": 2, "read_size": 2, "write_size": 3, "z_dim": 3, "hidden": 5, **sizes}
    for attention, prior in itertools.product(attentions, ("standard", "learned")):
        sizes.update(attention=attention, prior=prior)
        for m, inputs in ((draw.DRAW(shape, **sizes), (x,)),
                          (cdraw.CDRAW(shape, num_classes=3, **sizes), (x, y))):
            for p in (m.start, m.prior.weight, m.prior.bias)[:3 if prior == "learned" else 1]:
                nn.init.normal_(p, std=0.3)
            yield f"{type(m).__name__} {attention} {prior}", m, inputs
def vrnns(stops=(False, True)):    # each path: name, model, inputs x (T, B, D), lengths, labels
    lengths, y = torch.tensor([5, 3, 1, 4]), torch.tensor([0, 2, 1, 2])
    for likelihood, prior, z_dim, stop in itertools.product(
            ("bernoulli", "gaussian", "pen"), ("learned", "standard"), (2, 0), stops):
        torch.manual_seed(0)
        d = 3 if likelihood == "pen" else 4
        m = vrnn.VRNN(d, z_dim, likelihood, prior, 3, stop, mixtures=2, hidden=7, features=6)
        nn.init.normal_(m.h_0)
        x, binary = torch.randn(5, 4, d), {"bernoulli": 0, "pen": 2, "gaussian": d}[likelihood]
        x[..., binary:] = (x[..., binary:] > 0).float()
        yield f"VRNN {likelihood} {prior} {z_dim} {stop}", m, (x, lengths, y)
def models(ssl=False):    # each code path of each class: name, model, inputs
    torch.manual_seed(0)
    x, y = torch.rand(6, 1, 4, 4).round(), torch.arange(6) % 3
    for likelihood, channels in itertools.product(("bernoulli", "gaussian"), (None, (2, 3))):
        yield f"VAE {channels}", vae.VAE((1, 4, 4), (7, 5), 3, likelihood, channels), (x,)
    yield "VAE mixture", vae.VAE((1, 4, 4), (7, 5), 3, components=30), (x,)
    given = ("label", y), ("quadrants", cvae.hide(x, 1))
    for z_dim, (on, y), channels in itertools.product((3, 0), given, (None, (2, 3))):
        yield f"CVAE {on} {z_dim}", cvae.CVAE((1, 4, 4), on, z_dim, 3, (7, 5), channels), (x, y)
    yield from draws()
    yield from vrnns()
    for m in ssl_models() if ssl else ():
        yield "SSLVAE", Bounds(m), (x, torch.arange(6) % 3)
def ssl_models(shape=(1, 4, 4)):
    for auxiliary in (False, True):
        torch.manual_seed(2)
        yield ssl_vae.SSLVAE(shape, 3, 3, auxiliary, (7, 5), (2, 3, 4), a_dim=2).eval()
class Bounds(nn.Module):    # an SSLVAE whose classifier and bounds are the terms
    def __init__(self, m):
        super().__init__()
        self.m, self.sample = m, m.sample
    def forward(self, x, y):
        return self.m.classify(x)[:, 0], self.m.labelled_bound(x, y), self.m.unlabelled_bound(x)
sample = lambda m, x: m.sample(4, y=x[2])[0] if len(x) > 2 else m.sample(*x[1:] or [6])
def test_kl_equals_torch_distributions_and_monte_carlo():
    torch.manual_seed(0)
    mu_q, logvar_q, mu_p, logvar_p = torch.randn(4, 5, 7, 3, dtype=torch.float64)
    q, p = Normal(mu_q, (0.5 * logvar_q).exp()), Normal(mu_p, (0.5 * logvar_p).exp())
    kl = common.gaussian_kl(mu_q, logvar_q, mu_p, logvar_p)
    close(kl, kl_divergence(q, p), 1e-12)
    z = q.sample((20_000,))
    terms = q.log_prob(z) - p.log_prob(z)
    assert ((terms.mean(0) - kl).abs() < 6 * terms.std(0) / len(z)**0.5 + 1e-9).all()
    x, y, m = torch.rand(6, 1, 4, 4).round(), torch.arange(6), vae.VAE((1, 4, 4), 7, z_dim=3)
    close(m(x)[1], common.gaussian_kl(*m.encode(x), torch.zeros(3), torch.zeros(3)).sum(1))
    m = cvae.CVAE((1, 4, 4), z_dim=3, hidden=7)
    h_y = m.features(y)
    close(m(x, y)[1], common.gaussian_kl(*m.posterior(x, h_y), *m.prior(h_y)).sum(1))
def test_mixture_prior_draws_what_its_density_says():
    m = vae.VAE((1, 1, 4), (), 4, "gaussian", components=3)
    m.log_std.data, m.logits.data, m.dec = 0.5 * torch.randn(4), torch.randn(3), nn.Identity()
    d, s, z = torch.distributions, m.log_std.exp(), m.sample(100_000).flatten(1)
    p = d.MixtureSameFamily(d.Categorical(None, m.logits), d.Independent(Normal(m.means * s, s), 1))
    close(m.log_prior(z[None])[0] - 2 * math.log(2 * math.pi), p.log_prob(z), 1e-4)
    close(torch.stack([z.mean(0), z.var(0)]), torch.stack([p.mean, p.variance]), 5e-2)
def test_log_w_averages_to_the_bound_and_terms_have_their_shapes():
    for name, m, inputs in models():
        n, k = len(inputs[-1]), 4000
        with torch.no_grad():
            assert all(term.shape == (n,) for term in m(*inputs)), name
            log_px, kl, log_w = m(*inputs, k=k)
        low = kl.mean(0) if "mixture" in name else kl    # whose KL is estimated at the sample
        assert log_px.shape == kl.shape == log_w.shape == (k, n) and (low > -1e-4).all(), name
        difference = log_px - kl - log_w
        assert (difference.mean(0).abs() < 6 * difference.std(0) / k**0.5 + 1e-4).all(), name
        if getattr(m, "z_dim", 1) == 0:
            assert kl.abs().max() == 0 and log_w.std(0).max() < 1e-4, name
def test_linear_gaussian_bound_is_exact():
    m = vae.VAE((1, 1, 5), hidden=(), z_dim=2, likelihood="gaussian", sigma=0.5).double()
    w, b, x = [torch.randn(*size).double() for size in ((5, 2), (5,), (4, 1, 1, 5))]
    w = torch.linalg.qr(w)[0] * torch.tensor([1.5, 0.7])    # orthogonal: a diagonal posterior
    var = 1 / (1 + (w**2).sum(0) / 0.25)
    m.dec[0].weight.data, m.dec[0].bias.data = w, b
    m.enc[0].weight.data = torch.cat([var[:, None] * w.T / 0.25, torch.zeros(2, 5)])
    m.enc[0].bias.data = torch.cat([-var * (w.T @ b) / 0.25, var.log()])
    close(m(x)[2], MultivariateNormal(b, w @ w.T + torch.eye(5) / 4).log_prob(x.flatten(1)), 1e-9)
total_probability = lambda m, *x, k=10_000: common.log_mean_exp(m(*x, k=k)[2].data).exp().sum()
def test_probabilities_of_images_sum_to_one():
    torch.manual_seed(1)
    x, label = binary_images(4), torch.full((16,), 2)
    given = torch.tensor([1.0, 0.0, -1.0, -1.0]).expand(4, 1, 1, 4)    # p(x_2, x_3 | x_0, x_1)
    tests = [(vae.VAE((1, 1, 4), 8, z_dim=2), x),
             (cvae.CVAE((1, 1, 4), "label", 2, hidden=8), x, label),
             (cvae.CVAE((1, 1, 4), "quadrants", 2, hidden=8), x[:4].where(given < 0, given), given)]
    for m, *_ in tests:
        m.enc[-1].weight.data *= 0.3    # a q that importance sampling can work with
    for _, m, inputs in draws((1, 1, 4), read_size=1, write_size=1, z_dim=2, hidden=4):
        m.posterior.weight.data *= 0.5
        tests.append((m, *(x, label)[:len(inputs)]))
    for test in tests:
        close(total_probability(*test), 1, 3e-2)
    for m in ssl_models((1, 1, 4)):
        for layer in [m.enc[-1], *([m.q_a[-1][-1], m.p_a[-1]] if m.auxiliary else [])]:
            layer.weight.data *= 0.3
        close(common.log_mean_exp(m.log_weights(x, 10_000)).exp().sum(), 1, 3e-2)
def test_probabilities_of_sequences_sum_to_one():
    torch.manual_seed(0)
    at = torch.linspace(-16, 16, 641)
    for mixtures, (likelihood, d) in itertools.product((1, 3), (("pen", 3), ("gaussian", 2))):
        m = vrnn.VRNN(d, 2, likelihood, mixtures=mixtures, hidden=4, features=4)
        x = nn.functional.pad(torch.cartesian_prod(at, at), (0, d - 2))
        out = torch.randn(m.dec[-1].out_features)
        p = [m.log_density(x + up * torch.eye(d)[-1], out).exp().sum() for up in range(d - 1)]
        close(sum(p) * 0.05**2, 1, 1e-3)
    x = binary_images(4).view(16, 2, 2).transpose(0, 1)    # every sequence of two steps of two
    for z_dim, prior in ((2, "learned"), (2, "standard"), (0, "learned")):
        m = vrnn.VRNN(2, z_dim, "bernoulli", prior, hidden=4, features=4)
        close(total_probability(m, x, torch.full((16,), 2)), 1, 3e-2)
    m, total = vrnn.VRNN(1, 0, "bernoulli", stop=True, hidden=4, features=4), 0
    m.end.bias.data.fill_(2.0)    # all sequences but 1 in 30,000 end within five steps
    for steps in range(1, 6):
        x = binary_images(steps).view(-1, steps, 1).transpose(0, 1)
        total += total_probability(m, x, torch.full((x.shape[1],), steps), k=1)
    close(total, 1, 1e-3)
def test_importance_weighted_bound_and_evaluate():
    torch.manual_seed(0)
    m, x = vae.VAE((1, 2, 3), 8, z_dim=2), torch.rand(50, 1, 2, 3).round()
    m.dec[-1].weight.data *= 6
    log_px, kl, log_w = m(x, 6000)
    bounds = [common.log_mean_exp(log_w.view(k, -1, 50)).mean() for k in (1, 5, 50, 6000)]
    assert abs(bounds[0] - (log_px - kl).mean()) < 0.02 and bounds[3] - bounds[0] > 0.05, bounds
    assert all(b > a for a, b in zip(bounds, bounds[1:])), bounds
    counting = mock.Mock(side_effect=m)
    few, many, same = [common.evaluate(counting, x, samples=2000, rows=n) for n in (64, 4096, 4096)]
    assert abs(few["nll"] - many["nll"]) < 0.01 and abs(few["neg_elbo"] - many["neg_elbo"]) < 0.1
    assert many == same, "its noise is not always the same"
    seen = [call.kwargs["k"] * len(call.args[0]) for call in counting.call_args_list]
    assert sum(seen) == 3 * 2000 * 50 and max(seen) <= 4096
def test_every_model_in_float64_and_bfloat16_and_at_extremes():
    for name, m, inputs in models(ssl=True):
        with no_noise():
            single = m(*inputs)
            twice = m(*[torch.cat([t, t], 1 if t.dim() == 3 else 0) for t in inputs])
            thrice = twice if isinstance(m, Bounds) else m(*inputs, k=3)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mixed = m(*inputs)
                sum(t.sum() for t in mixed).backward()
                assert math.isfinite(sample(m, inputs).numpy().sum()), name    # no bfloat16
            m.double()
            exact = [t.double() if t.is_floating_point() else t for t in inputs]
            for a, two, k, b, c in zip(single, twice, thrice, mixed, m(*exact)):
                close(two, a.repeat(2), 1e-4)
                close(k.view(-1, len(a)), a.expand(k.numel() // len(a), -1), 1e-4)
                assert (a - b).abs().max() < 0.5 + 0.05 * a.abs().max() and b.dtype == a.dtype, name
                close(a, c, 1e-3)
                assert c.dtype == sample(m, exact).dtype == torch.float64, name
        named = m.float().named_parameters()
        last = [p for n, p in named if re.search(r"^canvas|\bdec\..*bias", n)]
        for logit, factor in ((1e4, 0), (-1e4, 0), (0, 1e3)):    # of data: silence, and far away
            last[-1].data.fill_(logit)
            if getattr(m, "likelihood", "") in ("gaussian", "pen"):
                inputs[0][..., :2] *= factor
            m.zero_grad()
            terms = m(*inputs)
            sum(t.sum() for t in terms).backward()
            grads = [p.grad for p in m.parameters() if p.grad is not None]
            assert all(t.isfinite().all() for t in (*terms, *grads, sample(m, inputs))), name
def test_filterbank_has_the_centre_stride_and_variance_asked_for():
    height, width, n = 40, 60, 5
    params = torch.tensor([[0.1, -0.2, 1.4, -2.0, 0.3], [0.0, 0.0, 0.7, -2.5, -0.1]])
    F_y, F_x, gamma = draw.filterbank(params, n, height, width)
    close(gamma, params[:, 4:].exp())
    i, delta = torch.arange(n) - (n - 1) / 2, (width - 1) / (n - 1) * params[:, 3:4].exp()
    for filters, size, g in ((F_x, width, params[:, :1]), (F_y, height, params[:, 1:2])):
        at = torch.arange(1.0, size + 1)    # the paper counts pixels from 1
        mean = (filters * at).sum(2)
        close(filters.sum(2), torch.ones(2, n))
        close(mean, (size + 1) / 2 * (g + 1) + i * delta, 1e-3)
        close((filters * (at - mean[:, :, None])**2).sum(2), params.exp()[:, [2] * n], 1e-2)
    for extreme, n in itertools.product((1e4, -1e4), (1, 3)):    # off the image, or of no size
        wild = torch.full((2, 5), extreme, requires_grad=True)
        filters = draw.filterbank(wild, n, height, width)
        sum((f**2).sum() for f in filters).backward()
        assert all(f.isfinite().all() for f in (*filters, wild.grad))
def test_draw_reads_and_writes_where_the_windows_are():
    for channels in (1, 3):
        m = draw.DRAW((channels, 6, 6), read_size=6, write_size=6, z_dim=2, hidden=4)
        x, x_hat = torch.rand(2, 1, channels, 6, 6)
        m.read_window.bias.data = torch.tensor([0.0, 0.0, -6.0, 0.0, 0.5])
        m.write_window.bias.data, m.patch.bias.data = m.read_window.bias.data, x.flatten()
        seen = m.read(x, x_hat, torch.zeros(1, 4))
        close(seen.data, math.exp(0.5) * torch.cat([x, x_hat], 1).flatten(1), 1e-3)
        close(m.write(torch.zeros(1, 4)).data, x * math.exp(-0.5), 1e-3)
def test_draw_of_one_glimpse_without_attention_is_a_vae():
    for name, m, (x, *given) in draws((1, 4, 5), (False,), glimpses=1):
        seen = recorded(m, "posterior", "prior", "decoder", "patch")
        log_px, kl, log_w = m(x, *given)
        (mu, logvar), (mu_p, logvar_p) = [seen[n][0][1].chunk(2, 1) for n in ("posterior", "prior")]
        q, p = Normal(mu, (0.5 * logvar).exp()), Normal(mu_p, (0.5 * logvar_p).exp())
        p, z = p if "learned" in name else Normal(0.0, 1.0), seen["decoder"][0][0][0][:, :3]
        logits = m.canvas + seen["patch"][0][1].view(x.shape)
        close(log_px, Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3)), 1e-4)
        close(kl, kl_divergence(q, p).sum(1), 1e-4)
        close(log_w, log_px + (p.log_prob(z) - q.log_prob(z)).sum(1), 1e-4)
def test_draw_samples_by_the_prior_that_the_bound_uses():
    normal = torch.randn_like
    for name, m, inputs in draws(glimpses=3):
        seen = recorded(m, "prior", "decoder")
        with patched(torch, "randn_like", side_effect=normal) as drawing:
            log_px, _, _ = m(*inputs)
            zs, priors = [i[0][:, :3] for i, _ in seen["decoder"]], [p for _, p in seen["prior"]]
            sample(m, inputs)
        assert drawing.call_count == 6, f"{name}: steps share their noise"
        assert m.sample(*inputs[1:] or [6], 0)[0].std(0).max() > 1e-3, "z_1 has no noise"
        close(seen["decoder"][-1][0][0][:, :3], seen["prior"][-1][1][:, :3])    # but later ones
        close(priors[0], priors[0][:1].expand(6, -1))    # p(z_1) is the same for every x
        assert ((priors[2] - priors[2][0]).abs().max() > 1e-3) == ("learned" in name), name
        seen["prior"].clear()
        def noise(mu):    # such that sample() draws forward's z
            mu_p, logvar_p = seen["prior"][-1][1].chunk(2, 1)
            return (zs[len(seen["prior"]) - 1] - mu_p) / (0.5 * logvar_p).exp()
        with patched(torch, "randn_like", noise):
            canvases = sample(m, inputs)
        close(Bernoulli(canvases[-1]).log_prob(inputs[0]).sum((1, 2, 3)), log_px, 1e-3)
def test_draw_and_cdraw_share_their_attention_to_the_letter():
    ours, theirs = [[inspect.getsource(f) for f in (m.filterbank, m.tiled_window, c.read, c.write)]
                    for m, c in ((draw, draw.DRAW), (cdraw, cdraw.CDRAW))]
    assert ours == theirs
def test_vrnn_priors_see_the_past_alone_and_the_last_step_reaches_the_first():
    for name, m, (x, _, y) in vrnns(stops=(False,)):
        learned = m.prior_net is not None
        seen = recorded(m, "dec", *(["prior_net"] if learned else []))
        changed = torch.where(torch.arange(5)[:, None, None] == 2, 1 - x, x)
        x.requires_grad_()
        with no_noise():
            for version in (x, changed):
                m(version, torch.full((4,), 5), y)
        before, after = [output for _, output in seen["prior_net" if learned else "dec"]]
        close(before[:3 if learned else 2], after[:3 if learned else 2], 1e-6)
        assert (before[3] - after[3]).abs().max() > 1e-4, name
        seen["dec"][0][1][-1].sum().backward()
        assert (x.grad[0].abs().sum(1) > 0).all(), name
def test_padding_is_ignored():
    def results(m, *inputs):
        terms = m(*inputs)
        return terms, torch.autograd.grad(sum(t.sum() for t in terms), [*m.parameters()],
                                          allow_unused=True, materialize_grads=True)
    for name, m, (x, lengths, y) in vrnns():
        padded = torch.where(torch.arange(5)[:, None, None] < lengths[:, None], x, math.nan)
        with no_noise():
            terms, grads = results(m, x, lengths, y)
            identical(results(m, padded, lengths, y), (terms, grads))
            alone = [results(m, x[:n, [b]], lengths[[b]], y[[b]]) for b, n in enumerate(lengths)]
        for term, *parts in zip(terms, *[one for one, _ in alone]):
            close(torch.cat(parts), term, 1e-4)
        for whole, *parts in zip(grads, *[one for _, one in alone]):
            close(whole, sum(parts), 1e-3)
def test_vrnn_draws_what_its_density_says_and_ends_by_itself():
    torch.manual_seed(0)
    m = vrnn.VRNN(3, 2, "pen", hidden=4, features=4)
    out, r = torch.tensor([0.0, 1.0, -2.0, math.log(4.0), 0.0, 0.8, 1.0]), 0.99 * math.tanh(0.8)
    m_3 = vrnn.VRNN(1, 2, "gaussian", mixtures=3, hidden=4, features=4)
    shares = torch.tensor([0.5, 0.3, 0.2])
    out_3 = torch.cat([shares.log(), torch.tensor([-9.0, 0.0, 9.0]), torch.zeros(3)])
    for temperature in (1.0, 0.5):
        x = m.draw(out.expand(50_000, -1), temperature)
        close(x.mean(0), [1.0, -2.0, 1 / (1 + math.exp(-1 / temperature))], 3e-2)
        close(torch.cov(x[:, :2].T) / temperature**2, [[4.0, 2 * r], [2 * r, 1.0]], 5e-2)
        x, expected = m_3.draw(out_3.expand(50_000, -1), temperature), shares**(1 / temperature)
        close(torch.histc(x, 3, -13.5, 13.5) / len(x), expected / expected.sum(), 1e-2)
    for name, m, _ in vrnns():
        if m.end is not None:
            m.end.bias.data.fill_(-0.7)
        seen = recorded(m, "phi_z")["phi_z"]
        x, lengths = m.sample(6, y=torch.arange(300) % 3, z_temperature=0.0)
        assert m.prior_net or not seen[0][0][0].any(), "z is not the prior's mean"
        assert (x[torch.arange(6)[:, None] >= lengths] == 0).all() and x.isfinite().all(), name
        assert len(lengths.unique()) == (1 if m.end is None else 6) and lengths.max() == 6, name
def test_m2_sum_over_y_is_the_brute_force():
    x = torch.rand(6, 1, 4, 4).round()
    with no_noise(), torch.no_grad():
        for m in ssl_models():
            log_q = m.classify(x).log_softmax(1)
            bounds = torch.stack([m.labelled_bound(x, torch.full((6,), c)) for c in range(3)], 1)
            close(m.unlabelled_bound(x), (log_q.exp() * (bounds - log_q)).sum(1), 1e-4)
            m.head.bias[1] += 1e4    # q(y|x) is one-hot: U becomes L
            close(m.unlabelled_bound(x), bounds[:, 1], 1e-4)
def test_m2_bounds_are_bounds():
    x = binary_images(4).repeat(400, 1, 1, 1)
    for m in ssl_models((1, 1, 4)):
        for layer in [m.enc[-1], m.dec[-1], *([m.q_a[-1][-1], m.p_a[-1]] if m.auxiliary else [])]:
            layer.weight.data *= 0.1    # q close to the posterior, so that a term too many shows
        bounds = [m.labelled_bound(x, torch.full((len(x),), c)) for c in range(3)]
        bounds = [b.data.view(400, 16) for b in (*bounds, m.unlabelled_bound(x))]
        *each, u = [b.mean(0).exp().sum() for b in bounds]
        assert 0.2 < u < 1.01 and 0.2 < sum(each) < 1.01, (u, each)
def test_labels_are_n_balanced_and_the_only_ones_that_are_used():
    x, y = [t[:200] for t in glyphs()]
    chosen, again, other = [ssl_vae.choose_labels(y, 20, seed) for seed in (4, 4, 5)]
    assert len(chosen.unique()) == 20 and (torch.bincount(y[chosen]) == 2).all()
    assert torch.equal(chosen, again) and not torch.equal(chosen, other)
    hidden = torch.ones(200, dtype=torch.bool).index_fill(0, chosen, False)
    wrong = y.masked_scatter(hidden, y[hidden].flip(0))
    with folder(), patched(ssl_vae, "choose_labels", lambda *_: chosen):
        for name, labels in (("a", y), ("b", wrong)):
            given = lambda args: SimpleNamespace(**vars(tiny_images(args)) | {"train": (x, labels)})
            train("ssl_vae", f"--epochs 1 --out-dir {name}", given)
        assert_equal_runs("a", "b")
        labels = labels.clamp(max=8)
        assert "class 9 has no" in outcome("ssl_vae", "", given)[1]
def test_the_condition_is_used():
    x, y = common.binarise(glyphs()[0], seed=0), glyphs()[1]
    for m in cvae.CVAE(hidden=64, z_dim=6), cdraw.CDRAW(glimpses=3, hidden=32, z_dim=6):
        optimizer = torch.optim.Adam(m.parameters(), 3e-3)
        for a, b in 6 * [*zip(x[:2000].split(100), y[:2000].split(100))]:
            log_px, kl, _ = m(a, b)
            optimizer.zero_grad()
            (kl - log_px).mean().backward()
            optimizer.step()
        right, wrong = [common.evaluate(m, x[2000:], y[2000:].roll(n))["neg_elbo"] for n in (0, 7)]
        assert wrong > right + 1, (type(m), right, wrong)
def test_hidden_pixels_stay_hidden_and_observed_ones_come_back():
    a = torch.rand(6, 1, 5, 7).round()
    for quadrants, channels in itertools.product((1, 2, 3), (None, (2, 3))):
        y, m = cvae.hide(a, quadrants), cvae.CVAE((1, 5, 7), "quadrants", 3, 10, 8, channels)
        b = torch.where(y < 0, 1 - a, a)    # differs in every hidden pixel
        assert torch.equal(y, cvae.hide(b, quadrants))
        assert torch.equal(m.sample(y)[y >= 0], a[y >= 0])
        with no_noise():    # log p counts hidden pixels only
            logits = m.decode(m.posterior(a, m.features(y))[0], m.features(y))
            each = Bernoulli(logits=logits).log_prob(a.flatten(1)) * (y.flatten(1) < 0)
            close(m(a, y)[0], each.sum(1), 1e-4)
def test_augmentation_keeps_the_picture():
    x = nn.functional.pad(torch.ones(500, 1, 12, 4), (12, 12, 8, 8))
    theta = ssl_vae.random_affine(len(x))
    mass = ssl_vae.warp(x, theta).sum((1, 2, 3)) * theta[:, :, :2].det()
    assert ((mass / 48 - 1).abs() < 0.15).all()
    assert theta.std(0).min() > 0.03 and theta[:, :, 2].abs().max() <= 0.1
def assert_equal_runs(a, b):    # checkpoints, logs but for times, and test figures, to the bit
    runs = []
    for name in (a, b):
        state, results = load(f"{name}/checkpoint.pt"), json.load(open(f"{name}/results.json"))
        rows = csv.DictReader(Path(name, "log.csv").read_text().splitlines())
        log = [[float(v) for k, v in r.items() if "second" not in k and k != "best"] for r in rows]
        runs.append([[state[k] for k in ("model", "weights", "average", "optimizer")], log,
                     {k: v for k, v in results.items() if k[:5] == "test_"}])
    identical(*runs, equal_nan=True)
def test_resume_at_an_epochs_end_is_exact():
    for script in SCRIPTS:
        with folder():
            train(script, "--epochs 4 --out-dir whole")
            train(script, "--epochs 2 --out-dir parts")
            train(script, "--epochs 4 --resume parts")
            assert_equal_runs("whole", "parts")
            for r in load("parts/checkpoint.pt")["rows"] if script == "cvae" else []:    # warm-up
                close(r["train_loss"], r["train_rec"] + min(1, r["epoch"] / 3) * r["train_kl"])
            train(script, "--epochs 0 --resume parts --out-dir only")    # evaluates best.pt
            a, b = [json.load(open(f"{name}/results.json")) for name in ("parts", "only")]
            assert a["test_neg_elbo"] == b["test_neg_elbo"], script
def test_resume_overwrites_no_results_and_mixes_no_data():
    with folder():
        train("vae", "--epochs 1 --out-dir a")
        results = Path("a/results.json").read_bytes()
        train("vae", "--epochs 0 --resume a/checkpoint.pt --test-samples 2")
        assert Path("a/results.json").read_bytes() == results and Path("out/vae-1").exists()
        with patched(common, "evaluate", lambda *_, **__: {"neg_elbo": 1e9}):
            train("vae", "--epochs 2 --resume a --out-dir b")    # no epoch of b is the best
        identical(load("b/best.pt")["model"], load("a/best.pt")["model"])
        fewer, notes = lambda a: [tiny_images(a), a.run.about.update(classes=[])][0], []
        with patched(common.Run, "finish", lambda run, _: notes.append(run.args.run.note)):
            train("vae", "--epochs 3 --resume b")
            train("vae", "--epochs 3 --resume b", fewer)
        assert not notes[0] and "classes changed" in notes[1], notes
        other = lambda _: tiny_images(data_args("x"))    # leaves --dataset as it is
        assert "trained on glyphs" in outcome("vae", "--resume b --dataset mnist", other)[1]
def start(script, flags):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, "torchvision.utils", "matplotlib.figure"])
    process = context.Process(target=train, args=(script, flags))
    process.start()
    return process
def test_kill_at_any_moment_loses_nothing():
    kills = int(os.environ.get("SEQVAE_KILLS", 0))
    for script in SCRIPTS if kills else random.sample(SCRIPTS, 1):
        with folder():
            began, killed, status = time.time(), 0, 0
            start(script, "--epochs 4 --out-dir whole").join()
            seconds = time.time() - began
            while killed < max(kills, 1) or status != 0:
                flags = "--resume parts"
                if status == 0 or not Path("parts/checkpoint.pt").exists():
                    shutil.rmtree("parts", ignore_errors=True)
                    flags = "--epochs 4 --out-dir parts"
                run = start(script, flags)
                run.join(seconds * random.random() if killed < max(kills, 1) else None)
                run.kill()
                run.join()
                status, killed = run.exitcode, killed + (run.exitcode == -signal.SIGKILL)
                assert status in (0, -signal.SIGKILL), script
                assert all(map(load, Path("parts").glob("*.pt"))), "a checkpoint is broken"
            assert_equal_runs("whole", "parts")
def test_a_full_disk_or_a_loss_that_is_not_finite_loses_nothing():
    with folder():
        train("vae", "--epochs 1 --out-dir old")
        before = {p: p.read_bytes() for p in Path("old").glob("*.pt")}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))    # bytes in a file
        full = outcome("vae", "--resume old --epochs 2")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        wild = outcome("vae", "--resume old --epochs 3 --lr 1e18")
        for (status, error), text in ((full, "File too large"), (wild, "not finite")):
            assert status == 2 and error.count("\n") == 1 and text in error, error
        assert len(before) == 2 and all(p.read_bytes() == text for p, text in before.items())
        assert "--resume old" in wild[1], f"the last good checkpoint is not named: {wild[1]}"
def test_ctrl_c_says_how_to_resume_and_a_terminal_sees_a_live_line():
    signal.signal(signal.SIGINT, signal.default_int_handler)    # below nohup it would be ignored
    flags = "--dataset glyphs --hidden 8 --z-dim 2 --batch-size 2000 --epochs 999 --device cpu"
    def interrupted(name, signals):
        terminal, end = pty.openpty()
        run, said, began = run_script("vae", f"{flags} --out-dir {name}", stdout=end), "", 0
        os.close(end)
        with contextlib.suppress(OSError):    # which the terminal raises when its process has ended
            while True:
                said += os.read(terminal, 65536).decode()
                for _ in range(0 if began or "epoch 2, step" not in said else signals):
                    began = time.time()
                    run.send_signal(signal.SIGINT)
                    time.sleep(0.02)
        return run.wait(), said, time.time() - began
    with folder(), multiprocessing.pool.ThreadPool(2) as pool:
        (once, said, _), (twice, _, seconds) = pool.starmap(interrupted, (("a", 1), ("b", 2)))
    assert once == 130 and "Traceback" not in said and "--resume a" in said.splitlines()[-1], said
    assert re.search(r"epoch 1, step 1 of 10, loss \d+.*, \d+ s left \r", said), said
    assert twice in (130, -signal.SIGINT) and seconds < 20, (twice, seconds)
def test_runs_have_folders_of_their_own_and_nan_is_not_the_best():
    values = iter([3.0, math.nan, 2.0, 4.0])
    with folder():
        Path("out/vae-2").mkdir(parents=True)    # of a run that has just begun
        for flags in ("", "", "--seed 1"):
            train("vae", f"--epochs 1 {flags}")
        assert not any(Path("out/vae-2").iterdir())
        assert_equal_runs("out/vae-1", "out/vae-3")
        one, other = [load(f"out/vae-{i}/checkpoint.pt")["weights"]["enc.0.bias"] for i in (1, 4)]
        assert not torch.equal(one, other)
        with patched(common, "binarise", side_effect=common.binarise) as binarise, \
                patched(common, "evaluate", lambda *_, **__: {"neg_elbo": next(values, 5.0)}):
            [train(s, f"--epochs 4 --out-dir {s} --binarise fixed") for s in ("vae", "draw")]
        assert len(load("vae/best.pt")["rows"]) == 3
        new = [x for (x, *seed), kw in binarise.call_args_list if [kw, *seed] in ([{}], [{}, None])]
        assert [x.unique().tolist() for x in new] == 32 * [[0, 255]], "fixed pixels are not fixed"
def test_the_test_split_is_touched_after_the_best_model_is_chosen():
    class Guarded(SimpleNamespace):
        def __getattribute__(self, name):
            events.append(name)
            return super().__getattribute__(name)
    best_model = common.Run.best_model
    for script in SCRIPTS:
        events = []
        with folder(), patched(common.Run, "best_model",
                               lambda run: events.append("chosen") or best_model(run)), \
                patched(vrnn, "read_data", lambda args: Guarded(**vars(read_data(args)))):
            train(script, "--epochs 1", lambda args: Guarded(**vars(tiny_images(args))))
        assert "test" not in events[:events.index("chosen")] and "test" in events, script
def one_of_two():    # what each process of the next test does
    share, seen = common.share_gradients, []
    def share_gradients(model, args):
        for step in (lambda *_: None, share):
            step(model, args)
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    with patched(common, "share_gradients", share_gradients):
        train("vae", "--epochs 2 --channels 2 3 --out-dir run")
    torch.save(seen, f"rank{os.environ['RANK']}.pt")
def test_two_processes_share_gradients_and_nothing_else():
    with folder():
        Path("two.py").write_text("import test_all\ntest_all.one_of_two()\n")
        command = "-m torch.distributed.run --standalone --nproc-per-node=2 two.py".split()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(HERE)})
        assert done.returncode == 0 and Path("run/results.json").exists(), done.stderr
        a, b = load("rank0.pt"), load("rank1.pt")    # own gradient, mean, weights; of each step
    identical((a[1::3], a[2::3]), (b[1::3], b[2::3]))
    for g, h, mean in zip(a[::3], b[::3], a[1::3]):
        close(mean, (g + h) / 2)
    parts, noise = [], [a[0], b[0]]
    for rank in (0, 1):
        args = SimpleNamespace(seed=0, batch_size=50, run=SimpleNamespace(rank=rank, world=2))
        parts += common.epoch_order(args, 3, 200).flatten().tolist()
        noise.append(torch.rand(9))
    assert sorted(parts) == list(range(200)), "a batch is not divided between the processes"
    assert not torch.equal(*noise[:2]) and not torch.equal(*noise[2:]), "both draw the same noise"
PATHS = {"vae": ["", "--likelihood gaussian --z-dim 2", "--channels 2 3 --iw 3 --components 3"],
         "cvae": ["", "--condition quadrants --quadrants 2 --channels 2 3",
                  "--condition quadrants --z-dim 0"],
         "ssl_vae": ["", "--auxiliary --no-augment", "--supervised-only"],
         **dict.fromkeys(("draw", "cdraw"), ["", "--no-attention --prior standard",
                                             "--read-size 1 --write-size 28 --temperature 0"]),
         "vrnn": ["", "--conditional --digits 27", "--prior standard --temperature 2", "--z-dim 0"]}
def run_script(script, flags, **options):
    return subprocess.Popen([sys.executable, HERE / f"{script}.py", *flags.split()], **options)
def test_every_script_and_path_as_a_user_runs_it():
    scripts = {p.stem for p in HERE.glob("*.py")} - {"common", "test_all"}
    assert scripts == set(PATHS) == set(SCRIPTS), "a script without a test"
    needed = "script dataset args params epochs seconds examples_per_second torch test_neg_elbo " \
             "test_nll test_samples"
    left = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}    # changes nothing
    def first(script):
        run = run_script(script, f"--dry-run --dataset glyphs --out-dir {script}0", env=left,
                         text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        return run.communicate()[1], run.returncode
    with folder(), multiprocessing.pool.ThreadPool(2) as pool:
        for (script, paths), (error, status) in zip(PATHS.items(), pool.imap(first, PATHS)):
            assert status == 0, error
            for i, path in enumerate(paths):
                out = f"{script}{i}"
                if i:    # in this process: importing torch is slow
                    train(script, f"{path} --dry-run --out-dir {script}{i}")
                if "quadrants" not in path:
                    with patched(vrnn, "read_data", None):    # samples need no data
                        train(script, f"--resume {out} --sample 12 --out-dir s/{out}", None)
                    assert Path(f"s/{out}/samples.png").stat().st_size > 0, out
                own = {"vae": ["interpolation.png", "places.png"][i % 2], "draw": "drawing.gif",
                       "cdraw": "drawing.gif", "ssl_vae": "analogies.png"}.get(script, "log.csv")
                for name in (*"checkpoint.pt best.pt log.csv curve.png samples.png".split(), own):
                    assert Path(f"{script}{i}", name).stat().st_size > 0, (script, name)
                result = json.load(open(f"{script}{i}/results.json"))
                assert not set(needed.split()) - set(result) and result["epochs"] == 1, script
                assert script != "ssl_vae" or 0 <= result["test_error"] + result["val_error"] <= 200
def test_help_and_misspelt_flags_answer_at_once():
    for script in SCRIPTS:
        actions = importlib.import_module(script).flags()._actions
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for flag in ("--epoch=3", "--help"):    # before torch is imported, which takes seconds
            done = subprocess.run([sys.executable, "-X", "importtime", HERE / f"{script}.py", flag],
                                  capture_output=True, text=True)
            assert "argparse\n" in done.stderr and not re.search(r" torch\n", done.stderr), script
            assert flag == "--help" or done.returncode == 2 and "error: unrecog" in done.stderr
        assert len(actions) <= 23 and all(a.option_strings[-1] in done.stdout for a in actions)
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime < 3, script
def test_without_network_and_data_it_says_not_mnist():
    with folder() as here:
        env = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")}
        run = run_script("vrnn", f"--dry-run --data-dir {here}/d", stdout=subprocess.PIPE, env=env)
        lines = run.communicate()[0].decode().strip().splitlines()
        assert run.returncode == 0 and "NOT MNIST" in lines[0] and "NOT MNIST" in lines[-1], lines
        assert os.listdir() == ["out"], "an empty data folder is left"
def test_a_copied_class_needs_torch_alone():
    import torch._dynamo    # or the block of sys.modules below would make torch import it twice
    x, y = (torch.rand(4, 1, 28, 28) < 0.1).float(), torch.arange(4)
    inputs = dict.fromkeys(("cvae", "cdraw", "ssl_vae"), (x, y))
    inputs["vrnn"] = x[:, 0].transpose(0, 1), torch.full((4,), 28)
    for script in SCRIPTS:
        text, content = (HERE / f"{script}.py").read_text(), {"__name__": "copied"}
        assert not re.search(rf"^\s*(import|from) .*\b({'|'.join(SCRIPTS)})\b", text, re.M), script
        tree = ast.parse(text)
        tree.body = [n for n in tree.body if getattr(n, "name", "") not in ("main", "flags")]
        with mock.patch.dict(sys.modules, dict.fromkeys(("common", "torchvision", "matplotlib"))):
            exec(compile(tree, script, "exec"), content)
            m, losses = content[script.upper().replace("_", "")](), []
            m, given = Bounds(m) if script == "ssl_vae" else m, inputs.get(script, (x,))
            optimizer = torch.optim.Adam(m.parameters(), 5e-3)
            for _ in range(12):
                losses.append(-m(*given)[2].mean())
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
            assert min(losses[6:]) < losses[0] - 3, (script, losses)
            drawn = m.sample(6, 4)[0] if script == "vrnn" else m.sample(*given[1:] or [4])
            assert not drawn.requires_grad and drawn.shape[-1] == 28, script
# script | flags; flags | what the line must say, if not the name of the last flag
BAD = """vae | --epochs -1; --epochs 1.5; --batch-size 0; --lr 0; --lr nan; --lr fast; --seed -3
vae | --z-dim 0; --hidden 0; --channels 3; --test-samples 0; --likelihood x; --dataset x; --nonsense
vae | --iw 0; --device abacus; --device cuda:99; --resume none.pt; --resume run/log.csv; --resume ~x
vae | --resume cut.pt; --resume dict.pt; --resume code.pt; --out-dir run; --out-dir empty
vae | --out-dir cut.pt/deep | Not a directory
vae | --resume run --z-dim 7 | 'z_dim': 4
vae | --data-dir bad --dataset mnist; --data-dir bad | bad/MNIST
cvae | --quadrants 4; --z-dim -1; --condition text; --resume run; --channels 2 0; --warm-up 0
ssl_vae | --labels 0; --labels 7; --labels 60000; --alpha -1; --resume run; --resume ''
draw | --glimpses 0; --read-size 0; --prior flat; --resume run; --device meta
cdraw | --write-size 0; --glimpses two; --resume run; --classes 1 x; --classes 10 11x; --classes ''
vrnn | --sample 3; --sample 3 --conditional | needs --resume
vrnn | --temperature 0; --mixtures 0; --resume run; --dataset wav --data-dir wavs --conditional
vrnn | --digits 12; --conditional --digits x; --conditional --digits '' | --classes needs
vrnn | --dataset wav --data-dir none | none: 
vrnn | --dataset wav --data-dir bad | bad.wav: not a WAV file: EOFError(); try ffmpeg -i bad/bad.wav
vrnn | --dataset wav --data-dir long | long.wav: 400001 samples
vrnn | --dataset iam-ondb --data-dir none | registered
vrnn | --dataset iam-ondb --data-dir bad | not a file of strokes
vrnn | --dataset ndjson --data-dir bad | bad/a.ndjson: line 1 is no drawing: KeyError('drawing')
vrnn | --dataset pendigits --data-dir bad | pendigits-orig.tra.Z: damaged"""
def test_bad_input_gets_one_line_and_status_2():
    with folder() as here:
        train("vae", "--epochs 1 --out-dir run")
        [os.makedirs(p) for p in ("empty", "bad/pendigits", "bad/MNIST/raw", "bad/lineStrokes")]
        for part, kind in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1")):
            Path(f"bad/MNIST/raw/{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03not an image")
        Path("bad/pendigits/pendigits-orig.tra.Z").write_bytes(b"\x1f\x9d\x90short")
        for name, text in (("bad.wav", "?"), ("a.ndjson", "{}"), ("lineStrokes/a.xml", "<a><b")):
            Path("bad", name).write_text(text)
        for name, content in (("dict.pt", {"x": 1}), ("code.pt", SimpleNamespace(script="vae"))):
            torch.save(content, name)
        Path("cut.pt").write_bytes(Path("run/best.pt").read_bytes()[:1000])
        wav_file("long/long.wav", 400_001)
        [wav_file(f"wavs/{i}.wav", 900) for i in range(30)]
        files, real = {p: p.is_file() and p.read_bytes() for p in here.rglob("*")}, common.images
        for line in BAD.splitlines():
            script, many, *text = line.split(" | ")
            for flags in many.split("; "):
                status, error = outcome(script, flags, real if "bad" in flags else tiny_images)
                assert status == 2 and "Traceback" not in error, (script, flags, status, error)
                last, expected = error.splitlines()[-1], text or re.findall("--[a-z-]+", flags)
                assert expected[-1] in last and last.startswith(f"{script}.py: "), (flags, error)
        assert files == {p: p.is_file() and p.read_bytes() for p in here.rglob("*")}
def data_args(dataset, data_dir="none"):
    return SimpleNamespace(**locals(), image_size=20, batch_size=9, device="cpu", conditional=True,
                           dry_run=False, run=SimpleNamespace(note="", saved=None))
def sizes(d):
    return [len(p.lengths if hasattr(p, "lengths") else p[0]) for p in (d.train, d.valid, d.test)]
def test_download_tries_every_mirror_and_is_checked():
    from torchvision.datasets import MNIST
    files, sums, many = {}, [], [torch.cat([t] * 10) for t in glyphs()]
    for part, n in (("train", 5100), ("t10k", 50)):
        images = struct.pack(">4i", 2051, n, 28, 28) + bytes(n * 784)
        labels = struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n))
        for name, content in ((f"{part}-images-idx3-ubyte.gz", gzip.compress(images, 1)),
                              (f"{part}-labels-idx1-ubyte.gz", gzip.compress(labels, 1))):
            sums.append((name, hashlib.md5(content).hexdigest()))
            files.update({f"good/{name}": content, f"bad/{name}": content[:-9]})
    with folder(), patched(MNIST, "resources", sums), contextlib.redirect_stderr(io.StringIO()), \
            patched(common, "glyph_images", lambda n: many):
        for name, content in files.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(content)
        server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with patched(MNIST, "mirrors", ["http://127.0.0.1:9/", f"{url}/good/"]):
            data = common.images(data_args(None, "one"))
            assert sizes(data) == [100, 5000, 50] and data.train[1][1] == data.valid[1][1] == 1
        with patched(MNIST, "mirrors", [f"{url}/bad/"]), raises(SystemExit, "2"):
            common.images(data_args("mnist", "two"))
        with patched(MNIST, "mirrors", ["http://127.0.0.1:9/"]):    # what is there needs no network
            assert sizes(common.images(data_args("mnist", "one"))) == [100, 5000, 50]
            assert sizes(common.images(data_args(None, "three"))) == [20_000, 2000, 2000]
            assert not Path("three").exists()
def test_glyphs_are_digits_seeded_and_varied_and_binarised():
    x, y = glyphs()
    identical(draw_glyphs(300), draw_glyphs(300))
    distance = torch.cdist(x[2000:].float().flatten(1), x[:2000].float().flatten(1))
    assert (y[distance.argmin(1)] == y[2000:]).float().mean() > 0.7 and distance.min() > 0
    with patched(vrnn, "glyph_strokes", tiny_strokes):
        data = vrnn.read_data(data_args("glyphs"))
    x = data.train.frames[:, None].expand(-1, 900, -1)    # in training, changed by 900 matrices
    noisy = vrnn.prepare(x, data)    # no move is always zero, or density explodes
    assert data.unit > 0 and (noisy[:, 0, :2] != 0).all() and sizes(data) == [100, 30, 40]
    change = (x[:, 0, :2].pinverse() @ noisy.transpose(0, 1)[..., :2] - torch.eye(2)).flatten(1)
    assert torch.equal(noisy[..., 2], x[..., 2]) and len(data.classes) == 10
    close(change.T @ change / 900, 0.15**2 * torch.eye(4), 6e-3)
    x = torch.tensor([0, 64, 255], dtype=torch.uint8).expand(20_000, 3)
    identical(*[(vrnn.prepare(data.valid.frames, data, 1), common.binarise(x, 1)) for _ in "12"])
    assert not torch.equal(common.binarise(x), common.binarise(x))
    assert (common.binarise(x).mean(0) - torch.tensor([0, 64 / 255, 1])).abs().max() < 0.02
def test_own_images_are_made_grey_and_square_and_split_by_name():
    from torchvision import io as images, transforms
    real, args, before = common.images, data_args("folder", "in"), [set(), set(), set()]
    with folder():
        wav_file("in/.cache/a/b.png", 9)    # no image, and no class
        os.makedirs("in/.empty")
        for i in range(120):
            path = Path("in", ("12", "o k", "\u00e9\udce9")[i % 3])    # the last is no UTF-8
            path.mkdir(parents=True, exist_ok=True)
            image = torch.full((1 + i % 2 * 2, 32, 32 + i % 3 * 16), i).byte()
            transforms.ToPILImage()(image).save(path / f"{i}.{'png' if i % 4 else 'jpg'}")
            if i in (89, 119):    # more files move none from one part to another
                data = real(args)
                parts = [(x[:, 0, 3, 17], y) for x, y in (data.train, data.valid, data.test)]
                now = [set(value.tolist()) for value, _ in parts]
                assert all(a <= b for a, b in zip(before, now)) and sum(sizes(data)) == i + 1
                assert all(torch.equal(value % 3, y) for value, y in parts), "wrong classes"
                before = now
        for script in SCRIPTS:
            train(script, "--dataset folder --data-dir in --image-size 20 --dry-run", real)
            red, green = images.read_image(f"out/{script}-1/samples.png")[:2]    # names are red
            assert (red != green).any() == (script in ("cvae", "ssl_vae", "cdraw")), script
        train("cdraw", "--resume out/cdraw-1 --sample 3 --classes \u00e9\udce9 'o k'", None)
        train("draw", "--glimpses 9 --dry-run")    # but 4 in the first two epochs
        assert load("out/draw-2/best.pt")["model"]["_extra_state"] == 4
        train("cdraw", f"--resume {HERE}/.github/weights/cdraw.pt --sample 2 --digits 31", None)
        assert "some of 12, o k" in outcome("cdraw", "--resume out/cdraw-1 --classes 3", real)[1]
        assert read_data(args).classes == ["12", "o k", "\u00e9?"]
        assert "a/b.png: not an" in outcome("vae", "--dataset folder --data-dir in/.cache", real)[1]
def test_sequences_are_padded_per_batch_and_image_rows_are_rows():
    pairs = [(torch.full((n, 2), float(n)), str(n % 2)) for n in (3, 1000, 2, 5)]
    data = vrnn.Sequences(pairs, "cpu", ["0", "1"])
    (x, lengths, y), (long, _, _) = data.batches(torch.tensor([[0, 3, 2], [1, 1, 1]]))
    assert len(data.frames) == 1010 and x.shape == (8, 3, 2) and long.shape == (1000, 3, 2)
    assert all((x[:n, b] == n).all() for b, n in enumerate((3, 5, 2))) and y.tolist() == [1, 1, 0]
    with patched(common, "images", lambda _: tiny_images(data_args("mnist"))):
        data = vrnn.read_data(data_args("mnist"))
    x, lengths, y = next(data.train.batches(torch.arange(200)[None]))
    assert torch.equal(x[:28].transpose(0, 1), glyphs()[0][:200, 0]) and (lengths == 28).all()
def wav_file(path, n, rate=8000, channels=1, width=2):    # width: bytes of a sample
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    x = (8000 * 2**16 * torch.sin(torch.arange(n) / rate * 880 * math.pi)).to(torch.int32)
    x = x.repeat_interleave(channels).view(torch.uint8).view(-1, 4)[:, -width:]
    data = (x ^ (128 if width == 1 else 0)).numpy().tobytes()    # 8 bit: unsigned
    form = struct.pack("<HHI6xHH6x16s", 65534 if width > 2 else 1, channels, rate, 8 * width, 22,
                       bytes.fromhex("0100000000001000800000aa00389b71"))    # 65534: EXTENSIBLE
    chunks = b"WAVEfmt \x28\0\0\0" + form + b"data" + struct.pack("<I", len(data)) + data
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
def test_own_recordings_and_drawings_are_framed_and_learned_from():
    with folder():
        wav_file("low.wav", 8000)
        low = vrnn.frames(Path("low.wav")).flatten()
        for width in (1, 2, 3, 4):    # 8 bits are rounded to 256
            wav_file("high.wav", 32_000, rate=32_000, channels=2, width=width)
            high = vrnn.frames(Path("high.wav")).flatten()
            assert (high - low)[200:-200].abs().max() < (300 if width == 1 else 40), width
        basis, names = vrnn.dct(200, "cpu"), [f"{'ab'[i % 2]}/{i}.wav" for i in range(40)]
        close(basis @ basis.T, torch.eye(200))    # so that densities are those of the samples
        [wav_file(f"in/{name}", 200 * i + 1) for i, name in enumerate(names)]
        line = '{"word": "the %d", "drawing": [[[0, %d], [0, 3]], [[9], [9]]]}\n'
        Path("in/a.ndjson").write_text(f"\ufeff{''.join(line % (i % 2, i) for i in range(40))}\n")
        heard, drawn = [vrnn.read_data(data_args(name, "in")) for name in ("wav", "ndjson")]
        parts = [p.lengths.tolist() for p in (heard.train, heard.valid, heard.test)]
        assert all(vrnn.hash_split(names[n - 1]) == i for i, part in enumerate(parts) for n in part)
        moves = (drawn.test.frames[1::3] * drawn.scale).round()    # from (0, 0) to (i, 3)
        assert torch.equal(moves[:, 0] % 2, drawn.test.y) and (moves[:, 1] == -3).all()
        assert sum(sizes(heard)) == sum(sizes(drawn)) == 40 and drawn.classes == ["the 0", "the 1"]
        x = torch.arange(1.0, 801).view(4, 1, 200)    # in training up to 199 samples late
        late = torch.stack([(x - vrnn.prepare(x, heard) @ basis.T).flatten() for _ in range(9)])
        assert ((late - x.flatten().min(late[:, -1:])).abs() < 0.1).all() and 0.5 < late.max() < 200
        for to in ("ndjson", "wav"):
            train("vrnn", f"--dataset {to} --data-dir in --conditional --dry-run --out-dir {to}")
        assert vrnn.frames(Path("wav/sounds/0_0.wav")).shape[1] == 200
@unittest.skipUnless(REAL, "SEQVAE_DATA is not set")
def test_real_data():
    data = common.images(data_args("mnist", REAL))
    assert sizes(data) == [55_000, 5000, 10_000] and torch.bincount(data.test[1])[5] == 892
    for name, lengths in (("pendigits", [6745, 749, 3498]), ("speech", [2400, 300, 300])):
        data = vrnn.read_data(data_args(name, REAL))
        assert sizes(data) == lengths and torch.bincount(data.test.y).min() > 29, name
    with folder(), contextlib.redirect_stdout(io.StringIO()):
        vae.main(["--data-dir", REAL, *"--epochs 1 --hidden 64 --test-samples 1".split()])
        assert 100 < json.load(open("out/vae-1/results.json"))["test_neg_elbo"] < 200
def speed(steps=30):    # prints a table of training steps at default sizes
    def after_step(run, **_):
        done.append((time.perf_counter(), run.args.batch_size))
        if len(done) > steps:
            raise InterruptedError
    from torch.utils.benchmark import Timer
    rate = 2e9 / Timer("a @ a", "import torch; a = torch.rand(1000, 1000)").timeit(20).median
    print("| script | data | MFLOP per example | examples/s | GFLOP/s of a product | share |\n"
          "|---|---|---|---|---|---|")
    calls = [(script, "mnist" if REAL else "glyphs") for script in SCRIPTS]
    for script, data in calls + [("vrnn", "pendigits"), ("vrnn", "speech")][:2 if REAL else 0]:
        for counter in (FlopCounterMode(display=False), contextlib.nullcontext()):
            done, quiet = [], io.StringIO()
            with folder(), patched(common.Run, "after_step", after_step), counter, \
                    contextlib.redirect_stdout(quiet), contextlib.suppress(InterruptedError):
                importlib.import_module(script).main(["--data-dir", REAL or "x", "--dataset", data])
            if hasattr(counter, "get_total_flops"):    # which slows it down: time it again
                flops = counter.get_total_flops() / len(done) / done[0][1]
        examples = steps * done[0][1] / (done[-1][0] - done[0][0])
        figures = flops / 1e6, examples, rate / 1e9, flops * examples / rate
        print(f"| `{script}.py` | {data} |", *(f"{v:,.2f} |" for v in figures), flush=True)
def main(names):
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    if names == ["speed"]:
        return speed()
    if unknown := set(names) - set(tests):
        print(f"test_all.py: no test is named {' or '.join(unknown)}", file=sys.stderr)
        return 2
    suite = unittest.TestSuite(unittest.FunctionTestCase(tests[name]) for name in names or tests)
    return not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
