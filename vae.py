# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Variational auto-encoder (Kingma & Welling 2014, "Auto-Encoding Variational Bayes").
    generative model   z ~ N(0, I),   x | z ~ Bernoulli(sigmoid(f(z)))  or  N(f(z), sigma^2 I)
    inference model    q(z|x) = N(mu(x), diag sigma(x)^2)
    bound              log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))    (eqs. 3, 10)
    with --iw K        log p(x) >= E_q[log 1/K sum_k p(x, z_k) / q(z_k|x)]   (Burda et al. 2016, 8)
    --components K     z ~ sum_k w_k N(m_k, diag s^2), learned; KL: log q - log p at q's sample
    python vae.py                             # MNIST, on the GPU if there is one
    python vae.py --components 500            # better, and nearly as fast
    python vae.py --channels 16 32            # residual convolutions: better, and slower
Measured, MNIST, test -ELBO, -log p(x): 90.54, 87.14 nats (3 seeds); --components 500 88.24, 85.13.
Deviations from the paper: gated or residual layers, larger networks, Adam, limited gradients and
log variances; averaged weights are tested, of the epoch of the smallest -ELBO (with --iw, too).
"""

def flags():
    import common  # here, not above: a copied class needs torch alone
    p = common.parser("vae", __doc__, epochs=60, batch_size=128, lr=1e-3, test_samples=5000)
    add, count = p.add_argument, common.at_least(1)
    add("--hidden", type=count, nargs="+", default=[300, 300], help="units of layers")
    add("--channels", type=count, nargs=2, help="convolve: channels at 1/2, 1/4 size")
    add("--z-dim", type=count, default=40, help="size of z")
    add("--components", type=count, default=1, help="of p(z), a learned mixture if > 1")
    add("--likelihood", choices=("bernoulli", "gaussian"), default="bernoulli")
    add("--sigma", type=common.at_least(1e-6, float), default=1.0, help="of gaussian")
    add("--binarise", choices=("dynamic", "fixed"), default="dynamic",
        help="training pixels drawn anew at every use, or once (bernoulli)")
    add("--iw", type=count, default=1, help="samples of the bound to train on; 1: ELBO")
    return p

if __name__ == "__main__":
    flags().parse_args()    # before torch, whose import takes seconds: --help answers at once
import math, torch, torch.nn.functional as F
from torch import nn

def linear(d_in, d_out):    # weights of variance 1 / d_in, three times torch's: it learns faster
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=max(1, d_in)**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
def mlp(d_in, hidden, d_out):    # gated, h = (A x + a) * sigmoid(B x + b); the last is linear
    layers = []
    for h in hidden:
        layers += [linear(d_in, 2 * h), nn.GLU()]
        d_in = h
    return nn.Sequential(*layers, linear(d_in, d_out))
class Residual(nn.Module):    # x + two 3x3 convolutions
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
                                  nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
    def forward(self, x):
        return x + self.body(x)
def conv_nets(shape, channels, z_dim):
    """Encoder (B, C * H * W) -> (B, 2 z_dim) and decoder (B, z_dim) -> (B, C * H * W)."""
    c, h, w = shape
    c1, c2 = channels    # at half and at quarter size
    h4, w4 = (h + 3) // 4, (w + 3) // 4
    flat, wide = c2 * h4 * w4, 8 * c2
    enc = nn.Sequential(
        nn.Unflatten(1, shape), nn.ZeroPad2d((0, 4 * w4 - w, 0, 4 * h4 - h)),
        nn.Conv2d(c, c1, 5, 2, 2), Residual(c1), nn.SiLU(),
        nn.Conv2d(c1, c2, 3, 2, 1), Residual(c2), nn.SiLU(),
        nn.Flatten(), nn.Linear(flat, wide), nn.SiLU(), nn.Linear(wide, 2 * z_dim))
    dec = nn.Sequential(
        nn.Linear(z_dim, wide), nn.SiLU(), nn.Linear(wide, flat), nn.Unflatten(1, (c2, h4, w4)),
        Residual(c2), nn.SiLU(), nn.Conv2d(c2, 4 * c1, 3, padding=1), nn.PixelShuffle(2),
        Residual(c1), nn.SiLU(), nn.Conv2d(c1, 4 * c, 5, padding=2), nn.PixelShuffle(2),
        nn.ZeroPad2d((0, w - 4 * w4, 0, h - 4 * h4)), nn.Flatten())
    return enc, dec

class VAE(nn.Module):
    """Kingma & Welling 2014. shape: (C, H, W) of the images. hidden: units of the gated layers.
    likelihood: "bernoulli", or "gaussian" for N(f(z), sigma^2 I), else ValueError. channels: of
    convolutions at half and at quarter size, instead of gated layers. components: of p(z); 1:
    N(0, I); more: a mixture whose weights, means and common variances are learned."""
    def __init__(self, shape=(1, 28, 28), hidden=(300, 300), z_dim=40, likelihood="bernoulli",
                 channels=None, sigma=1.0, components=1):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood is "bernoulli" or "gaussian", not {likelihood!r}')
        self.shape, self.z_dim, self.likelihood, self.sigma = tuple(shape), z_dim, likelihood, sigma
        hidden = [hidden] if isinstance(hidden, int) else list(hidden)
        self.components, pixels = components, math.prod(shape)
        if components > 1:
            self.logits = nn.Parameter(torch.zeros(components))
            self.means = nn.Parameter(torch.randn(components, z_dim))    # in units of std
            self.log_std = nn.Parameter(torch.zeros(z_dim))
        if channels:
            self.enc, self.dec = conv_nets(self.shape, channels, z_dim)
        else:
            self.enc = mlp(pixels, hidden, 2 * z_dim)
            self.dec = mlp(z_dim, hidden[::-1], pixels)
    def encode(self, x):
        """mu, logvar (B, z_dim) of q(z|x); x (B, C, H, W)."""
        mu, logvar = self.enc(x.flatten(1)).to(x.dtype).chunk(2, -1)
        return mu, logvar.clamp(-14, 14)
    def decode(self, z):
        """The means of p(x|z) as images: z (B, z_dim) -> (B, C, H, W)."""
        out = self.dec(z).to(z.dtype).view(-1, *self.shape)
        return out.sigmoid() if self.likelihood == "bernoulli" else out
    def log_prior(self, z):
        """log p(z) without -z_dim / 2 log 2 pi, (k, B); z (k, B, z_dim)."""
        if self.components == 1:
            return -0.5 * (z**2).sum(2)
        log_std = self.log_std.clamp(-7, 7)
        squares = torch.cdist(z / log_std.exp(), self.means)**2    # (k, B, components)
        return (self.logits.log_softmax(0) - 0.5 * squares).logsumexp(2) - log_std.sum()
    def forward(self, x, k=None):
        """x (B, C, H, W) in [0, 1] -> log_px, kl, log_w in nats, (B,), or (k, B) for k samples."""
        mu, logvar = self.encode(x)
        eps = torch.randn(k or 1, *mu.shape, dtype=mu.dtype, device=x.device)
        z = mu + (0.5 * logvar).exp() * eps                              # (k, B, z_dim)
        x, out = x.flatten(1), self.dec(z.flatten(0, 1)).view(*z.shape[:2], -1)    # (k, B, pixels)
        if self.likelihood == "bernoulli":    # with logits, as log s(l) = l + log s(-l)
            log_px = (x * out + F.logsigmoid(-out)).sum(-1)
        else:
            log_2_pi_var = math.log(2 * math.pi * self.sigma**2)
            log_px = -0.5 * (((x - out) / self.sigma)**2 + log_2_pi_var).sum(-1)
        log_ratio = self.log_prior(z) + 0.5 * (eps**2 + logvar).sum(-1)    # log p(z) / q(z|x)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1).expand_as(log_px)    # appendix B
        kl = kl if self.components == 1 else -log_ratio    # a mixture has no such formula
        terms = log_px, kl, log_px + log_ratio
        return terms if k else [term[0] for term in terms]
    @torch.no_grad()
    def sample(self, n):
        """n images from the prior, as means (n, C, H, W)."""
        z = torch.randn(n, self.z_dim).to(next(self.parameters()))
        if self.components > 1:
            which = torch.multinomial(self.logits.softmax(0).cpu(), n, replacement=True)
            z = (self.means[which] + z) * self.log_std.clamp(-7, 7).exp()
        return self.decode(z)

@torch.no_grad()
def draw_pictures(model, x, y, folder, n=100):
    """n samples; of images x with labels y reconstructions, interpolations, a 2-d z's plane."""
    from torchvision.utils import save_image
    def save(name, images, columns):
        images = images.clamp(0, 1).repeat_interleave(3, 2).repeat_interleave(3, 3)
        save_image(images, folder / f"{name}.png", nrow=columns, padding=2)
    save("samples", model.sample(n), 10)
    if x is None:
        return
    mu, _ = model.encode(torch.cat([x[:20], x[:1]])[:20])    # at least two
    save("reconstructions", torch.cat([x[:10], model.decode(mu[:10])]), 10)
    weight = torch.linspace(0, 1, 10, device=x.device)[:, None]
    lines = [torch.lerp(a, b, weight) for a, b in zip(mu[::2], mu[1::2])]
    save("interpolation", model.decode(torch.cat(lines)), 10)
    if model.z_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.025, 0.975, 20, device=x.device))
        if model.components == 1:    # figure 4 of the paper: through the Gaussian's quantiles
            save("manifold", model.decode(torch.cartesian_prod(-quantiles, quantiles).flip(1)), 20)
        from matplotlib.figure import Figure
        ax = Figure((8, 8)).subplots()
        places, _ = model.encode(x[:5000])
        ax.figure.colorbar(ax.scatter(*places.T.cpu(), 5, y[:5000].cpu(), cmap="tab10"))
        ax.figure.savefig(folder / "places.png")

def main(argv=None):
    import common
    # flags, data and model
    args = common.parse(flags(), argv)
    if args.sample:    # needs no data
        model, folder = common.trained(args, VAE)
        return draw_pictures(model, None, None, folder, args.sample)
    data = common.images(args)
    if (args.likelihood, args.binarise) == ("bernoulli", "fixed"):    # training pixels, too, once
        data.train = (255 * common.binarise(data.train[0], seed=0)).byte(), data.train[1]
    options = "hidden", "z_dim", "likelihood", "channels", "sigma", "components"
    model_args = dict(shape=data.shape, **{name: getattr(args, name) for name in options})
    model = VAE(**model_args).to(args.device, memory_format=torch.channels_last)    # faster
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    def pixels(x, seed=None):    # grey values never enter a Bernoulli likelihood
        return common.binarise(x, seed) if args.likelihood == "bernoulli" else x / 255
    # training
    x_valid = pixels(data.valid[0], seed=1)
    run = common.Run(args, model, model_args, optimizer)
    for epoch in range(run.epoch, args.epochs):
        for x, _ in common.batches(args, epoch, *data.train):
            log_px, kl, log_w = model(pixels(x), args.iw)
            loss = (kl - log_px).mean() if args.iw == 1 else -common.log_mean_exp(log_w).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model, args)    # under torchrun
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            run.after_step(loss=loss, rec=-log_px, kl=kl)    # averages weights, keeps the figures
        if run.end_epoch(common.evaluate(run.average, x_valid)):    # logs, saves; if best
            draw_pictures(run.average, x_valid, data.valid[1], run.dir)
    # test and pictures
    model = run.best_model()
    x_test = pixels(data.test[0], seed=2)
    run.finish(common.evaluate(model, x_test, samples=args.test_samples))
    draw_pictures(model, x_test, data.test[1], run.dir)

if __name__ == "__main__":
    main()
