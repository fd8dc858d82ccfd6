# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""DRAW (Gregor et al. 2015, "DRAW: A Recurrent Neural Network For Image Generation").

    inference    x_hat_t = x - sigmoid(c_{t-1})                                             (eq. 3)
                 r_t = read(x, x_hat_t, h_dec_{t-1})                                             (4)
                 h_enc_t = LSTM([r_t, h_dec_{t-1}], h_enc_{t-1})                                 (5)
                 q(z_t|x, z_{<t}) = N(mu(h_enc_t), diag sigma(h_enc_t)^2)                     (1, 2)
    generation   z_t ~ N(0, I)                                                                  (13)
                 h_dec_t = LSTM(z_t, h_dec_{t-1})                                            (7, 14)
                 c_t = c_{t-1} + write(h_dec_t)                                              (8, 15)
                 x|z ~ Bernoulli(sigmoid(c_T))                                                  (16)
    bound        log p(x) >= E_q[log p(x|z) - sum_t KL(q(z_t|x, z_{<t}) || p(z_t))]           (9-12)

With a learned prior (as in Chung et al. 2015), p(z_t) becomes
p(z_t|z_{<t}) = N(mu_p(h_dec_{t-1}), diag sigma_p(h_dec_{t-1})^2), in generation and in the bound.

    python draw.py                                               # with the learned prior
    python draw.py --prior standard                              # z_t ~ N(0, I), as in the paper
    python draw.py --glimpses 64 --read-size 2 --write-size 5    # the paper's sizes
    python draw.py --resume out/draw-1 --sample 8                # draw only, without data

Measured on MNIST, seed 0, --test-samples 10: test -ELBO 83.55 nats after the 40 epochs; after 47,
in pieces, 83.17; with --prior standard --epochs 17, 86.63. The paper has 80.97, on pixels that were
binarised only once.

Deviations from the paper. For faster learning: a learned prior; fewer glimpses in the first epochs
(two epochs each of 4, 8, ...); reading windows of 5x5; averaged weights; windows that are at first
as large as the image, a canvas that main() starts at the mean image; other initial weights. Pixels
are binarised anew at every use. Log variances, strides, gains and gradients are limited.
"""

import argparse
import copy
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------
# attention (section 3.2)


def filterbank(params, n, height, width):
    """n x n Gaussian filters on an image, placed by params (B, 5).

    Returns F_y (B, n, height) and F_x (B, n, width), whose rows sum to 1, and gamma (B, 1).
    """
    g_x, g_y, log_var, log_delta, log_gamma = params.unbind(1)  # eq. 21
    g_x = (width + 1) / 2 * (g_x + 1)  # eq. 22
    g_y = (height + 1) / 2 * (g_y + 1)  # eq. 23
    delta = (max(height, width) - 1) / max(n - 1, 1) * log_delta.clamp(-8, 4).exp()  # eq. 24
    gamma = log_gamma.clamp(-8, 8).exp()[:, None]

    # centres of the filters; the paper's i - N/2 - 0.5 counts from 1
    i = torch.arange(n, device=params.device) - (n - 1) / 2
    mu_x = g_x[:, None] + i * delta[:, None]  # eq. 19
    mu_y = g_y[:, None] + i * delta[:, None]  # eq. 20

    # exp(-(a - mu)^2 / (2 sigma^2)) / Z is a softmax, finite even where all exponentials vanish
    a = torch.arange(1, width + 1, device=params.device)
    b = torch.arange(1, height + 1, device=params.device)
    precision = (-log_var.clamp(-8, 8)).exp()[:, None, None]
    F_x = (-0.5 * precision * (a - mu_x[:, :, None]) ** 2).softmax(2)  # eq. 25
    F_y = (-0.5 * precision * (b - mu_y[:, :, None]) ** 2).softmax(2)  # eq. 26
    return F_y, F_x, gamma


def tiled_window(n, side):
    """Parameters (eq. 21) of a window in the middle, of n filters per side that tile an image.

    The filters are delta = side / n apart, and sigma is delta / 2. log_delta follows from eq. 24.
    """
    delta = side / n
    log_delta = math.log(delta * max(n - 1, 1) / max(side - 1, 1))
    log_var = 2 * math.log(delta / 2)
    return torch.tensor([0.0, 0.0, log_var, log_delta, 0.0])


# ---------------------------------------------------------------------------
# the model


class DRAW(nn.Module):
    """Gregor et al. 2015.

    shape: (C, H, W) of the images. glimpses: time steps T. read_size, write_size: filters per side
    of the windows. attention=False reads and writes whole images. prior: "learned", or "standard"
    for z_t ~ N(0, I). z_dim: size of z_t. hidden: units of each LSTM. Raises ValueError for another
    prior. All time steps share their weights: `glimpses` may be changed at any time.
    """

    def __init__(
        self,
        shape=(1, 28, 28),
        glimpses=32,
        read_size=5,
        write_size=5,
        attention=True,
        prior="learned",
        z_dim=100,
        hidden=256,
    ):
        super().__init__()
        if prior not in ("standard", "learned"):
            raise ValueError(f'prior is "standard" or "learned", not {prior!r}')
        channels, height, width = shape
        self.shape = tuple(shape)
        self.glimpses = glimpses
        self.read_size = read_size
        self.write_size = write_size
        self.attention = attention
        reads = 2 * channels * height * width
        writes = channels * height * width
        if attention:
            reads = 2 * channels * read_size**2
            writes = channels * write_size**2
        self.encoder = nn.LSTMCell(reads + hidden, hidden)
        self.posterior = nn.Linear(hidden, 2 * z_dim)
        self.decoder = nn.LSTMCell(z_dim, hidden)
        self.patch = nn.Linear(hidden, writes)
        if attention:
            self.read_window = nn.Linear(hidden, 5)
            self.write_window = nn.Linear(hidden, 5)
        self.h_0 = nn.Parameter(torch.zeros(4, 1, hidden))  # h_enc, cell_enc, h_dec, cell_dec
        self.c_0 = nn.Parameter(torch.full(self.shape, -2.0))  # dark
        self.prior = nn.Linear(hidden, 2 * z_dim)
        if prior == "standard":
            self.prior.requires_grad_(False)  # it stays at its initial value, N(0, I)

        # initial values for a fast start: weights of r scaled by its size, open forget gates (the
        # second of i, f, g, o), a prior N(0, I), windows over the whole image
        nn.init.normal_(self.encoder.weight_ih[:, :reads], std=reads**-0.5)
        nn.init.ones_(self.encoder.bias_ih[hidden : 2 * hidden])
        nn.init.ones_(self.decoder.bias_ih[hidden : 2 * hidden])
        nn.init.zeros_(self.prior.weight)
        nn.init.zeros_(self.prior.bias)
        if attention:
            self.read_window.bias.data = tiled_window(read_size, max(height, width))
            self.write_window.bias.data = tiled_window(write_size, max(height, width))

    def read(self, x, x_hat, h_dec):
        """The glimpse r (B, .) of image and error image, both (B, C, H, W)."""
        images = torch.cat([x, x_hat], 1)
        if not self.attention:
            return images.flatten(1)  # eq. 17
        F_y, F_x, gamma = filterbank(self.read_window(h_dec), self.read_size, *self.shape[1:])
        glimpse = F_y[:, None] @ images @ F_x[:, None].mT  # (B, 2C, N, N)
        return gamma * glimpse.flatten(1)  # eq. 27

    def write(self, h_dec):
        """What is added to the canvas, (B, C, H, W)."""
        w = self.patch(h_dec)  # eq. 28
        if not self.attention:
            return w.view(-1, *self.shape)  # eq. 18
        F_y, F_x, gamma = filterbank(self.write_window(h_dec), self.write_size, *self.shape[1:])
        w = (w / gamma).view(len(w), -1, self.write_size, self.write_size)  # (B, C, N, N)
        return F_y[:, None].mT @ w @ F_x[:, None]  # eq. 29

    def start(self, n):
        """h_enc, its cell, h_dec, its cell, each (n, hidden), and the canvas c_0 (n, C, H, W)."""
        h_enc, cell_enc, h_dec, cell_dec = self.h_0.expand(-1, n, -1)
        return h_enc, cell_enc, h_dec, cell_dec, self.c_0.expand(n, -1, -1, -1)

    def step(self, x, state):
        """One time step: the new state, KL(q(z_t|.) || p(z_t|.)), log(p(z_t|.) / q(z_t|.))."""
        h_enc, cell_enc, h_dec, cell_dec, canvas = state
        x_hat = x - canvas.sigmoid()  # eq. 3
        r = self.read(x, x_hat, h_dec)  # eq. 4
        h_enc, cell_enc = self.encoder(torch.cat([r, h_dec], 1), (h_enc, cell_enc))  # eq. 5
        # .to(x.dtype): also under autocast, the KL is computed in float32
        mu, logvar = self.posterior(h_enc).to(x.dtype).chunk(2, 1)  # eqs. 1, 2
        logvar = logvar.clamp(-14, 14)
        mu_p, logvar_p = self.prior(h_dec).to(x.dtype).chunk(2, 1)
        logvar_p = logvar_p.clamp(-14, 14)
        eps = torch.randn_like(mu)
        z = mu + (0.5 * logvar).exp() * eps  # eq. 6
        h_dec, cell_dec = self.decoder(z, (h_dec, cell_dec))  # eq. 7
        canvas = canvas + self.write(h_dec)  # eq. 8

        # the KL in closed form (eq. 11, for any Gaussian prior), and log p - log q of the sampled
        # z_t, where -log(2 pi) / 2 of both is left out, as it cancels
        var_p = logvar_p.exp()
        kl = 0.5 * (((mu - mu_p) ** 2 + logvar.exp()) / var_p - 1 - logvar + logvar_p).sum(1)
        log_q = -0.5 * (eps**2 + logvar)
        log_p = -0.5 * ((z - mu_p) ** 2 / var_p + logvar_p)
        return (h_enc, cell_enc, h_dec, cell_dec, canvas), kl, (log_p - log_q).sum(1)

    def forward(self, x, k=None):
        """The terms of the bound for images x (B, C, H, W) in [0, 1].

        Returns log p(x|z), KL(q || p) and log(p(x, z) / q(z|x)) in nats, (B,), or (k, B) for k
        samples of z. Raises ValueError for images of another shape or, on a CPU, out of [0, 1].
        """
        self.check(x, k)
        if k is not None:  # k copies of the batch, as one larger batch
            log_px, kl, log_w = self(x.repeat(k, 1, 1, 1))
            return log_px.view(k, -1), kl.view(k, -1), log_w.view(k, -1)
        state = self.start(len(x))
        kl = log_ratio = 0.0
        for _ in range(self.glimpses):
            state, kl_t, log_ratio_t = self.step(x, state)
            kl = kl + kl_t  # eq. 10
            log_ratio = log_ratio + log_ratio_t
        canvas = state[-1]
        log_px = (x * canvas + F.logsigmoid(-canvas)).sum((1, 2, 3))  # eq. 9
        return log_px, kl, log_px + log_ratio

    def check(self, x, k):
        """Raise ValueError for inputs that would give wrong numbers."""
        if k is not None and k < 1:
            raise ValueError(f"k is None or at least 1, not {k}")
        if x.shape[1:] != self.shape or not x.is_floating_point():
            raise ValueError(f"x are floats (B, *{self.shape}), not {x.dtype} {tuple(x.shape)}")
        # on a GPU, looking at values would interrupt it
        if x.device.type == "cpu" and not ((x >= 0) & (x <= 1)).all():
            raise ValueError("the pixels of x are in [0, 1]; divide 0..255 by 255")

    @torch.no_grad()
    def sample(self, n, temperature=1.0, with_windows=False):
        """n images: the canvas after every step, (T, n, C, H, W).

        Its values are the probabilities of the pixels to be 1. temperature scales sigma of z_t
        after the first step. with_windows adds a list of the write windows' parameters (n, 5), one
        per step; it is empty without attention.
        """
        _, _, h_dec, cell_dec, canvas = self.start(n)
        canvases = []
        windows = []
        for t in range(self.glimpses):
            mu_p, logvar_p = self.prior(h_dec).chunk(2, 1)
            sigma = (0.5 * logvar_p.clamp(-14, 14)).exp()
            if t > 0:  # after the first step
                sigma = temperature * sigma
            z = mu_p + sigma * torch.randn_like(mu_p)  # eq. 13
            h_dec, cell_dec = self.decoder(z, (h_dec, cell_dec))  # eq. 14
            canvas = canvas + self.write(h_dec)  # eq. 15
            canvases.append(canvas.sigmoid())  # eq. 16
            if self.attention:
                windows.append(self.write_window(h_dec))
        canvases = torch.stack(canvases)
        if with_windows:
            return canvases, windows
        return canvases


# ---------------------------------------------------------------------------
# pictures


def draw_pictures(model, n, temperature, folder):
    """samples.png: one row per sample, one column per time step; drawing.gif: n images at once."""
    import common

    canvases, windows = model.sample(n, temperature, with_windows=True)
    steps = torch.linspace(1, len(canvases), min(10, len(canvases))).long()
    grid = canvases[steps - 1][:, :10].transpose(0, 1)  # (samples, steps, C, H, W)
    columns = [f"t = {t}" for t in steps.tolist()]
    title = "drawn by the model: one row per sample, t is the time step"
    common.save_grid(folder / "samples.png", grid, title, column_names=columns)
    common.save_animation(folder / "drawing.gif", canvases, windows)


# ---------------------------------------------------------------------------
# training


def flags():
    """The flags of this script."""
    import common

    p = common.parser("draw", __doc__, epochs=40, batch_size=64, lr=2e-3, test_samples=10)
    add = p.add_argument
    count = common.at_least(1)
    add("--glimpses", type=count, default=32, help="time steps (default: %(default)s)")
    add(
        "--read-size",
        type=count,
        default=5,
        help="filters per side of the reading window (default: %(default)s)",
    )
    add(
        "--write-size",
        type=count,
        default=5,
        help="filters per side of the writing window (default: %(default)s)",
    )
    add(
        "--attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read and write through windows, or whole images (default: --attention)",
    )
    add(
        "--prior",
        choices=("standard", "learned"),
        default="learned",
        help="prior of z_t: N(0, I), or learned from earlier steps (default: %(default)s)",
    )
    add("--z-dim", type=count, default=100, help="size of z_t (default: %(default)s)")
    add("--hidden", type=count, default=256, help="units of each LSTM (default: %(default)s)")
    add(
        "--binarise",
        choices=("dynamic", "fixed"),
        default="dynamic",
        help="draw black or white training pixels anew at each use, or once (default: %(default)s)",
    )
    add(
        "--temperature",
        type=common.at_least(0, float),
        default=1.0,
        help="scale of sigma of z_t in pictures, after the first step; at 0 every further z_t is "
        "the mean of its prior (default: %(default)s)",
    )
    add("--compile", action="store_true", help="compile the time step: a slower start, then faster")
    return p


def main(argv=None):
    import common  # here, so that the model can be copied without it

    # flags; with --sample, pictures of a trained model, and that's all
    args, checkpoint = common.parse(flags(), argv)
    if args.sample:
        model, folder = common.load_model(DRAW, args, checkpoint)
        draw_pictures(model, args.sample, args.temperature, folder)
        return

    # data
    data = common.load_images(args)
    if args.binarise == "fixed":
        x, y = data.train
        x = (255 * common.binarise(x, seed=0)).byte()  # which binarising again does not change
        data.train = (x, y)
    x_valid = common.binarise(data.valid[0], seed=1)

    # model and optimiser
    model_args = {
        "shape": data.shape,
        "glimpses": args.glimpses,
        "read_size": args.read_size,
        "write_size": args.write_size,
        "attention": args.attention,
        "prior": args.prior,
        "z_dim": args.z_dim,
        "hidden": args.hidden,
    }
    model = DRAW(**model_args).to(args.device)
    mean = data.train[0].float().mean(0) / 255
    model.c_0.data = mean.clamp(0.003, 0.997).logit()
    average = common.averaged(model)
    best = copy.deepcopy(average.module)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    # what a checkpoint holds; its "model" is the one with the best validation
    parts = {"weights": model, "average": average, "optimizer": optimizer, "model": best}
    facts = common.facts("draw", args, data, model_args)
    min_glimpses = 4
    # shipped weights start at epoch 0, but with all the glimpses that they were trained with
    if checkpoint:
        min_glimpses = checkpoint["model_args"]["glimpses"]
        best.glimpses = min_glimpses
        facts["model_args"]["glimpses"] = min_glimpses
    folder, rows = common.begin(args, checkpoint, facts, parts)
    if args.compile:
        model.step = torch.compile(model.step)

    def glimpses_in(epoch):
        """Fewer in the first epochs, which makes them faster."""
        return min(args.glimpses, max(min_glimpses, 4 * (1 + epoch // 2)))

    # training
    for epoch in range(len(rows), args.epochs):
        began = time.time()
        steps = []
        model.glimpses = glimpses_in(epoch)
        average.module.glimpses = model.glimpses
        for x, _ in common.batches(args, epoch, *data.train):
            log_px, kl, _ = model(common.binarise(x))
            loss = (kl - log_px).mean()  # eq. 12
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model)  # under torchrun
            norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            average.update_parameters(model)
            steps.append(common.means(neg_elbo=loss, rec=-log_px, kl=kl, grad_norm=norm))

        # validation, and the checkpoint
        valid = common.evaluate(average.module, x_valid, at_once=1024)
        # an epoch takes time in proportion to its glimpses, which counts for the time left
        is_best = common.end_epoch(args, rows, began, steps, valid, cost_of=glimpses_in)
        if is_best:
            best.load_state_dict(average.module.state_dict())
            best.glimpses = model.glimpses
            facts["model_args"]["glimpses"] = model.glimpses
            draw_pictures(best, 40, args.temperature, folder)
        common.save(folder, facts, rows, parts)

    # test and pictures
    x_test = common.binarise(data.test[0], seed=2)
    test = common.evaluate(best, x_test, samples=args.test_samples, at_once=1024)
    draw_pictures(best, 40, args.temperature, folder)
    common.finish(args, folder, facts, rows, best, test)


if __name__ == "__main__":
    import common

    common.start(main)
