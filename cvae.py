# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Conditional VAE (Sohn, Lee & Yan 2015): generate x given y, a label or a part of the image.

    generative model   z | y ~ N(mu_p(y), diag sigma_p(y)^2),  x|y, z ~ Bernoulli(sigmoid(f(y, z)))
    inference model    q(z | x, y) = N(mu_q(x, y), diag sigma_q(x, y)^2)
    bound              log p(x|y) >= E_q[log p(x|y, z)] - KL(q(z|x, y) || p(z|y))    (eq. 4)

    python cvae.py                                      # y is the digit
    python cvae.py --condition quadrants --quadrants 1  # y is the lower left quarter of the image
    python cvae.py --condition quadrants --z-dim 0      # the deterministic baseline, no latents
    python cvae.py --epochs 0 --resume out/cvae-1       # test and draw; --sample 50: draw only
Measured, MNIST, seed 0: test -log p(x|y) of 82.84 nats given the label (1,000 samples); of hidden
pixels given 1, 2, 3 quadrants 60.12, 41.82, 19.31 (100); 14 to 24 minutes on one slow core.
Deviations from the paper: it calls the condition x and the output y; the layers are gated; Adam; a
running average of the weights is tested and sampled from; no hybrid objective with Gaussian
stochastic networks; the prior gets no first guess of x by the baseline network, as the paper's
recurrent prediction gives it; log variances are clamped; gradients are clipped.
"""

def flags():
    import common  # here, not above: a copied class needs torch alone
    p = common.parser("cvae", __doc__, epochs=60, batch_size=128, lr=1e-3, test_samples=100)
    p.add_argument("--condition", choices=("label", "quadrants"), default="label", help="what y is")
    p.add_argument("--quadrants", type=int, choices=(1, 2, 3), default=1, help="how many are seen")
    p.add_argument("--z-dim", type=common.at_least(0), default=40, help="size of z; 0: no latents")
    p.add_argument("--hidden", type=common.at_least(1), nargs="+", default=[300, 300], metavar="N",
                   help="units of each layer of the encoder; the decoder's are in reverse order")
    return p

if __name__ == "__main__":
    flags().parse_args()    # before torch, whose import takes seconds: --help answers at once
import math

import torch
import torch.nn.functional as F
from torch import nn

def linear(d_in, d_out):
    """Weights of variance 1 / d_in; torch's default, a third of it, learns more slowly."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=d_in**-0.5)
    nn.init.zeros_(layer.bias)
    return layer

def mlp(d_in, hidden, d_out):
    """Gated layers h = (A x + a) * sigmoid(B x + b), then a linear one."""
    layers = []
    for h in hidden:
        layers += [linear(d_in, 2 * h), nn.GLU()]
        d_in = h
    return nn.Sequential(*layers, linear(d_in, d_out))

class CVAE(nn.Module):
    """Sohn, Lee & Yan 2015, with the learned prior p(z|y).

    y: given "label" int64 (B,), given "quadrants" the images (B, C, H, W) with hidden pixels -1.
    z_dim=0 removes the latents: the deterministic baseline. hidden: units, of one or more layers.
    """

    def __init__(self, shape=(1, 28, 28), condition="label", z_dim=40, num_classes=10,
                 hidden=(300, 300)):
        super().__init__()
        if condition not in ("label", "quadrants"):
            raise ValueError(f'condition is "label" or "quadrants", not {condition!r}')
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        first, rest = hidden[0], hidden[1:]
        pixels = math.prod(shape)
        self.shape, self.condition, self.z_dim = tuple(shape), condition, z_dim
        if condition == "label":
            self.phi_y = nn.Embedding(num_classes, first)
        else:    # two channels per colour: observed pixels and mask
            self.phi_y = nn.Sequential(linear(2 * pixels, 2 * first), nn.GLU())
        if z_dim:
            self.phi_x = nn.Sequential(linear(pixels, 2 * first), nn.GLU())
            self.enc = mlp(2 * first, rest, 2 * z_dim)
            self.prior_net = mlp(first, rest if condition == "quadrants" else (), 2 * z_dim)
        self.dec = mlp(z_dim + first, hidden[::-1], pixels)

    def features(self, y):
        """h_y (B, hidden[0]): what prior, encoder and decoder know of y."""
        if self.condition == "label":
            return self.phi_y(y)
        seen = (y >= 0).to(y.dtype)
        return self.phi_y(torch.cat([y * seen, seen], 1).flatten(1))

    def prior(self, h_y):
        """mu, logvar (B, z_dim) of p(z|y); h_y = features(y)."""
        if not self.z_dim:
            return h_y.new_zeros(2, len(h_y), 0).unbind(0)
        mu, logvar = self.prior_net(h_y).to(self.dec[0].weight.dtype).chunk(2, 1)
        return mu, logvar.clamp(-14, 14)

    def posterior(self, x, h_y):
        """mu, logvar (B, z_dim) of q(z|x, y)."""
        h = torch.cat([self.phi_x(x.flatten(1)), h_y], 1)
        mu, logvar = self.enc(h).to(x.dtype).chunk(2, 1)
        return mu, logvar.clamp(-14, 14)

    def decode(self, z, h_y):
        """Logits (..., B, C * H * W) of p(x|y, z); z (..., B, z_dim)."""
        return self.dec(torch.cat([z, h_y.expand(*z.shape[:-1], -1)], -1))

    def forward(self, x, y, k=None):
        """log_px, kl, log_w in nats, (B,), or (k, B) for k samples; of hidden pixels alone."""
        h_y = self.features(y)
        mu_p, logvar_p = self.prior(h_y)
        mu_q, logvar_q = self.posterior(x, h_y) if self.z_dim else (mu_p, logvar_p)
        eps = torch.randn(k or 1, *mu_q.shape, dtype=mu_q.dtype, device=mu_q.device)
        z = mu_q + (0.5 * logvar_q).exp() * eps    # (k, B, z_dim)
        logits = self.decode(z, h_y)
        log_px = x.flatten(1) * logits + F.logsigmoid(-logits)    # Bernoulli, pixel by pixel
        if self.condition == "quadrants":
            log_px = log_px * (y.flatten(1) < 0)
        log_px = log_px.sum(-1)
        kl = 0.5 * (logvar_p - logvar_q - 1
                    + ((mu_q - mu_p)**2 + logvar_q.exp()) / logvar_p.exp()).sum(-1)
        # log p(z|y) - log q(z|x, y) at the sampled z
        log_ratio = 0.5 * (eps**2 + logvar_q - logvar_p - (z - mu_p)**2 / logvar_p.exp()).sum(-1)
        terms = log_px, kl.expand_as(log_px), log_px + log_ratio
        return terms if k else [term[0] for term in terms]

    @torch.no_grad()
    def sample(self, y, eps=None):
        """Means (B, C, H, W), with observed pixels as given; eps (B, z_dim) is the noise of z."""
        h_y = self.features(y)
        mu, logvar = self.prior(h_y)
        eps = torch.randn_like(mu) if eps is None else eps
        z = mu + (0.5 * logvar).exp() * eps
        x = self.decode(z, h_y).sigmoid().view(-1, *self.shape)
        return x if self.condition == "label" else torch.where(y < 0, x.to(y.dtype), y)

def hide(x, quadrants):
    """x with hidden pixels -1. 1: lower left observed, 2: left half, 3: all but the lower right."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    y = x.clone()
    y[..., h:, w:] = -1
    if quadrants <= 2:
        y[..., :h, w:] = -1
    if quadrants == 1:
        y[..., :h, :w] = -1
    return y

def draw_pictures(model, x, y, folder, names, n=100):
    """samples.png: one row per label, one column per noise; or what is seen, completions, x."""
    from matplotlib import get_data_path
    from torchvision.utils import draw_bounding_boxes, save_image
    if model.condition == "label":
        columns = math.ceil(n / len(names))
        device = model.phi_y.weight.device
        z = torch.randn(columns, model.z_dim, device=device).repeat(len(names), 1)
        every = torch.arange(len(names), device=device).repeat_interleave(columns)
        images = model.sample(every, z)
    else:
        seen = torch.where(y < 0, 0.5, y)    # hidden pixels in grey
        completions = [model.sample(y) for _ in range(8)]
        images, columns, names = torch.stack([seen, *completions, x], 1).flatten(0, 1), 10, []
    images = images.cpu().expand(-1, 3, -1, -1).repeat_interleave(3, 2).repeat_interleave(3, 3)
    font, corner = get_data_path() + "/fonts/ttf/DejaVuSans.ttf", torch.tensor([[0, 0, 1, 1]])
    for image, name in zip(images[::columns], names):    # as the label of a box in the corner
        image.copy_(draw_bounding_boxes(image, corner, [name], "red", font=font, font_size=13))
    save_image(images, folder / "samples.png", nrow=columns, padding=2)

def main(argv=None):
    import common
    # flags, data and model
    args = common.parse(flags(), argv)
    if args.sample:    # needs no data
        if args.run.saved["model_args"]["condition"] != "label":
            common.fail("--sample: completions need images; take --epochs 0 instead")
        model, folder = common.trained(args, CVAE)
        return draw_pictures(model, None, None, folder, args.run.saved["classes"], args.sample)
    data = common.images(args)
    names = args.run.about["classes"]
    model_args = dict(shape=data.shape, condition=args.condition, z_dim=args.z_dim,
                      num_classes=data.num_classes, hidden=tuple(args.hidden))
    model = CVAE(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    def condition(x, labels):
        return labels if args.condition == "label" else hide(x, args.quadrants)

    # training
    x_valid = common.binarise(data.valid[0], seed=1)
    y_valid = condition(x_valid, data.valid[1])
    run = common.Run(args, model, model_args, optimizer)
    for epoch in range(run.epoch, args.epochs):
        for x, labels in common.batches(args, epoch, *data.train):
            x = common.binarise(x)
            log_px, kl, _ = model(x, condition(x, labels))
            loss = (kl - log_px).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model, args)    # under torchrun
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            run.after_step(loss=loss, rec=-log_px, kl=kl)    # averages weights, keeps the figures
        if run.end_epoch(common.evaluate(run.average, x_valid, y_valid)):    # logs, saves; if best
            draw_pictures(run.average, x_valid[:12], y_valid[:12], run.dir, names)

    # test and pictures
    model = run.best_model()
    x_test = common.binarise(data.test[0], seed=2)
    y_test = condition(x_test, data.test[1])
    run.finish(common.evaluate(model, x_test, y_test, samples=args.test_samples))
    draw_pictures(model, x_test[:12], y_test[:12], run.dir, names)

if __name__ == "__main__":
    main()
