# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""VRNN (Chung et al. 2015, "A Recurrent Latent Variable Model for Sequential Data").

    prior        z_t | x_{<t}, z_{<t} ~ N(mu_p(h_{t-1}), diag sigma_p(h_{t-1})^2)           (eq. 5)
    generation   x_t | z_{<=t}, x_{<t} ~ p(x_t | phi_z(z_t), h_{t-1})                       (eq. 6)
    recurrence   h_t = GRU([phi_x(x_t), phi_z(z_t)], h_{t-1})                               (eq. 7)
    inference    z_t | x_{<=t}, z_{<t} ~ N(mu_q, diag sigma_q^2) of phi_x(x_t), h_{t-1}     (eq. 9)
    bound        log p(x) >= E_q sum_t [log p(x_t | z_{<=t}, x_{<t})
                             - KL(q(z_t | x_{<=t}, z_{<t}) || p(z_t | x_{<t}, z_{<t}))]     (eq. 11)

With --conditional, the recurrence and every learned factor also depend on the label y, and the
bound is eq. 11 with y given throughout:

    p(x, z|y) = prod_t p(x_t | z_{<=t}, x_{<t}, y) p(z_t | x_{<t}, z_{<t}, y)
    q(z|x, y) = prod_t q(z_t | x_{<=t}, z_{<t}, y)
    log p(x|y) = log E_q[p(x, z|y) / q(z|x, y)] >= E_q[log p(x, z|y) - log q(z|x, y)]     (Jensen)

Pen strokes and speech have an end, which the model learns as well: after each step,
Bernoulli(s(h_t)) says whether x_t was the last. The bound is then on log p(x, T), where T is the
length, and has the further terms log(1 - s(h_t)) for t < T, and log s(h_T).

    python vrnn.py                                         # images, row by row, from top to bottom
    python vrnn.py --dataset speech --conditional          # spoken digits
    python vrnn.py --dataset pendigits --conditional       # pen strokes
    python vrnn.py --dataset arrays --data-dir DIR         # own series, .npy files (T, D)
    python vrnn.py --resume out/vrnn-1 --sample 8 --classes 3 1 4 1

The defaults of --epochs, --batch-size, --lr and --mixtures depend on --dataset; those of speech are
listed by python vrnn.py --dataset speech --help.

Measured test -ELBO: MNIST with --epochs 16, 81.46 nats in an hour on one core; --dataset speech
--conditional, -5110.7 nats in 37 minutes; --dataset pendigits --conditional, -42.15 nats in 42
minutes, and -41.03 after 12 more epochs with --lr 5e-4, which make digits more legible. Negative
values are of log densities of real numbers, here of data divided by their root mean square.

Deviations from the paper: a GRU instead of an LSTM; SiLU instead of ReLU; fewer layers; the initial
state h_0 is learned; recorded integers get uniform noise, otherwise their density could grow
without limit; x_t of speech is a lapped cosine transform of a frame of 200 samples; in training
speech starts up to 199 samples later, and pen strokes are stretched, slanted and sped up at random;
log variances, correlations and gradients are limited; the weights that are tested are averaged over
training.
"""

import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import time
import urllib.request
import wave
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------
# the model


class VRNN(nn.Module):
    """Chung et al. 2015.

    x_dim: size of x_t. z_dim: size of z_t; with 0 the model is an RNN. likelihood: "bernoulli";
    "gaussian", a mixture of diagonal Gaussians; or "pen", x_t = (dx, dy, pen-up), a mixture of
    Gaussians with correlation, and a Bernoulli. prior: "learned", or "standard" for N(0, I).
    num_classes: number of labels, 0 for a model without labels. stop: whether the end is learned.
    mixtures: Gaussians in the mixture. hidden: units of the GRU. features: units of other layers.
    Raises ValueError for another likelihood or prior, and for "pen" with x_dim other than 3.
    """

    def __init__(
        self,
        x_dim=28,
        z_dim=48,
        likelihood="bernoulli",
        prior="learned",
        num_classes=0,
        stop=False,
        mixtures=1,
        hidden=384,
        features=256,
    ):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian", "pen"):
            raise ValueError(f'likelihood is "bernoulli", "gaussian" or "pen", not {likelihood!r}')
        if prior not in ("learned", "standard"):
            raise ValueError(f'prior is "learned" or "standard", not {prior!r}')
        if likelihood == "pen" and x_dim != 3:
            raise ValueError(f'x_dim is 3 for "pen", (dx, dy, pen-up), not {x_dim}')
        self.x_dim = x_dim
        self.z_dim = z_dim
        self.likelihood = likelihood
        self.mixtures = mixtures
        # real_dim: how many dimensions of x_t are real numbers; the others are binary
        # sizes: how dec's output is split, into logits for "bernoulli", otherwise into weights,
        # means, log variances and correlations of the mixture, and the logit of pen-up
        if likelihood == "bernoulli":
            self.real_dim = 0
            self.sizes = [x_dim]
        elif likelihood == "gaussian":
            self.real_dim = x_dim
            self.sizes = [mixtures, mixtures * x_dim, mixtures * x_dim, 0, 0]
        else:
            self.real_dim = 2
            self.sizes = [mixtures, mixtures * 2, mixtures * 2, mixtures, 1]

        d_y = 0
        self.label = None
        if num_classes:
            d_y = 64
            weights = 0.1 * torch.randn(num_classes, d_y)  # larger ones raise the KL at the start
            self.label = nn.Embedding.from_pretrained(weights, freeze=False)
        self.phi_x = nn.Sequential(
            nn.Linear(x_dim, features),
            nn.SiLU(),
            nn.Linear(features, features),
            nn.SiLU(),
        )
        d_z = 0
        self.phi_z = nn.Identity()
        self.enc = None
        self.prior_net = None
        if z_dim:
            d_z = features
            self.phi_z = nn.Sequential(nn.Linear(z_dim, features), nn.SiLU())
            self.enc = nn.Sequential(
                nn.Linear(features + hidden + d_y, features),
                nn.SiLU(),
                nn.Linear(features, 2 * z_dim),
            )
        if z_dim and prior == "learned":
            self.prior_net = nn.Sequential(
                nn.Linear(hidden + d_y, features),
                nn.SiLU(),
                nn.Linear(features, 2 * z_dim),
            )
        self.dec = nn.Sequential(
            nn.Linear(d_z + hidden + d_y, features),
            nn.SiLU(),
            nn.Linear(features, features),
            nn.SiLU(),
            nn.Linear(features, sum(self.sizes)),
        )
        self.gru = nn.GRUCell(features + d_z + d_y, hidden)
        self.h_0 = nn.Parameter(torch.zeros(hidden))
        self.end = None
        if stop:
            self.end = nn.Linear(hidden, 1)

    def embed(self, y, n):
        """Features (n, 64) of labels y (n,), or (n, 0) for a model without labels."""
        if (y is None) != (self.label is None):
            raise ValueError("labels y are needed if num_classes > 0, and only then")
        if y is None:
            return self.h_0.new_zeros(n, 0)
        return self.label(y)

    def gaussian(self, net, *inputs):
        """mu, logvar (..., z_dim) that a network returns for its inputs; N(0, I) if it is None."""
        if net is None:
            zeros = self.h_0.new_zeros(*inputs[0].shape[:-1], self.z_dim)
            return zeros, zeros
        out = net(torch.cat(inputs, -1)).to(self.h_0.dtype)  # float32 even under autocast
        mu, logvar = out.chunk(2, -1)
        return mu, logvar.clamp(-10, 10)

    def forward(self, x, lengths, y=None, k=None):
        """The terms of the bound for sequences x (T, B, x_dim) of lengths (B,), with labels y (B,).

        Padding, x_t of t >= length, is ignored. Returns log p(x|z), KL(q || p) and
        log(p(x, z) / q(z|x)) in nats, (B,), or (k, B) for k samples of z. Raises ValueError for
        other shapes of x and lengths, missing or unwanted labels and, on a CPU, for lengths outside
        1..T or binary values outside [0, 1].
        """
        self.check(x, lengths, k)
        if k is not None:
            if y is not None:
                y = y.repeat(k)
            log_px, kl, log_w = self(x.repeat(1, k, 1), lengths.repeat(k), y)
            return log_px.view(k, -1), kl.view(k, -1), log_w.view(k, -1)

        t = torch.arange(len(x), device=x.device)[:, None]
        inside = t < lengths  # (T, B)
        x = torch.where(inside[:, :, None], x, 0.0)
        label = self.embed(y, x.shape[1])
        h = self.h_0.expand(x.shape[1], -1)
        steps = []
        # unbind, as the gradient of indexing [t] would fill (T, B, features) at every step
        for f_x_t in self.phi_x(x).unbind(0):
            mu_q, logvar_q = self.gaussian(self.enc, f_x_t, h, label)  # eq. 9
            eps = torch.randn_like(mu_q)
            z = mu_q + (0.5 * logvar_q).exp() * eps
            f_z = self.phi_z(z)
            steps.append((h, mu_q, logvar_q, eps, z, f_z))
            h = self.gru(torch.cat([f_x_t, f_z, label], 1), h)  # eq. 7

        # what no later step needs is computed for all steps at once, (T, B, ...)
        h_before, mu_q, logvar_q, eps, z, f_z = [torch.stack(s) for s in zip(*steps, strict=True)]
        label = label.expand(len(x), -1, -1)
        mu_p, logvar_p = self.gaussian(self.prior_net, h_before, label)  # eq. 5
        out = self.dec(torch.cat([f_z, h_before, label], 2))
        log_px = self.log_density(x, out)  # eq. 6
        if self.end is not None:
            h_after = torch.cat([h_before[1:], h[None]])
            end_logit = self.end(h_after).squeeze(2).to(x.dtype)
            is_last = t == lengths - 1
            log_px = log_px + F.logsigmoid(torch.where(is_last, end_logit, -end_logit))

        # the KL of eq. 11 in closed form, and log p - log q of the sampled z; constants cancel
        var_p = logvar_p.exp()
        kl = 0.5 * (logvar_p - logvar_q - 1 + ((mu_q - mu_p) ** 2 + logvar_q.exp()) / var_p).sum(2)
        log_q = -0.5 * (eps**2 + logvar_q)
        log_p = -0.5 * ((z - mu_p) ** 2 / var_p + logvar_p)
        log_w = log_px + (log_p - log_q).sum(2)
        log_px = torch.where(inside, log_px, 0.0).sum(0)
        kl = torch.where(inside, kl, 0.0).sum(0)
        log_w = torch.where(inside, log_w, 0.0).sum(0)
        return log_px, kl, log_w

    def check(self, x, lengths, k=None):
        """Raise ValueError for inputs that would give wrong numbers."""
        if x.ndim != 3 or x.shape[2] != self.x_dim or not x.is_floating_point():
            raise ValueError(
                f"x are floats (T, B, {self.x_dim}), time first, not {x.dtype} {tuple(x.shape)}"
            )
        if lengths.shape != x.shape[1:2]:
            raise ValueError(f"lengths are ({x.shape[1]},), as x, not {tuple(lengths.shape)}")
        if k is not None and k < 1:
            raise ValueError(f"k is None or at least 1, not {k}")
        if x.device.type != "cpu":  # on a GPU, looking at values would interrupt it
            return
        if not ((lengths >= 1) & (lengths <= len(x))).all():
            raise ValueError(f"lengths are from 1 to {len(x)}, as x, not {lengths.tolist()}")
        inside = torch.arange(len(x))[:, None] < lengths
        binary = x[:, :, self.real_dim :][inside]
        if not ((binary >= 0) & (binary <= 1)).all():
            raise ValueError("pixels and pen-up are in [0, 1]; divide pixels 0..255 by 255")

    def mixture(self, out):
        """Parameters of the mixture of K Gaussians, from what dec returns.

        log weights (..., K), mu, logvar (..., K, D), correlations r (..., K) and the logit of
        pen-up (..., 1). The last two are empty unless the likelihood is "pen".
        """
        weights, mu, logvar, r, up = out.split(self.sizes, -1)
        mu = mu.unflatten(-1, (self.mixtures, self.real_dim))
        logvar = logvar.unflatten(-1, (self.mixtures, self.real_dim)).clamp(-12, 12)
        return weights.log_softmax(-1), mu, logvar, 0.99 * r.tanh(), up

    def log_density(self, x, out):
        """log p(x_t | z_t, h_{t-1}) (...) of x (..., x_dim), from what dec returns."""
        out = out.to(x.dtype)
        if self.likelihood == "bernoulli":  # out are logits l, log sigmoid(l) = l + log sigmoid(-l)
            return (x * out + F.logsigmoid(-out)).sum(-1)
        log_weights, mu, logvar, r, up = self.mixture(out)
        log_component = log_weights - 0.5 * (logvar + math.log(2 * math.pi)).sum(-1)  # (..., K)
        u = (x[..., None, : self.real_dim] - mu) * (-0.5 * logvar).exp()  # (..., K, D)
        if self.likelihood == "pen":  # N(u_1; 0, 1) N(u_2; r u_1, 1 - r^2)
            u_2 = (u[..., 1] - r * u[..., 0]) / (1 - r**2).sqrt()
            u = torch.stack([u[..., 0], u_2], -1)
            log_component = log_component - 0.5 * (1 - r**2).log()
        log_mixture = (log_component - 0.5 * (u**2).sum(-1)).logsumexp(-1)
        log_up = x[..., self.real_dim :] * up + F.logsigmoid(-up)
        return log_mixture + log_up.sum(-1)

    def sample_x(self, out, temperature=1.0):
        """x_t (B, x_dim) from p(x_t | z_t, h_{t-1}), from what dec returns."""
        if self.likelihood == "bernoulli":
            return torch.bernoulli((out / temperature).sigmoid())
        log_weights, mu, logvar, r, up = self.mixture(out)
        # a component by the Gumbel-max trick, which a GPU does without interruption
        gumbel = -torch.empty_like(log_weights).exponential_().log()
        which = (log_weights / temperature + gumbel).argmax(-1, keepdim=True)  # (B, 1)
        mu = mu.take_along_dim(which[:, :, None], 1).squeeze(1)  # (B, D)
        logvar = logvar.take_along_dim(which[:, :, None], 1).squeeze(1)
        u = torch.randn_like(mu)
        if self.likelihood == "pen":
            r = r.gather(1, which)
            u_2 = r * u[:, :1] + (1 - r**2).sqrt() * u[:, 1:]
            u = torch.cat([u[:, :1], u_2], 1)
        x = mu + temperature * (0.5 * logvar).exp() * u
        return torch.cat([x, torch.bernoulli((up / temperature).sigmoid())], 1)

    @torch.no_grad()
    def sample(self, steps, n=1, y=None, temperature=1.0, z_temperature=1.0, given=None):
        """n sequences, or one for each label of y (B,), of at most `steps` steps.

        given: beginnings (S, B, x_dim) to go on from. While t <= S, z_t is drawn from
        q(z_t | x_{<=t}, z_{<t}); then the model goes on alone, and may end at once.

        Returns x (T, B, x_dim), which is 0 after the end, and lengths (B,). temperature scales
        standard deviations of x_t and divides logits; z_temperature scales those of z_t. Raises
        ValueError for missing or unwanted labels, and for beginnings of another shape.
        """
        if given is None:
            given = self.h_0.new_zeros(0, n if y is None else len(y), self.x_dim)
        n = given.shape[1]
        lengths = torch.full((n,), steps, device=self.h_0.device)
        if len(given):
            self.check(given, torch.full_like(lengths, len(given)))
        if len(given) > steps or (y is not None and len(y) != n):
            raise ValueError(f"given is (S, B, D), B as y, S <= {steps}, not {tuple(given.shape)}")
        label = self.embed(y, n)
        h = self.h_0.expand(n, -1)
        x = []
        for t in range(steps):
            if t < len(given):
                mu, logvar = self.gaussian(self.enc, self.phi_x(given[t]), h, label)  # eq. 9
                sigma = (0.5 * logvar).exp()
            else:
                mu, logvar = self.gaussian(self.prior_net, h, label)  # eq. 5
                sigma = z_temperature * (0.5 * logvar).exp()
            f_z = self.phi_z(mu + sigma * torch.randn_like(mu))
            if t < len(given):
                x_t = given[t]
            else:
                x_t = self.sample_x(self.dec(torch.cat([f_z, h, label], 1)), temperature)  # eq. 6
            x.append(torch.where((t < lengths)[:, None], x_t, 0.0))
            h = self.gru(torch.cat([self.phi_x(x_t), f_z, label], 1), h)  # eq. 7
            if self.end is not None and t >= len(given) - 1:
                p_end = (self.end(h).squeeze(1) / temperature).sigmoid()
                ended = torch.bernoulli(p_end).bool()
                lengths = torch.where(ended, lengths.clamp(max=t + 1), lengths)
        return torch.stack(x).to(self.h_0), lengths


# ---------------------------------------------------------------------------
# sequences, and their preparation


class Sequences:
    """Sequences of any lengths, one after the other.

    frames: (sum of lengths, D). lengths: (N,), on the CPU, and kept there and on the device of the
    frames. y: labels (N,) or None. joined: (sum of lengths,), whether the next frame continues the
    same sequence.
    """

    def __init__(self, frames, lengths, y):
        self.frames = frames
        self.cpu_lengths = lengths
        self.lengths = lengths.to(frames.device)
        self.starts = (lengths.cumsum(0) - lengths).to(frames.device)
        self.joined = torch.ones(len(frames), dtype=torch.bool)
        self.joined[lengths.cumsum(0) - 1] = False
        self.joined = self.joined.to(frames.device)
        self.y = y

    def batch(self, index, cpu_index):
        """Padded x (T, B, D), lengths (B,), y (B,) or None, joined (T, B) of sequences index (B,).

        T follows from the same index on the CPU, so that nothing waits for a GPU.
        """
        longest = int(self.cpu_lengths[cpu_index].max())
        longest = (longest + 7) // 8 * 8  # few different sizes, so that freed memory can be reused
        steps = min(longest, int(self.cpu_lengths.max()))
        t = torch.arange(steps, device=index.device)[:, None]
        lengths = self.lengths[index]
        at = self.starts[index] + torch.minimum(t, lengths - 1)  # padding: the last frame again
        y = None
        if self.y is not None:
            y = self.y[index]
        return self.frames[at], lengths, y, self.joined[at]

    def batches(self, order, what):
        """The batch of each row of order (steps, B), which is on the CPU."""
        import common

        rows = common.progress(what, order)
        for cpu_index, index in zip(rows, order.to(self.frames.device), strict=True):
            yield self.batch(index, cpu_index)


def rounding_noise(x, scale, seed):
    """Uniform noise for x (..., D), which are recorded integers divided by scale.

    It is one integer step, 1 / scale, wide; scale is (D,) or (1,). The noise is new at every call,
    or always the same for a seed.
    Without it the density of the integers could grow without limit.
    """
    if seed is None:
        noise = torch.rand(x.shape, device=x.device)
    else:  # on the CPU, so that it is the same on every device
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (noise - 0.5) / scale


def as_they_are(x, lengths, scale):
    """Sequences and their lengths, unchanged."""
    return x, lengths


def prepare_rows(x, scale, joined, seed=None):
    """Grey rows (..., D) uint8 as black or white pixels."""
    import common

    return common.binarise(x, seed)


def prepare_pen(x, scale, joined, seed=None):
    """Moves (..., 3) with noise."""
    noise = rounding_noise(x, scale, seed)
    return torch.cat([(x + noise)[..., :2], x[..., 2:]], -1)


def stretch_pen(x, lengths, scale):
    """Drawings (T, B, 3) stretched and slanted at random, and their lengths, for training."""
    change = 0.08 * torch.randn(x.shape[1], 2, 2, device=x.device)
    moves = x[..., :2] + torch.einsum("tbi,bij->tbj", x[..., :2], change)
    return torch.cat([moves, x[..., 2:]], 2), lengths


def vary_pen(x, lengths, scale):
    """Drawings (T, B, 3) as other writers could make them, and their lengths (B,), for training.

    Stretched and slanted; larger or smaller; one in four written up to twice as fast, that is,
    with fewer points, as a pen is recorded at equal intervals of time.
    """
    n = x.shape[1]
    x, _ = stretch_pen(x, lengths, scale)
    size = (0.1 * torch.randn(n, 1, device=x.device)).exp()
    points = (size * x[..., :2]).cumsum(0)

    # the times of the new points, in steps of the old ones: 0, speed, 2 speed, ..., the last
    is_fast = torch.rand(n, device=x.device) < 0.25
    speed = 2 ** (is_fast * torch.rand(n, device=x.device))
    step = torch.arange(len(x), device=x.device)[:, None]
    last = (lengths - 1).to(x.dtype)
    times = torch.minimum(step * speed, last)  # (T, B)
    lengths = (step * speed < last).sum(0) + 1
    # where a stroke ends in between, a new point is there
    end = torch.where(x[..., 2] > 0.5, step, -1).cummax(0).values.gather(0, times.long())
    pen_up = end > F.pad(times[:-1], (0, 0, 1, 0), value=-1)
    times = torch.where(pen_up, end, times)

    before = times.long()
    after = (before + 1).clamp(max=len(x) - 1)
    points = torch.lerp(
        points.take_along_dim(before[..., None], 0),
        points.take_along_dim(after[..., None], 0),
        (times - before)[..., None],
    )
    points = (scale[:2] * points).round() / scale[:2]  # recorded as whole numbers
    moves = torch.cat([points[:1], points.diff(dim=0)])
    return torch.cat([moves, pen_up[..., None]], 2), lengths


def prepare_series(x, scale, joined, seed=None):
    """Series as they are."""
    return x


def prepare_speech(x, scale, joined, seed=None):
    """The lapped transform of samples (T, ..., 200) with noise.

    Without a seed, for training, a batch (T, B, 200) starts up to 199 samples later, and loses as
    many at the end.
    """
    noise = rounding_noise(x, scale, seed)
    if seed is None:
        kept = int(torch.randint(1, x.shape[2] + 1, ()))  # 200 minus the delay
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])  # the frame before each one
        x = torch.cat([before[..., kept:], x[..., :kept]], 2)
    x = rotate_borders(x + noise, joined)
    return x @ cosine_transform(x.shape[-1], x.device)


def samples_of(x, joined):
    """The inverse of the lapped transform: samples, as x (T, ..., N)."""
    x = x @ cosine_transform(x.shape[-1], x.device)  # its own inverse
    return rotate_borders(x, joined, sign=-1)


def rotate_borders(x, joined, sign=1):
    """The first step of a lapped transform of frames x (T, ..., N); with sign=-1 its inverse.

    Where frames are joined (T, ...), the samples at equal distance from their border are rotated:
    followed by the cosine transform, this is the MDCT with a sine window (Princen, Johnson &
    Bradley 1987; Malvar 1990). All is orthogonal, so densities do not change, but frames no longer
    meet at borders where a sound could jump.
    """
    half = x.shape[-1] // 2
    i = torch.arange(half, device=x.device)  # distance from the border, in samples
    angle = math.pi / 4 * (1 - (2 * i + 1) / x.shape[-1])
    angle = sign * joined[:-1, ..., None] * angle  # 0 at the ends of recordings
    before = x[:-1, ..., -half:].flip(-1)
    after = x[1:, ..., :half]
    rotated_before = angle.cos() * before - angle.sin() * after
    rotated_after = angle.cos() * after + angle.sin() * before
    left = torch.cat([x[:1, ..., :half], rotated_after])
    right = torch.cat([rotated_before.flip(-1), x[-1:, ..., -half:]])
    return torch.cat([left, right], -1)


@functools.cache  # copying it to a GPU at every step would wait for the GPU
def cosine_transform(n, device):
    """The cosine transform (DCT-IV, n x n) of frames (..., n): orthogonal, and its own inverse."""
    at = torch.arange(n, dtype=torch.float64) + 0.5
    waves = torch.cos(math.pi / n * at[:, None] * at) * (2 / n) ** 0.5
    return waves.float().to(device)


# ---------------------------------------------------------------------------
# readers: each yields part (0 train, 1 validation, 2 test), sequence (T, D) and label


def read_pendigits(args):
    """Alpaydin & Alimoglu 1998: digits in UNIPEN text; the last tenth of training validates."""
    import common

    folder = common.data_folder(args) / "pendigits"
    for name, size in (("pendigits-orig.tra", 7494), ("pendigits-orig.tes", 3498)):
        file = folder / name
        if file.exists():
            text = file.read_bytes()
        else:
            file = folder / f"{name}.Z"
            if not file.exists():
                download(
                    "https://archive.ics.uci.edu/static/public/81/pen+based+recognition+of+"
                    "handwritten+digits.zip",
                    folder,
                    r"pendigits-orig\.t(ra|es)\.Z",
                    "cd620bc67fb841b05abece060330ad57ffda5398f7dde0bdd595f689ec78d313",
                )
            if not shutil.which("gzip"):  # Python can't unpack this format
                common.fail(f"{file}: gzip is needed to unpack it; or put {name} there")
            text = subprocess.run(["gzip", "-dc", file], capture_output=True).stdout
        # [header, label, strokes, label, strokes, ...]
        split = re.split(r'SEGMENT DIGIT.*"(\d)"', text.decode("latin-1"))
        if len(split) != 1 + 2 * size:
            common.fail(f"{file}: damaged, has {len(split) // 2} digits instead of {size}")
        for i, (label, body) in enumerate(zip(split[1::2], split[2::2], strict=True)):
            strokes = []
            for stroke in re.findall(r"\.PEN_DOWN(.*?)\.PEN_UP", body, re.S):
                strokes.append(re.findall(r"^ *(-?\d+) +(-?\d+) *$", stroke, re.M))
            part = 2
            if name == "pendigits-orig.tra":
                part = int(i >= 6745)
            yield part, pen_moves(strokes), label


def pen_moves(strokes, y_sign=1):
    """Lists of points (x, y) -> (T, 3) moves dx, dy, and pen-up, which is 1 where a stroke ends.

    y_sign is -1 if y grows downwards. Raises ValueError for points that are not whole numbers, and
    for none or more than 2,000 of them.
    """
    points = []
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke, 1):
            points.append((float(x), float(y), float(i == len(stroke))))
    if not 0 < len(points) <= 2000:
        raise ValueError(f"{len(points)} points; must be from 1 to 2000")
    points = torch.tensor(points, dtype=torch.float64)
    if not (points.isfinite() & (points == points.round())).all():
        raise ValueError("the points must be whole numbers")
    moves = points[:, :2].diff(dim=0, prepend=points[:1, :2])
    moves = moves * torch.tensor([1, y_sign])
    return torch.cat([moves, points[:, 2:]], 1).float()


def read_ndjson(args):
    """Own drawings, a JSON object per line, as in Quick, Draw!, raw or simplified."""
    import common

    for file in own_files(args, ".ndjson", ".jsonl"):
        try:
            lines = file.read_text("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            common.fail(f"{file}: not UTF-8 text; convert it, for instance from UTF-16")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                drawing = json.loads(line)
                strokes = []
                for x, y, *_ in drawing["drawing"]:  # the raw format has times as well
                    strokes.append(list(zip(x, y, strict=True)))
                moves = pen_moves(strokes, y_sign=-1)
                key = drawing.get("key_id") or number
                word = drawing.get("word") or ""
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                common.fail(
                    f"{file}: line {number} is no drawing, {error!r}; one looks like "
                    '{"word": "cat", "drawing": [[[x, ...], [y, ...]], ...]}'
                )
            yield hash_split(str(key)), moves, str(word)


def read_speech(args):
    """Free Spoken Digit Dataset. Of each speaker and digit, 0-4 are for test, 5-9 validation."""
    import common

    folder = common.data_folder(args) / "free-spoken-digit-dataset-1.0.10" / "recordings"
    pattern = r"([0-9])_\w+_([0-9]+)\.wav"
    if not (folder / "9_yweweler_9.wav").exists():  # the last one that a download writes
        download(
            "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip",
            folder,
            ".*/recordings/" + pattern,
            "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e",
        )
    for file in sorted(folder.iterdir()):
        name = re.fullmatch(pattern, file.name)
        if name:
            label, number = name.groups()
            part = 0
            if int(number) < 10:
                part = 1
            if int(number) < 5:
                part = 2
            yield part, read_frames(file), label


def read_wav(args):
    """Own recordings; if all are in sub-folders, those are the classes."""
    import common

    root = common.data_folder(args)
    for file in own_files(args, ".wav"):
        name = file.relative_to(root)
        yield hash_split(name.as_posix()), read_frames(file), folder_label(name)


def read_arrays(args):
    """Own series: .npy files (T, D), or (T,) for D = 1; if all are in sub-folders, classes."""
    import numpy as np

    import common

    root = common.data_folder(args)
    generator = torch.Generator().manual_seed(0)
    first = None
    for file in own_files(args, ".npy"):
        try:
            x = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, SyntaxError) as error:
            common.fail(f"{file}: not an array of numbers: {error}")
        if x.ndim == 1:
            x = x[:, None]
        if x.dtype.kind not in "biuf" or x.ndim != 2 or x.size == 0:
            common.fail(f"{file}: must be numbers (T, D), not {x.dtype} {x.shape}")
        if len(x) > 2000:
            common.fail(f"{file}: {len(x)} steps; must be 1 to 2000; cut it into several files")
        if first is None:
            first = (file, x.shape[1])
        if x.shape[1] != first[1]:
            common.fail(f"{file}: D is {x.shape[1]}, but {first[1]} in {first[0]}")
        if not np.isfinite(x).all():
            common.fail(f"{file}: has values that are not finite (NaN or infinity)")
        is_integer = x.dtype.kind != "f"
        x = torch.from_numpy(x.astype("float64"))
        if is_integer:
            x = x + torch.rand(x.shape, generator=generator) - 0.5  # as `rounding_noise`
        name = file.relative_to(root)
        yield hash_split(name.as_posix()), x, folder_label(name)


def folder_label(name):
    """The first folder in a relative path, or "" if it has none."""
    if len(name.parts) > 1:
        return name.parts[0]
    return ""


def read_frames(file, rate=8000, size=200):
    """A WAV file as frames (T, size) of samples: the mean of its channels, at this rate."""
    import common

    try:
        x, old_rate = decode_wav(file.read_bytes())
    except (ValueError, struct.error) as error:
        common.fail(f"{file}: {error}; try ffmpeg -i {file} -c:a pcm_s16le NEW.wav")
    n = len(x)
    new = max(1, round(n * rate / old_rate))
    if new > 2000 * size:
        common.fail(f"{file}: {new} samples at {rate} Hz; must be 1 to {2000 * size}")
    x = x.float().mean(1)
    if new != n:  # by its spectrum: frequencies that the new rate can't hold are left out
        x = torch.fft.irfft(torch.fft.rfft(x)[: new // 2 + 1], new) * (new / n)
    return F.pad(x, (0, -new % size)).view(-1, size)  # the last frame ends in zeros


def decode_wav(content):
    """The bytes of a WAV file -> samples (n, channels) int16, and their rate.

    Raises ValueError or struct.error for anything but integers of 8, 16, 24 or 32 bits.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError("not a WAV file")
    header = b""
    data = b""
    at = 12
    while at + 8 <= len(content) and not data:
        name, size = struct.unpack_from("<4sI", content, at)
        chunk = content[at + 8 : at + 8 + size]
        if name == b"fmt ":
            header = chunk
        if name == b"data":
            data = chunk
            if len(data) < size < 0x7FFF0000:  # more is a placeholder, written to a pipe
                raise ValueError(f"cut short: {len(data)} bytes of sound, its header says {size}")
        at += 8 + size + size % 2
    if len(header) < 16:
        raise ValueError("a WAV file without format")
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", header)
    if tag == 0xFFFE:  # EXTENSIBLE: the tag proper comes later
        (tag,) = struct.unpack_from("<H", header, 24)
    if tag == 3:
        raise ValueError("its samples are floats, not integers")
    if tag != 1 or bits not in (8, 16, 24, 32):
        raise ValueError(f"its samples are not integers of 8 to 32 bits: format {tag}, {bits} bits")
    width = bits // 8
    if not data or not channels or not rate:
        raise ValueError("its header says that it has no samples, channels or rate")
    n = len(data) // (width * channels)
    x = torch.frombuffer(bytearray(data), dtype=torch.uint8, count=n * channels * width)
    x = x.view(-1, width)
    if width == 1:  # unsigned, which a flipped top bit makes signed; the missing byte is random
        low = torch.randint(256, x.shape, generator=torch.Generator().manual_seed(0)).byte()
        x = torch.cat([low, x ^ 128], 1)
    x = x[:, -2:].contiguous()  # the upper two bytes, as the lowest comes first
    return x.view(torch.int16).view(n, channels), rate


def own_files(args, *endings):
    """Files of --data-dir with one of the endings, sorted."""
    import common

    root = common.data_folder(args)
    files, left_out = common.files_below(root, endings)
    kinds = " or ".join(endings)
    if not files:
        common.fail(f"{root}: no such folder, or no {kinds} files in it")
    if left_out:
        print(f"left out: {left_out} files (hidden, or not {kinds})")
    return files


def hash_split(name):
    """0, 1 or 2: training, validation or test, 8 : 1 : 1, by a hash of the name."""
    tenth = int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % 10
    return max(0, tenth - 7)  # 0 to 7 train, 8 validates, 9 tests


def download(url, folder, pattern, sha256):
    """Download a zip, and write those of its files whose paths match the pattern into a folder.

    sha256 is of their names and contents, sorted by name.
    """
    import common

    files = {}
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            pack = zipfile.ZipFile(io.BytesIO(response.read()))
        for name in pack.namelist():
            if re.fullmatch(pattern, name):
                files[Path(name).name] = pack.read(name)
    except Exception as error:  # urllib and zipfile raise a dozen kinds
        common.fail(f"can't download {url}: {error!r}; put its files into {folder}")
    checksum = hashlib.sha256()
    for name in sorted(files):
        checksum.update(name.encode() + files[name])
    if checksum.hexdigest() != sha256:
        common.fail(f"{url}: the checksum is wrong; put its files into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files):
        common.write(folder / name, files[name])


# ---------------------------------------------------------------------------
# pictures


@dataclass
class Picture:
    """Sequences to draw, row by row, and what to write beside them.

    x: (rows * columns, T, D), of which the first `seen` steps were given to the model.
    """

    name: str  # of the file: "samples" or "completions"
    title: str
    x: torch.Tensor
    lengths: list
    seen: list
    row_names: list
    column_names: list


@torch.no_grad()
def draw_pictures(model, facts, args, folder, valid=None):
    """samples.png and, with the validation part, completions.png; sounds of speech, too."""
    torch.manual_seed(args.seed)
    draw = KINDS[facts["kind"]].draw
    draw(samples(model, facts, args), facts, folder)
    if valid is not None:
        draw(completions(model, facts, args, valid), facts, folder)


def samples(model, facts, args):
    """At least args.sample samples, or 8 per row: one row per class, or rows without name."""
    names = args.classes or facts["classes"]
    columns = 8
    if not names:
        columns = min(args.sample or 8, 8)
        names = [""] * math.ceil((args.sample or 80) / columns)
    elif args.sample:
        columns = math.ceil(args.sample / len(names))
    y = None
    if facts["classes"]:
        y = [facts["classes"].index(name) for name in names]
        y = torch.tensor(y, device=args.device).repeat_interleave(columns)
    n = len(names) * columns
    x, lengths = model.sample(facts["steps"], n, y, args.temperature, args.z_temperature)
    x = x[: lengths.max()].transpose(0, 1).cpu()
    title = KINDS[facts["kind"]].title
    return Picture("samples", title, x, lengths.tolist(), n * [0], names, columns * [""])


def completions(model, facts, args, valid):
    """Halves of sequences, seven completions of each, and the truth.

    One row per class that the validation part has, or else its first eight sequences.
    """
    rows = []  # name, number of the sequence
    for name in args.classes or facts["classes"]:
        found = (valid.y == facts["classes"].index(name)).nonzero()
        if len(found):
            rows.append((name, found[0].item()))
    if not rows:
        for i in range(min(8, len(valid.lengths))):
            rows.append((str(i + 1), i))

    sequences = []
    seen = []
    for _, i in rows:
        index = torch.tensor([i])
        x, length, y, _ = valid.batch(index.to(valid.frames.device), index)
        truth = x[:length]  # (T, 1, D)
        half = len(truth) // 2
        given = truth[:half].expand(-1, 7, -1)
        if y is not None:
            y = y.expand(7)
        steps = max(facts["steps"], len(truth))
        ways, ends = model.sample(steps, 7, y, args.temperature, args.z_temperature, given=given)
        sequences.append(truth[:half, 0])
        for way, end in zip(ways.unbind(1), ends.tolist(), strict=True):
            sequences.append(way[:end])
        sequences.append(truth[:, 0])
        seen += 9 * [half]
    return Picture(
        name="completions",
        title="observed halves of sequences, seven completions by the model, and the truth",
        x=nn.utils.rnn.pad_sequence(sequences, batch_first=True).cpu(),
        lengths=[len(x) for x in sequences],
        seen=seen,
        row_names=[name for name, _ in rows],
        column_names=["observed", "1", "2", "3", "4", "5", "6", "7", "truth"],
    )


def draw_rows(picture, facts, folder):
    """Images, as x (B, H, W) are their rows; what is missing of them is grey."""
    import common

    missing = torch.arange(facts["steps"])[:, None] >= torch.tensor(picture.lengths)  # (H, B)
    images = torch.where(missing.T[:, :, None], 0.3, picture.x)
    common.save_grid(
        folder / f"{picture.name}.png",
        images[:, None].unflatten(0, (len(picture.row_names), -1)),  # (rows, columns, 1, H, W)
        picture.title,
        picture.row_names,
        picture.column_names,
    )


def draw_pen(picture, facts, folder):
    """Drawings, all in one size; what was given is black, its completion blue."""
    from matplotlib.figure import Figure

    names = picture.row_names
    columns = len(picture.column_names)
    figure = Figure((max(8, columns), len(names) + 0.4), layout="constrained")
    ax = figure.subplots()
    for i, (n, seen) in enumerate(zip(picture.lengths, picture.seen, strict=True)):
        row, column = divmod(i, columns)
        points = picture.x[i, :n, :2].cumsum(0)
        if n:
            points = points - (points.amax(0) + points.amin(0)) / 2
        points = 0.4 * points / points.abs().max().clamp(min=1e-9)
        points = points + torch.tensor([column, -row])
        ends = picture.x[i, :n, 2].nonzero().flatten() + 1
        draw_strokes(ax, points.tensor_split(ends), "tab:blue" if seen else "black")
        draw_strokes(ax, points[:seen].tensor_split(ends[ends < seen]), "black")
    ax.set_title(picture.title)
    ax.set(aspect="equal", xlim=(-0.5, columns - 0.5), ylim=(0.5 - len(names), 0.5))
    ax.xaxis.tick_top()
    ax.set_xticks(range(columns), picture.column_names)
    ax.set_yticks([-row for row in range(len(names))], names, parse_math=False)
    ax.tick_params(length=0)
    ax.set_frame_on(False)
    figure.savefig(folder / f"{picture.name}.png", dpi=120)


def draw_strokes(ax, strokes, colour):
    for stroke in strokes:
        ax.plot(*stroke.T, color=colour, linewidth=1)
        if len(stroke) == 1:
            ax.plot(*stroke.T, ".", color=colour, markersize=3)


def draw_series(picture, facts, folder):
    """Lines in the units of the data, for at most four dimensions."""
    x = picture.x * torch.tensor(facts["scale"], dtype=torch.float64)
    x = x + torch.tensor(facts["shift"], dtype=torch.float64)
    steps = x.shape[1]
    dims = min(4, x.shape[2])
    columns = len(picture.column_names)
    names = []
    for name in picture.row_names:
        for d in range(dims):
            names.append(f"{name} x{d + 1}".strip())
    title = picture.title
    if dims < x.shape[2]:
        title += f" (4 of {x.shape[2]} dimensions)"
    figure, axes = time_axes(picture, names, title, steps, "steps", "")
    for i, (n, seen) in enumerate(zip(picture.lengths, picture.seen, strict=True)):
        row, column = divmod(i, columns)
        t = column * steps + torch.arange(n)
        for d in range(dims):
            ax = axes[row * dims + d]
            line = x[i, :n, d]
            ax.plot(t, line, ".-", color="tab:blue" if seen else "black", markersize=2, linewidth=1)
            ax.plot(t[:seen], line[:seen], ".-", color="black", markersize=2, linewidth=1)
    figure.savefig(folder / f"{picture.name}.png", dpi=120)


def draw_speech(picture, facts, folder):
    """Spectrograms, waveforms of samples, and sounds.

    sounds/CLASS_NUMBER.wav are samples, sounds/all.wav is the first of each row, and
    sounds/completions/CLASS_NUMBER.wav are completions, beside CLASS_observed and CLASS_truth.
    """
    rate = facts["rate"]
    columns = len(picture.column_names)
    names = picture.row_names
    x = picture.x.transpose(0, 1)
    size = x.shape[2]
    joined = torch.arange(1, len(x) + 1)[:, None] < torch.tensor(picture.lengths)  # (T, B)
    x = samples_of(x, joined) * (facts["scale"][0] / 2**15)
    x = x.transpose(0, 1).flatten(1)  # (B, samples), 1 is the full scale of a WAV file
    ends = []
    for i, n in enumerate(picture.lengths):
        end = n * size
        if picture.column_names[i % columns] == "observed":
            end -= size // 2  # what follows depends on the next frame, too
        x[i, max(0, end) :] = 0
        ends.append(max(0, end))
    peaks = x.abs().amax(1, keepdim=True).clamp(min=1e-9)
    loud = 0.5 * x / peaks

    # the sounds of a row are drawn side by side
    seconds = x.shape[1] / rate
    figure, axes = time_axes(picture, names, picture.title, seconds, "seconds", "frequency in Hz")
    for ax, row in zip(axes, loud.split(columns), strict=True):
        row = F.pad(row.flatten(), (128, 128))  # half a window, so that the first one is at 0 s
        row = row + 1e-4 * torch.randn(row.shape)  # as the picture shows logarithms
        span = (0, columns * seconds)
        ax.specgram(
            row, NFFT=256, Fs=rate, noverlap=192, xextent=span, cmap="magma", vmin=-90, vmax=-35
        )
    sounds = folder / "sounds"
    if picture.name == "completions":
        figure.savefig(folder / "completions.png", dpi=120)
        sounds = sounds / "completions"
    else:
        figure.savefig(folder / "spectrograms.png", dpi=120)
        figure, axes = time_axes(picture, names, picture.title, seconds, "seconds", "amplitude")
        for ax, row in zip(axes, x.split(columns), strict=True):
            row = row.flatten()
            ax.plot(torch.arange(len(row)) / rate, row, linewidth=0.4)
            ax.set(xlim=(0, len(row) / rate), ylim=(-peaks.max(), peaks.max()))
        figure.savefig(folder / "samples.png", dpi=120)

    # sounds, all at half of the full scale
    sounds.mkdir(parents=True, exist_ok=True)
    together = []
    for i, end in enumerate(ends):
        row, column = divmod(i, columns)
        sound = loud[i, :end]
        name = names[row] or "sample"
        number = names[:row].count(names[row]) * columns + column  # a class may have several rows
        number = picture.column_names[column] or number
        write_wav(sounds / f"{name}_{number}.wav", sound, rate)
        if column == 0:
            together += [sound, torch.zeros(rate // 5)]
    if picture.name == "samples":
        write_wav(sounds / "all.wav", torch.cat(together), rate)


def time_axes(picture, names, title, length, x_unit, y_unit):
    """A figure and one axis per name, for the sequences of a row side by side."""
    from matplotlib.figure import Figure

    figure = Figure((12, 1.2 * len(names) + 0.6), layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    columns = len(picture.column_names)
    half = round(length / 2, 1)
    ticks = []
    for i in range(columns):
        ticks += [i * length, i * length + half]
    axes[-1].set_xticks(ticks, ["0", f"{half:g}"] * columns)
    top = axes[0].secondary_xaxis("top")
    top.set_xticks([(i + 0.5) * length for i in range(columns)], picture.column_names)
    top.tick_params(length=0)
    for ax, name in zip(axes, names, strict=True):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=9, parse_math=False)
        ax.locator_params(axis="y", nbins=3)
    figure.suptitle(title)
    figure.supxlabel(x_unit)
    figure.supylabel(y_unit)
    return figure, axes


def write_wav(path, x, rate):
    """A WAV file of samples x (n,) in [-1, 1]: mono, 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", None))
        file.writeframes((32767 * x).to(torch.int16).numpy().tobytes())


# ---------------------------------------------------------------------------
# training


@dataclass
class Kind:
    """A kind of sequences: its part of the model, its functions, and its defaults of flags."""

    likelihood: str
    vary: Callable
    prepare: Callable
    draw: Callable
    title: str
    mixtures: int
    epochs: int
    batch_size: int
    lr: float


KINDS = {
    "rows": Kind(
        likelihood="bernoulli",
        vary=as_they_are,
        prepare=prepare_rows,
        draw=draw_rows,
        title="drawn by the model, row by row",
        mixtures=1,
        epochs=7,
        batch_size=128,
        lr=4e-3,
    ),
    "pen": Kind(
        likelihood="pen",
        vary=vary_pen,
        prepare=prepare_pen,
        draw=draw_pen,
        title="written by the model",
        mixtures=20,
        epochs=30,
        batch_size=48,
        lr=2e-3,
    ),
    "speech": Kind(
        likelihood="gaussian",
        vary=as_they_are,
        prepare=prepare_speech,
        draw=draw_speech,
        title="spoken by the model",
        mixtures=8,
        epochs=80,
        batch_size=32,
        lr=4e-3,
    ),
    "series": Kind(
        likelihood="gaussian",
        vary=as_they_are,
        prepare=prepare_series,
        draw=draw_series,
        title="series drawn by the model",
        mixtures=5,
        epochs=100,
        batch_size=8,
        lr=2e-3,
    ),
}
# drawings whose points need not be at equal intervals of time
KINDS["drawings"] = replace(KINDS["pen"], vary=stretch_pen)
READERS = {
    "pendigits": ("pen", read_pendigits),
    "ndjson": ("drawings", read_ndjson),
    "speech": ("speech", read_speech),
    "wav": ("speech", read_wav),
    "arrays": ("series", read_arrays),
}


def load_rows(args):
    """The rows of images: three Sequences, names of classes, and the data set that was read."""
    import common

    images = common.load_images(args)
    parts = []
    for x, y in (images.train, images.valid, images.test):
        lengths = torch.full((len(x),), x.shape[2])
        parts.append(Sequences(x.flatten(0, 2), lengths, y))
    return parts, images.classes, images.dataset


def load_sequences(args, checkpoint, kind, read):
    """What a reader yields: three Sequences, names of classes, and shift and scale of values.

    Of the values, shift is subtracted, then they are divided by scale.
    """
    import common

    parts = [[], [], []]
    for part, x, label in read(args):
        if not args.conditional:
            label = ""
        label = label.encode(errors="replace").decode()  # a folder's name may be no UTF-8
        parts[part].append((x, label))
    classes = sorted({label for _, label in parts[0]})
    if args.conditional and "" in classes:
        common.fail(f"{args.data_dir}: --conditional needs a label for every sequence")
    sequences = []
    for name, part in zip(("train", "validate", "test"), parts, strict=True):
        known = [(x, label) for x, label in part if label in classes]
        if len(known) < len(part):
            print(f"left out: {len(part) - len(known)} to {name}, of classes with none to train on")
        if args.dry_run:
            known = known[: args.batch_size]
        if not known:
            common.fail(f"{args.data_dir}: too few sequences, there are none to {name}")
        frames = torch.cat([x for x, _ in known])
        if checkpoint:
            shift = checkpoint["shift"]
            scale = checkpoint["scale"]
        elif name == "train":
            shift, scale = shift_and_scale(frames, kind)
        # in float64, as values may be large beside their differences
        frames = frames - torch.tensor(shift, dtype=torch.float64)
        frames = frames / torch.tensor(scale, dtype=torch.float64)
        lengths = torch.tensor([len(x) for x, _ in known])
        y = torch.tensor([classes.index(label) for _, label in known], device=args.device)
        sequences.append(Sequences(frames.float().to(args.device), lengths, y))
    return sequences, classes, shift, scale


def shift_and_scale(frames, kind):
    """Lists of shifts and scales of training frames (n, D), one for each dimension or one for all.

    Series get mean 0 and variance 1 in each dimension; pen strokes and speech are divided by their
    root mean square.
    """
    frames = frames.double()
    likelihood = KINDS[kind].likelihood
    if kind == "series":
        shift = frames.mean(0)
        scale = frames.std(0, correction=0)
        scale = torch.where(scale > 1e-12 * shift.abs(), scale, 1.0)  # constants
    else:
        shift = torch.zeros(1)
        columns = 2 if likelihood == "pen" else frames.shape[1]
        scale = frames[:, :columns].square().mean().sqrt()[None]
        scale = torch.where(scale > 0, scale, 1.0)
        if likelihood == "pen":
            scale = torch.cat([scale, scale, torch.ones(1)])  # pen-up stays 0 or 1
    # rounded, so that they are the same on all machines
    return shift.tolist(), [float(f"{value:.6g}") for value in scale.tolist()]


def load_data(args, checkpoint):
    """train, valid and test, each a Sequences, and a dictionary of facts for checkpoints.

    Values are divided by scale after shift was subtracted; rate is in samples per second; steps is
    the largest length.
    """
    kind, read = READERS.get(args.dataset, ("rows", None))
    dataset = args.dataset
    shift = [0.0]
    scale = [1.0]
    if kind == "rows":
        parts, classes, dataset = load_rows(args)
    else:
        parts, classes, shift, scale = load_sequences(args, checkpoint, kind, read)
    if not args.conditional:
        classes = []
        for part in parts:
            part.y = None
    train, valid, test = parts
    facts = {
        "script": "vrnn",
        "dataset": dataset,
        "classes": classes,
        "examples": [len(part.cpu_lengths) for part in parts],
        "kind": kind,
        "shift": shift,
        "scale": scale,
        "rate": 8000,
        "steps": int(train.cpu_lengths.max()),
    }
    return train, valid, test, facts


def evaluate(model, part, samples=1):
    """`common.evaluate` of prepared Sequences."""
    import common

    def terms(index, k):
        x, lengths, y, _ = part.batch(index, index.cpu())
        return model(x, lengths, y, k=k)

    order = part.lengths.argsort()
    # about 5000 steps in memory, or 32 sequences
    at_once = max(32, 5000 // int(part.cpu_lengths.max()))
    return common.evaluate(terms, order, samples=samples, at_once=at_once)


def flags(dataset="auto"):
    """The flags of this script, with the defaults for a data set."""
    import common

    kind, _ = READERS.get(dataset, ("rows", None))
    p = common.parser(
        "vrnn",
        __doc__,
        epochs=KINDS[kind].epochs,
        batch_size=KINDS[kind].batch_size,
        lr=KINDS[kind].lr,
        test_samples=10,
        datasets=READERS,
    )
    add = p.add_argument
    add(
        "--z-dim",
        type=common.at_least(0),
        default=48,
        help="size of the latent variables of a step; 0 makes it an RNN (default: %(default)s)",
    )
    add(
        "--hidden",
        type=common.at_least(1),
        default=384,
        help="units of the GRU (default: %(default)s)",
    )
    add(
        "--prior",
        choices=("learned", "standard"),
        default="learned",
        help="prior of z_t: learned from earlier steps, or N(0, I) (default: %(default)s)",
    )
    add(
        "--mixtures",
        type=common.at_least(1),
        default=KINDS[kind].mixtures,
        help="Gaussians in the mixture of pen strokes or speech (default: %(default)s)",
    )
    add("--conditional", action="store_true", help="model sequences given their labels")
    add(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="labels to draw with --conditional (default: all of them)",
    )
    add(
        "--temperature",
        type=common.at_least(1e-6, float),
        default=1.0,
        help="scale of the noise of x_t in pictures (default: %(default)s)",
    )
    add(
        "--z-temperature",
        type=common.at_least(0, float),
        default=1.0,
        help="scale of the noise of z_t in pictures (default: %(default)s)",
    )
    return p


def main(argv=None):
    import common  # here, so that the model can be copied without it

    # flags, data, or only samples of a trained model
    p = flags(common.peek(argv, "--dataset"))
    args, checkpoint = common.parse(p, argv)
    if checkpoint and "shift" not in checkpoint:  # its speech is in another transform
        common.fail(f"--resume {args.resume}: of an earlier version of vrnn.py; train anew")
    if args.sample:
        facts = checkpoint
    else:
        train, valid, test, facts = load_data(args, checkpoint)
    for name in args.classes or []:
        if not facts["classes"]:
            p.error("--classes needs --conditional")
        if name not in facts["classes"]:
            p.error(f"--classes {name}: must be among {', '.join(facts['classes'])}")
    if args.sample:
        model, folder = common.load_model(VRNN, args, checkpoint)
        draw_pictures(model, facts, args, folder)
        return

    # model and optimiser
    kind = KINDS[facts["kind"]]
    scale = torch.tensor(facts["scale"], device=args.device)
    # sequences that all have one length need not learn when they end
    stop = bool(train.cpu_lengths.min() < train.cpu_lengths.max())
    if checkpoint:
        stop = checkpoint["model_args"]["stop"]
    model_args = {
        "x_dim": train.frames.shape[1],
        "z_dim": args.z_dim,
        "likelihood": kind.likelihood,
        "prior": args.prior,
        "num_classes": len(facts["classes"]),
        "stop": stop,
        "mixtures": args.mixtures,
        "hidden": args.hidden,
    }
    facts["args"] = vars(args)
    facts["model_args"] = model_args
    model = VRNN(**model_args).to(args.device)
    average = common.averaged(model)
    best = copy.deepcopy(average.module)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    # what a checkpoint holds; its "model" is the one with the best validation
    parts = {"weights": model, "average": average, "optimizer": optimizer, "model": best}
    folder, rows = common.begin(args, checkpoint, facts, parts)
    valid.frames = kind.prepare(valid.frames, scale, valid.joined, seed=1)

    # training
    for epoch in range(len(rows), args.epochs):
        began = time.time()
        steps = []
        order = common.epoch_order(args, epoch, len(train.cpu_lengths), train.cpu_lengths)
        for x, lengths, y, joined in train.batches(order, f"epoch {epoch + 1}, step"):
            x, lengths = kind.vary(x, lengths, scale)
            log_px, kl, _ = model(kind.prepare(x, scale, joined), lengths, y)
            loss = (kl - log_px).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model)  # under torchrun
            norm = nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            average.update_parameters(model)
            steps.append(common.means(neg_elbo=loss, rec=-log_px, kl=kl, grad_norm=norm))

        # validation, and the checkpoint
        figures = evaluate(average.module, valid)
        is_best = common.end_epoch(args, rows, began, steps, figures)
        if is_best:
            best.load_state_dict(average.module.state_dict())
            draw_pictures(best, facts, args, folder)
        common.save(folder, facts, rows, parts)

    # test and pictures
    test.frames = kind.prepare(test.frames, scale, test.joined, seed=2)
    figures = evaluate(best, test, samples=args.test_samples)
    draw_pictures(best, facts, args, folder, valid)
    common.finish(args, folder, facts, rows, best, figures)


if __name__ == "__main__":
    import common

    common.start(main)
