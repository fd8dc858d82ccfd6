"""Variational auto-encoder (Kingma & Welling 2014, "Auto-Encoding Variational Bayes").

    generative model   z ~ N(0, I),   x | z ~ Bernoulli(sigmoid(f(z)))   or   N(f(z), I)
    inference model    q(z|x) = N(mu(x), diag sigma(x)^2)
    bound              log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))                    (eq. 10)
    with --iw K        log p(x) >= E_q[log 1/K sum_k p(x, z_k) / q(z_k|x)]   (Burda et al. 2016, eq. 8)

    python vae.py                                  # MNIST, on the GPU if there is one
    python vae.py --net conv --hidden 16 32        # residual convolutions: better, and slower
    python vae.py --z-dim 2                        # draws the latent plane
    python vae.py --epochs 0 --resume out/vae/best.pt   # evaluate and sample only

Measured, MNIST, seed 0: `python vae.py` ends at a test -log p(x) of 86.99 nats (5,000 importance samples)
after 3 minutes of training and 4 of testing on two cores of a server CPU. More in the README.

Deviations from the paper: gated or residual layers instead of tanh, Adam instead of Adagrad, a
running average of the weights instead of a learning-rate schedule, larger networks.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """x + two 3x3 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
                                  nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Crop(nn.Module):
    """Cut images to (height, width): upsampling by 4 overshoots sizes that 4 does not divide."""

    def __init__(self, height, width):
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x):
        return x[..., :self.height, :self.width]


def linear(d_in, d_out):
    """A linear layer with weights of variance 1 / d_in; torch's default is a third of it, and learns slower here."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=max(1, d_in) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(d_in, hidden, d_out):
    """Gated layers h = (A x + a) * sigmoid(B x + b), then a linear one."""
    layers = []
    for h in hidden:
        layers += [linear(d_in, 2 * h), nn.GLU()]
        d_in = h
    return nn.Sequential(*layers, linear(d_in, d_out))


def conv_nets(shape, hidden, z_dim):
    """Encoder and decoder with hidden = (channels at half size, channels at quarter size)."""
    (c, h, w), (c1, c2) = shape, hidden
    h2, w2 = (h + 1) // 2, (w + 1) // 2
    h4, w4 = (h2 + 1) // 2, (w2 + 1) // 2
    flat, wide = c2 * h4 * w4, 8 * c2
    enc = nn.Sequential(
        nn.Unflatten(1, shape), nn.Conv2d(c, c1, 5, 2, 2), Residual(c1),
        nn.SiLU(), nn.Conv2d(c1, c2, 3, 2, 1), Residual(c2),
        nn.SiLU(), nn.Flatten(), nn.Linear(flat, wide), nn.SiLU(), nn.Linear(wide, 2 * z_dim))
    dec = nn.Sequential(
        nn.Linear(z_dim, wide), nn.SiLU(), nn.Linear(wide, flat), nn.Unflatten(1, (c2, h4, w4)),
        Residual(c2), nn.SiLU(), nn.Conv2d(c2, 4 * c1, 3, padding=1), nn.PixelShuffle(2),
        Residual(c1), nn.SiLU(), nn.Conv2d(c1, 4 * c, 5, padding=2), nn.PixelShuffle(2),
        Crop(h, w), nn.Flatten())
    return enc.to(memory_format=torch.channels_last), dec.to(memory_format=torch.channels_last)


def bernoulli_log_px(x, logits):
    """log Bernoulli(x; sigmoid(logits)), summed over the last dimension, in nats.

    That is x log sigmoid(l) + (1 - x) log sigmoid(-l), as log sigmoid(l) = l + log sigmoid(-l).
    """
    return (x * logits + F.logsigmoid(-logits)).sum(-1)


class VAE(nn.Module):
    """Kingma & Welling 2014.

    shape: (C, H, W) of the images. hidden: units of the gated layers ("mlp"), or the channels at
    half and at quarter size ("conv"). likelihood: "bernoulli" or "gaussian", the latter N(f(z), I).
    """

    def __init__(self, shape=(1, 28, 28), hidden=(300, 300), z_dim=40, likelihood="bernoulli", net="mlp"):
        super().__init__()
        self.shape, self.z_dim, self.likelihood = tuple(shape), z_dim, likelihood
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood is "bernoulli" or "gaussian", not {likelihood!r}')
        if net == "conv":
            self.enc, self.dec = conv_nets(self.shape, hidden, z_dim)
        else:
            d = math.prod(shape)
            self.enc, self.dec = mlp(d, hidden, 2 * z_dim), mlp(z_dim, hidden[::-1], d)

    def encode(self, x):
        """mu, logvar (B, z_dim) of q(z|x)."""
        mu, logvar = self.enc(x.flatten(1)).chunk(2, -1)
        return mu, logvar.clamp(-14, 14)

    def decode(self, z):
        """The means of p(x|z) as images: z (..., z_dim) -> (..., C, H, W)."""
        out = self.dec(z.flatten(0, -2)).view(*z.shape[:-1], *self.shape)
        return out.sigmoid() if self.likelihood == "bernoulli" else out

    def forward(self, x, k=None):
        """x (B, C, H, W) in [0, 1] -> log_px, kl, log_w in nats, each (B,), or (k, B) for k samples of z."""
        mu, logvar = self.encode(x)
        eps = torch.randn(k or 1, *mu.shape, device=x.device)
        z = mu + (0.5 * logvar).exp() * eps                                         # (k, B, z_dim)
        out = self.dec(z.flatten(0, 1)).view(*z.shape[:2], -1)
        if self.likelihood == "bernoulli":
            log_px = bernoulli_log_px(x.flatten(1), out)
        else:
            log_px = -0.5 * ((x.flatten(1) - out) ** 2 + math.log(2 * math.pi)).sum(-1)
        kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(-1).expand_as(log_px)  # appendix B
        log_w = log_px + 0.5 * (eps ** 2 + logvar - z ** 2).sum(-1)   # log p(x|z) p(z) / q(z|x)
        return (log_px, kl, log_w) if k else (log_px[0], kl[0], log_w[0])

    def sample(self, n):
        """n images from the prior, as means (n, C, H, W)."""
        return self.decode(torch.randn(n, self.z_dim, device=next(self.parameters()).device))


def main(argv=None):
    import common  # here, not above: the class needs torch alone and can be copied without it
    from torchvision.utils import save_image

    p = common.parser(__doc__, epochs=60, batch_size=128, lr=1e-3, test_samples=5000)
    p.add_argument("--net", choices=("mlp", "conv"), default="mlp", help="kind of encoder and decoder")
    p.add_argument("--hidden", type=common.at_least(1), nargs="+", default=[300, 300], metavar="N",
                   help="mlp: units of each layer; conv: channels at half and at quarter size")
    p.add_argument("--z-dim", type=common.at_least(1), default=40, help="size of z")
    p.add_argument("--likelihood", choices=("bernoulli", "gaussian"), default="bernoulli")
    p.add_argument("--iw", type=common.at_least(1), default=1, metavar="K",
                   help="train on the importance-weighted bound with K samples; 1 is the ELBO")
    args = common.parse(p, argv)
    if args.net == "conv" and len(args.hidden) != 2:
        p.error("--net conv takes two numbers of channels, such as --hidden 16 32")

    data = common.images(args)
    see = common.binarise if args.likelihood == "bernoulli" else common.grey
    model_args = dict(shape=data.shape, hidden=tuple(args.hidden), z_dim=args.z_dim,
                      likelihood=args.likelihood, net=args.net)
    model = VAE(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    net = common.compiled(model, args)

    x_valid = see(data.valid[0], seed=1)
    validate = lambda m: common.evaluate(lambda x, y, k: m(x, k), x_valid, data.valid[1])
    run = common.Run(args, model, model_args, optimizer, data.train, validate)
    for x, _ in run:
        log_px, kl, log_w = net(see(x), args.iw)
        if args.iw == 1:
            loss = (kl - log_px).mean()
        else:
            loss = -common.log_mean_exp(log_w).mean()
        run.log(loss, rec=-log_px, kl=kl)
        optimizer.zero_grad()
        loss.backward()
        run.share()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    model = run.best_model()
    x_test = see(data.test[0], seed=2)
    test = common.evaluate(lambda x, y, k: model(x, k), x_test, data.test[1], args.test_samples)
    run.finish(val=validate(model), test=test)

    with torch.inference_mode():
        torch.manual_seed(args.seed)
        save_image(model.sample(100).clamp(0, 1), run.dir / "samples.png", nrow=10, padding=1)
        x = x_test[:10]
        mu, _ = model.encode(x)
        pairs = torch.cat([x, model.decode(mu)]).clamp(0, 1)
        save_image(pairs, run.dir / "reconstructions.png", nrow=len(x), padding=1)
        mu, _ = model.encode(x_test[:16])
        steps = torch.linspace(0, 1, 12, device=mu.device)[:, None]
        half = len(mu) // 2
        lines = [a + steps * (b - a) for a, b in zip(mu[:half], mu[half:])]
        if lines:
            save_image(model.decode(torch.cat(lines)).clamp(0, 1), run.dir / "interpolation.png", nrow=12, padding=1)
        if args.z_dim == 2:  # figure 4 of the paper: the plane through the Gaussian's quantiles
            q = torch.special.ndtri(torch.linspace(0.025, 0.975, 20, device=mu.device))
            plane = torch.cartesian_prod(-q, q).flip(-1)
            save_image(model.decode(plane).clamp(0, 1), run.dir / "manifold.png", nrow=20, padding=1)


if __name__ == "__main__":
    main()
