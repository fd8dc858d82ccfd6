# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Variational auto-encoder (Kingma & Welling 2014, "Auto-Encoding Variational Bayes").

    generative model   z ~ N(0, I),   x | z ~ Bernoulli(sigmoid(f(z)))  or  N(f(z), sigma^2 I)
    inference model    q(z|x) = N(mu(x), diag sigma(x)^2)
    bound              log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))               (eqs. 3, 10)
    with --iw K        log p(x) >= E_q[log 1/K sum_k p(x, z_k) / q(z_k|x)]  (Burda et al. 2016, 8)
    --components K     p(z) = sum_k w_k N(m_k, diag s^2), learned; its KL is estimated at the sample

    python vae.py                             # MNIST, on the GPU if there is one
    python vae.py --components 500            # better, and nearly as fast
    python vae.py --channels 16 32            # residual convolutions: better, and slower
    python vae.py --resume out/vae-1 --sample 100

Measured on MNIST with --test-samples 1000, mean of seeds 0, 1, 2: test -ELBO 90.54 nats,
-log p(x) 87.14; with --components 500, 88.24 and 85.13.

Deviations from the paper: gated or residual layers, larger networks and Adam; gradients and log
variances are limited; the weights that are tested are averaged over training, up to the epoch with
the smallest validation -ELBO (also with --iw).
"""

import copy
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------
# networks


def linear(d_in, d_out):
    """A linear layer with weights of variance 1 / d_in, three times torch's: it learns faster."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=max(1, d_in) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(d_in, hidden, d_out):
    """Gated layers h = (A x + a) * sigmoid(B x + b), and a linear one."""
    layers = []
    for h in hidden:
        layers += [linear(d_in, 2 * h), nn.GLU()]
        d_in = h
    return nn.Sequential(*layers, linear(d_in, d_out))


class Residual(nn.Module):
    """x plus two 3x3 convolutions of x."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return x + self.body(x)


def conv_nets(shape, channels, z_dim):
    """Encoder (B, C * H * W) -> (B, 2 z_dim) and decoder (B, z_dim) -> (B, C * H * W)."""
    c, h, w = shape
    c1, c2 = channels  # at half and at quarter size
    h4, w4 = (h + 3) // 4, (w + 3) // 4
    flat = c2 * h4 * w4
    wide = 8 * c2
    enc = nn.Sequential(
        nn.Unflatten(1, shape),
        nn.ZeroPad2d((0, 4 * w4 - w, 0, 4 * h4 - h)),
        nn.Conv2d(c, c1, 5, stride=2, padding=2),
        Residual(c1),
        nn.SiLU(),
        nn.Conv2d(c1, c2, 3, stride=2, padding=1),
        Residual(c2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(flat, wide),
        nn.SiLU(),
        nn.Linear(wide, 2 * z_dim),
    )
    dec = nn.Sequential(
        nn.Linear(z_dim, wide),
        nn.SiLU(),
        nn.Linear(wide, flat),
        nn.Unflatten(1, (c2, h4, w4)),
        Residual(c2),
        nn.SiLU(),
        nn.Conv2d(c2, 4 * c1, 3, padding=1),
        nn.PixelShuffle(2),
        Residual(c1),
        nn.SiLU(),
        nn.Conv2d(c1, 4 * c, 5, padding=2),
        nn.PixelShuffle(2),
        nn.ZeroPad2d((0, w - 4 * w4, 0, h - 4 * h4)),
        nn.Flatten(),
    )
    return enc, dec


# ---------------------------------------------------------------------------
# the model


class VAE(nn.Module):
    """Kingma & Welling 2014.

    shape: (C, H, W) of the images. hidden: units of the gated layers. z_dim: size of z.
    likelihood: "bernoulli", or "gaussian" for N(f(z), sigma^2 I). channels: (at half size, at
    quarter size) of residual convolutions, which then replace the gated layers. components: of
    p(z); 1 is N(0, I), more are a mixture whose weights, means and common variances are learned.
    Raises ValueError for another likelihood.
    """

    def __init__(
        self,
        shape=(1, 28, 28),
        hidden=(300, 300),
        z_dim=40,
        likelihood="bernoulli",
        channels=None,
        sigma=1.0,
        components=1,
    ):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood is "bernoulli" or "gaussian", not {likelihood!r}')
        self.shape = tuple(shape)
        self.z_dim = z_dim
        self.likelihood = likelihood
        self.sigma = sigma
        self.components = components
        if components > 1:
            self.logits = nn.Parameter(torch.zeros(components))
            self.means = nn.Parameter(torch.randn(components, z_dim))  # in units of s
            self.log_std = nn.Parameter(torch.zeros(z_dim))
        if channels:
            self.enc, self.dec = conv_nets(self.shape, channels, z_dim)
        else:
            pixels = math.prod(self.shape)
            self.enc = mlp(pixels, hidden, 2 * z_dim)
            self.dec = mlp(z_dim, hidden[::-1], pixels)

    def encode(self, x):
        """mu, logvar (B, z_dim) of q(z|x); x (B, C, H, W)."""
        mu, logvar = self.enc(x.flatten(1)).to(x.dtype).chunk(2, dim=-1)
        return mu, logvar.clamp(-14, 14)

    def decode(self, z):
        """The means of p(x|z) as images: z (B, z_dim) -> (B, C, H, W)."""
        out = self.dec(z).to(z.dtype).view(-1, *self.shape)
        if self.likelihood == "bernoulli":
            return out.sigmoid()
        return out

    def log_prior(self, z):
        """log p(z) without -z_dim / 2 log 2 pi, (k, B); z (k, B, z_dim)."""
        if self.components == 1:
            return -0.5 * (z**2).sum(2)
        log_std = self.log_std.clamp(-7, 7)
        squares = torch.cdist(z / log_std.exp(), self.means) ** 2  # (k, B, components)
        log_weights = self.logits.log_softmax(0)
        return (log_weights - 0.5 * squares).logsumexp(2) - log_std.sum()

    def forward(self, x, k=None):
        """The terms of the bound for images x (B, C, H, W); Bernoulli ones are in [0, 1].

        Returns log p(x|z), KL(q || p) and log(p(x, z) / q(z|x)) in nats, (B,), or (k, B) for k
        samples of z. Raises ValueError for images of another shape or, on a CPU, out of [0, 1].
        """
        self.check(x, k)
        mu, logvar = self.encode(x)
        samples = 1 if k is None else k
        eps = torch.randn(samples, *mu.shape, dtype=mu.dtype, device=x.device)
        z = mu + (0.5 * logvar).exp() * eps  # (k, B, z_dim)
        out = self.dec(z.flatten(0, 1)).view(samples, len(x), -1)  # (k, B, pixels)
        x = x.flatten(1)
        if self.likelihood == "bernoulli":  # out are logits l, log sigmoid(l) = l + log sigmoid(-l)
            log_px = (x * out + F.logsigmoid(-out)).sum(-1)
        else:
            log_2_pi_var = math.log(2 * math.pi * self.sigma**2)
            log_px = -0.5 * (((x - out) / self.sigma) ** 2 + log_2_pi_var).sum(-1)
        log_q = -0.5 * (eps**2 + logvar).sum(-1)  # without -z_dim / 2 log 2 pi, as log_prior
        log_ratio = self.log_prior(z) - log_q  # log(p(z) / q(z|x))
        if self.components == 1:
            kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1).expand_as(log_px)  # appendix B
        else:
            kl = -log_ratio
        log_w = log_px + log_ratio
        if k is None:
            return log_px[0], kl[0], log_w[0]
        return log_px, kl, log_w

    def check(self, x, k):
        """Raise ValueError for inputs that would give wrong numbers."""
        if x.shape[1:] != self.shape or not x.is_floating_point():
            raise ValueError(f"x are floats (B, *{self.shape}), not {x.dtype} {tuple(x.shape)}")
        if k is not None and k < 1:
            raise ValueError(f"k is None or at least 1, not {k}")
        # on a GPU, looking at values would interrupt it
        bernoulli = self.likelihood == "bernoulli"
        if bernoulli and x.device.type == "cpu" and not ((x >= 0) & (x <= 1)).all():
            raise ValueError("the pixels of x are in [0, 1]; divide 0..255 by 255")

    @torch.no_grad()
    def sample(self, n):
        """n images from the prior, as means (n, C, H, W)."""
        z = torch.randn(n, self.z_dim).to(next(self.parameters()))
        if self.components > 1:
            weights = self.logits.softmax(0).cpu()
            which = torch.multinomial(weights, n, replacement=True)
            z = (self.means[which] + z) * self.log_std.clamp(-7, 7).exp()
        return self.decode(z)


# ---------------------------------------------------------------------------
# pictures


def draw_samples(model, n, folder):
    """samples.png: n images from the prior."""
    import common

    columns = min(n, 10)
    n = columns * (n // columns)
    images = model.sample(n)
    images = images.unflatten(0, (-1, columns))
    common.save_grid(folder / "samples.png", images, "drawn by the model, from noise")


@torch.no_grad()
def draw_pictures(model, x, y, folder):
    """Samples; of images x with labels y reconstructions, interpolations and the plane of z."""
    import common

    draw_samples(model, 100, folder)

    # reconstructions beside their originals
    mu, _ = model.encode(x[:40])
    pairs = torch.stack([x[:40], model.decode(mu)], 1)[: len(x) // 4 * 4]
    common.save_grid(
        folder / "reconstructions.png",
        pairs.reshape(-1, 8, *model.shape),
        "images, and what the model decodes from their z",
        column_names=["image", "decoded"] * 4,
    )

    # straight lines in the space of z, from one image to another
    weight = torch.linspace(0, 1, 10, device=x.device)[:, None]
    lines = []
    for a, b in zip(mu[:20:2], mu[1:20:2], strict=False):
        lines.append(model.decode(torch.lerp(a, b, weight)))
    common.save_grid(
        folder / "interpolation.png",
        torch.stack(lines),
        "decoded from z between that of one image (0) and another (1)",
        column_names=[f"{w:.2f}" for w in weight.flatten().tolist()],
    )
    if model.z_dim == 2:
        draw_plane(model, x, y, folder)


def draw_plane(model, x, y, folder):
    """manifold.png: images at points of the plane; places.png: where images x have their mean."""
    from matplotlib.figure import Figure

    import common

    if model.components == 1:  # figure 4 of the paper: at the quantiles of the Gaussian
        steps = torch.linspace(0.025, 0.975, 20, device=x.device)
        quantiles = torch.special.ndtri(steps)
        points = torch.cartesian_prod(-quantiles, quantiles).flip(1)
        names = [f"{q:.1f}" for q in quantiles.tolist()]
        images = model.decode(points).unflatten(0, (20, 20))
        title = "decoded from z: z_1 across, z_2 up"
        common.save_grid(folder / "manifold.png", images, title, names[::-1], names)
    places, _ = model.encode(x[:5000])
    figure = Figure((10, 9), layout="constrained")
    ax = figure.subplots()
    dots = ax.scatter(*places.T.cpu(), s=5, c=y[:5000].cpu(), cmap="tab10")
    ax.legend(*dots.legend_elements(num=None), title="label")
    ax.set(title="images by label: the mean of q(z|x)", xlabel="z_1", ylabel="z_2", aspect="equal")
    figure.savefig(folder / "places.png")


# ---------------------------------------------------------------------------
# training


def flags():
    """The flags of this script."""
    import common

    p = common.parser("vae", __doc__, epochs=60, batch_size=128, lr=1e-3, test_samples=100)
    add = p.add_argument
    count = common.at_least(1)
    add(
        "--hidden",
        type=count,
        nargs="+",
        default=[300, 300],
        help="units of the encoder's gated layers; the decoder's in reverse (default: 300 300)",
    )
    add(
        "--channels",
        type=count,
        nargs=2,
        metavar="N",
        help="use convolutions with N channels at half and N at quarter size (default: do not)",
    )
    add("--z-dim", type=count, default=40, help="size of z (default: %(default)s)")
    add(
        "--components",
        type=count,
        default=1,
        help="Gaussians in the learned prior of z; 1 is N(0, I) (default: %(default)s)",
    )
    add(
        "--likelihood",
        choices=("bernoulli", "gaussian"),
        default="bernoulli",
        help="bernoulli for black or white pixels, gaussian for grey (default: %(default)s)",
    )
    add(
        "--sigma",
        type=common.at_least(1e-6, float),
        default=1.0,
        help="standard deviation of a pixel with --likelihood gaussian (default: %(default)s)",
    )
    add(
        "--binarise",
        choices=("dynamic", "fixed"),
        default="dynamic",
        help="draw black or white training pixels anew at each use, or once (default: %(default)s)",
    )
    add(
        "--iw",
        type=count,
        default=1,
        metavar="K",
        help="train on the importance-weighted bound of K samples; 1 is the ELBO (default: 1)",
    )
    return p


def main(argv=None):
    import common  # here, so that the model can be copied without it

    # flags; with --sample, pictures of a trained model, and that's all
    p = flags()
    args, checkpoint = common.parse(p, argv)
    if args.sample:
        model, folder = common.load_model(VAE, args, checkpoint)
        draw_samples(model, args.sample, folder)
        return
    if args.likelihood == "gaussian" and args.binarise == "fixed":
        p.error("--binarise fixed is for --likelihood bernoulli: gaussian pixels are grey")

    # data
    data = common.load_images(args)
    if args.binarise == "fixed":
        x, y = data.train
        x = (255 * common.binarise(x, seed=0)).byte()  # which binarising again does not change
        data.train = (x, y)

    def pixels(x, seed=None):
        """Black or white for Bernoulli, which never sees grey; else grey in [0, 1]."""
        if args.likelihood == "bernoulli":
            return common.binarise(x, seed)
        return x / 255

    x_valid = pixels(data.valid[0], seed=1)

    # model and optimiser
    model_args = {
        "shape": data.shape,
        "hidden": args.hidden,
        "z_dim": args.z_dim,
        "likelihood": args.likelihood,
        "channels": args.channels,
        "sigma": args.sigma,
        "components": args.components,
    }
    model = VAE(**model_args).to(args.device, memory_format=torch.channels_last)
    average = common.averaged(model)
    best = copy.deepcopy(average.module)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    # what a checkpoint holds; its "model" is the one with the best validation
    parts = {"weights": model, "average": average, "optimizer": optimizer, "model": best}
    facts = common.facts("vae", args, data, model_args)
    folder, rows = common.begin(args, checkpoint, facts, parts)

    # training
    for epoch in range(len(rows), args.epochs):
        began = time.time()
        steps = []
        for x, _ in common.batches(args, epoch, *data.train):
            log_px, kl, log_w = model(pixels(x), args.iw)
            neg_elbo = kl - log_px
            loss = neg_elbo.mean()
            if args.iw > 1:
                loss = -common.log_mean_exp(log_w).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model)  # under torchrun
            norm = nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            average.update_parameters(model)
            steps.append(
                common.means(loss=loss, neg_elbo=neg_elbo, rec=-log_px, kl=kl, grad_norm=norm)
            )

        # validation, and the checkpoint
        valid = common.evaluate(average.module, x_valid)
        is_best = common.end_epoch(args, rows, began, steps, valid)
        if is_best:
            best.load_state_dict(average.module.state_dict())
            draw_pictures(best, x_valid, data.valid[1], folder)
        common.save(folder, facts, rows, parts)

    # test and pictures
    x_test = pixels(data.test[0], seed=2)
    test = common.evaluate(best, x_test, samples=args.test_samples)
    draw_pictures(best, x_test, data.test[1], folder)
    common.finish(args, folder, facts, rows, best, test)


if __name__ == "__main__":
    import common

    common.start(main)
