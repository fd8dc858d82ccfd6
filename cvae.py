"""Conditional VAE (Sohn, Lee & Yan 2015): generate x given y, a label or part of the image.

    generative model   z | y ~ N(mu_p(y), diag sigma_p(y)^2),   x | y, z ~ Bernoulli(sigmoid(f(y, z)))
    inference model    q(z|x, y) = N(mu_q(x, y), diag sigma_q(x, y)^2)
    bound              log p(x|y) >= E_q[log p(x|y, z)] - KL(q(z|x, y) || p(z|y))            (eq. 4)

    python cvae.py                                      # y is the digit
    python cvae.py --condition quadrants --quadrants 1  # y is the lower left quarter of the image
    python cvae.py --condition quadrants --z-dim 0      # the deterministic baseline, no latents
    python cvae.py --epochs 0 --resume out/cvae/best.pt # evaluate and sample only

Measured, MNIST, seed 0, test -log p(x|y) by importance sampling: 82.65 nats given the label (1,000 samples);
60.13, 41.78 and 19.27 nats for the hidden pixels given 1, 2 and 3 quadrants (100 samples), after 7 to 10
minutes on one core of a server CPU. More in the README.

Deviations from the paper: gated or residual layers, Adam and a running average of the weights; no
hybrid objective with Gaussian stochastic networks; the importance samples for log p(x|y) come from
q(z|x, y), as the paper's "importance sampling" column has it.
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


def conv_encoder(shape, channels, d_out):
    """Images (B, C * H * W) -> (B, d_out), with channels = (at half size, at quarter size)."""
    (c, h, w), (c1, c2) = shape, channels
    flat = c2 * ((h + 3) // 4) * ((w + 3) // 4)
    net = nn.Sequential(
        nn.Unflatten(1, shape), nn.Conv2d(c, c1, 5, 2, 2), Residual(c1),
        nn.SiLU(), nn.Conv2d(c1, c2, 3, 2, 1), Residual(c2),
        nn.SiLU(), nn.Flatten(), nn.Linear(flat, d_out))
    return net.to(memory_format=torch.channels_last)


class ConvDecoder(nn.Module):
    """(B, d_in) -> logits (B, C * H * W), with channels = (at half size, at quarter size)."""

    def __init__(self, d_in, channels, shape):
        super().__init__()
        (c, h, w), (c1, c2) = shape, channels
        self.shape = shape
        self.net = nn.Sequential(
            nn.Linear(d_in, 8 * c2), nn.SiLU(), nn.Linear(8 * c2, c2 * ((h + 3) // 4) * ((w + 3) // 4)),
            nn.Unflatten(1, (c2, (h + 3) // 4, (w + 3) // 4)),
            Residual(c2), nn.SiLU(), nn.Conv2d(c2, 4 * c1, 3, padding=1), nn.PixelShuffle(2),
            Residual(c1), nn.SiLU(), nn.Conv2d(c1, 4 * c, 5, padding=2), nn.PixelShuffle(2),
        ).to(memory_format=torch.channels_last)

    def forward(self, x):
        _, h, w = self.shape
        return self.net(x)[..., :h, :w].flatten(1)   # upsampling by 4 overshoots some sizes


class CVAE(nn.Module):
    """Sohn, Lee & Yan 2015, with the learned prior p(z|y).

    shape: (C, H, W). condition: "label" (y int64) or "quadrants" (y the image with hidden pixels -1).
    hidden: units of the gated layers ("mlp") or channels at half and quarter size ("conv").
    z_dim = 0 removes the latents: the deterministic baseline.
    """

    def __init__(self, shape=(1, 28, 28), condition="label", z_dim=40, num_classes=10, hidden=(300, 300), net="mlp"):
        super().__init__()
        if condition not in ("label", "quadrants"):
            raise ValueError(f'condition is "label" or "quadrants", not {condition!r}')
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        self.shape, self.condition, self.z_dim = tuple(shape), condition, z_dim
        d, wide = math.prod(shape), 8 * hidden[1] if net == "conv" else hidden[0]
        if condition == "label":
            self.phi_y = nn.Embedding(num_classes, wide)
        elif net == "conv":
            # two channels a colour: where a pixel is seen, and what it shows there
            self.phi_y = nn.Sequential(conv_encoder((2 * shape[0], *shape[1:]), hidden, wide), nn.SiLU())
        else:
            self.phi_y = nn.Sequential(linear(2 * d, 2 * wide), nn.GLU())
        if z_dim:
            # the encoder sees x through phi_x, and y through the feature that prior and decoder see
            self.phi_x = (nn.Sequential(conv_encoder(self.shape, hidden, wide), nn.SiLU()) if net == "conv"
                          else nn.Sequential(linear(d, 2 * wide), nn.GLU()))
            rest = (wide,) if net == "conv" else hidden[1:]
            self.enc = mlp(2 * wide, rest, 2 * z_dim)
            self.prior_net = mlp(wide, rest, 2 * z_dim) if condition == "quadrants" else linear(wide, 2 * z_dim)
        self.dec = (ConvDecoder(z_dim + wide, hidden, self.shape) if net == "conv"
                    else mlp(z_dim + wide, hidden[::-1], d))

    def features(self, y):
        """y -> h_y (B, H), what prior, encoder and decoder know of the condition."""
        if self.condition == "label":
            return self.phi_y(y)
        seen = (y >= 0).to(y.dtype)
        return self.phi_y(torch.cat([y * seen, seen], 1).flatten(1))

    def prior(self, y):
        """mu, logvar (B, z_dim) of p(z|y)."""
        mu, logvar = self.prior_net(self.features(y)).chunk(2, -1)
        return mu, logvar.clamp(-14, 14)

    def decode(self, z, h_y):
        """Logits (..., C * H * W) of p(x|y, z); z (..., B, z_dim), h_y (B, H)."""
        inputs = torch.cat([z, h_y.expand(*z.shape[:-1], -1)], -1)
        return self.dec(inputs.flatten(0, -2)).view(*inputs.shape[:-1], -1)

    def forward(self, x, y, k=None):
        """x (B, C, H, W) binary, y the condition -> log_px, kl, log_w in nats, (B,), or (k, B) for k samples.

        Given quadrants, log_px counts the hidden pixels only.
        """
        h_y = self.features(y)
        if self.z_dim:
            mu_p, logvar_p = self.prior_net(h_y).chunk(2, -1)
            mu_q, logvar_q = self.enc(torch.cat([self.phi_x(x.flatten(1)), h_y], -1)).chunk(2, -1)
            logvar_p, logvar_q = logvar_p.clamp(-14, 14), logvar_q.clamp(-14, 14)
        else:
            mu_p = logvar_p = mu_q = logvar_q = h_y.new_zeros(len(x), 0)
        eps = torch.randn(k or 1, *mu_q.shape, device=x.device)
        z = mu_q + (0.5 * logvar_q).exp() * eps                                    # (k, B, z_dim)
        logits = self.decode(z, h_y)
        log_px = x.flatten(1) * logits + F.logsigmoid(-logits)                      # log Bernoulli, pixel by pixel
        log_px = (log_px if self.condition == "label" else log_px * (y.flatten(1) < 0)).sum(-1)
        kl = 0.5 * (logvar_p - logvar_q - 1 + (logvar_q - logvar_p).exp()
                    + (mu_q - mu_p) ** 2 * (-logvar_p).exp()).sum(-1).expand_as(log_px)
        # log p(x|y, z) + log p(z|y) - log q(z|x, y) at the sampled z
        log_w = log_px + 0.5 * (eps ** 2 + logvar_q - logvar_p - (z - mu_p) ** 2 * (-logvar_p).exp()).sum(-1)
        return (log_px, kl, log_w) if k else (log_px[0], kl[0], log_w[0])

    def sample(self, y, eps=None):
        """Images given y, as means (n, C, H, W); observed pixels as given. eps (n, z_dim): the noise, N(0, I)."""
        h_y = self.features(y)
        if self.z_dim:
            mu, logvar = self.prior_net(h_y).chunk(2, -1)
            z = mu + (0.5 * logvar.clamp(-14, 14)).exp() * (torch.randn_like(mu) if eps is None else eps)
        else:
            z = h_y.new_zeros(len(y), 0)
        x = self.decode(z, h_y).sigmoid().view(-1, *self.shape)
        return x if self.condition == "label" else torch.where(y < 0, x, y)


def hide(x, quadrants):
    """x with what is not observed set to -1; 1: lower left, 2: left half, 3: all but the lower right is seen."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    y = torch.full_like(x, -1)
    y[..., h:, :w] = x[..., h:, :w]
    if quadrants >= 2:
        y[..., :h, :w] = x[..., :h, :w]
    if quadrants == 3:
        y[..., :h, w:] = x[..., :h, w:]
    return y


def main(argv=None):
    import common  # here, not above: the class needs torch alone and can be copied without it
    from torchvision.utils import save_image

    p = common.parser(__doc__, epochs=60, batch_size=128, lr=1e-3, test_samples=100)
    p.add_argument("--condition", choices=("label", "quadrants"), default="label", help="what y is")
    p.add_argument("--quadrants", type=int, choices=(1, 2, 3), default=1, help="how many are observed")
    p.add_argument("--net", choices=("mlp", "conv"), default="mlp", help="kind of networks")
    p.add_argument("--hidden", type=common.at_least(1), nargs="+", default=[300, 300], metavar="N",
                   help="mlp: units of each layer; conv: channels at half and at quarter size")
    p.add_argument("--z-dim", type=common.at_least(0), default=40, help="size of z; 0 is the baseline without")
    args = common.parse(p, argv)
    if args.net == "conv" and len(args.hidden) != 2:
        p.error("--net conv takes two numbers of channels, such as --hidden 16 32")

    data = common.images(args)
    model_args = dict(shape=data.shape, condition=args.condition, z_dim=args.z_dim,
                      num_classes=data.num_classes, hidden=tuple(args.hidden), net=args.net)
    model = CVAE(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    net = common.compiled(model, args)

    given = lambda x, y: y if args.condition == "label" else hide(x, args.quadrants)
    bound = lambda m: lambda x, y, k: m(x, given(x, y), k)
    x_valid = common.binarise(data.valid[0], seed=1)
    validate = lambda m: common.evaluate(bound(m), x_valid, data.valid[1])
    run = common.Run(args, model, model_args, optimizer, data.train, validate)
    for x, y in run:
        x = common.binarise(x)
        log_px, kl, _ = net(x, given(x, y))
        loss = (kl - log_px).mean()
        run.log(loss, rec=-log_px, kl=kl)
        optimizer.zero_grad()
        loss.backward()
        run.share()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    model = run.best_model()
    x_test, y_test = common.binarise(data.test[0], seed=2), data.test[1]
    test = common.evaluate(bound(model), x_test, y_test, args.test_samples)
    run.finish(val=validate(model), test=test)

    with torch.inference_mode():
        torch.manual_seed(args.seed)
        if args.condition == "label":  # a row per label, a column per noise
            eps = torch.randn(10, args.z_dim, device=args.device)
            y = torch.arange(data.num_classes, device=args.device).repeat_interleave(10)
            picture = model.sample(y, eps.repeat(data.num_classes, 1))
        else:                          # observed, eight completions, truth
            x = x_test[:12]
            y = hide(x, args.quadrants)
            seen = torch.where(y < 0, torch.full_like(y, 0.5), y)
            picture = torch.stack([seen, *(model.sample(y) for _ in range(8)), x], 1).flatten(0, 1)
        save_image(picture, run.dir / "samples.png", nrow=10, padding=1)


if __name__ == "__main__":
    main()
