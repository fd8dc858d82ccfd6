# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Conditional VAE (Sohn, Lee & Yan 2015): generate x given y, a label or a part of the image.
    generative model   z | y ~ N(mu_p(y), diag sigma_p(y)^2),  x|y, z ~ Bernoulli(sigmoid(f(y, z)))
    inference model    q(z | x, y) = N(mu_q(x, y), diag sigma_q(x, y)^2)
    bound              log p(x|y) >= E_q[log p(x|y, z)] - KL(q(z|x, y) || p(z|y))    (eq. 4)
    python cvae.py                                      # y is the digit
    python cvae.py --channels 16 32                     # residual convolutions: better, and slower
    python cvae.py --condition quadrants --quadrants 1  # y is the lower left quarter of the image
Measured, MNIST, test -log p(x|y) given the label: 82.43 (3 seeds, 1,000 samples), --channels 16 32
--epochs 50: 80.11 (200), of 40 epochs given 1, 2, 3 quadrants: 58.35, 40.79, 19.02 (100).
Deviations: the paper's x, y are y, x here; gated or residual layers; Adam; averaged weights; a KL
weight that rises to 1; no hybrid objective nor first guess of x; limited log variances, gradients.
"""

def flags():
    import common  # here, not above: a copied class needs torch alone
    p = common.parser("cvae", __doc__, epochs=60, batch_size=128, lr=1e-3, test_samples=100)
    add, count = p.add_argument, common.at_least(1)
    add("--condition", choices=("label", "quadrants"), default="label", help="what y is")
    add("--quadrants", type=int, choices=(1, 2, 3), default=1, help="how many are seen")
    add("--z-dim", type=common.at_least(0), default=40, help="size of z; 0: deterministic")
    add("--hidden", type=count, nargs="+", default=[300, 300], help="units; decoder: reversed")
    add("--channels", type=count, nargs=2, help="convolve: channels at 1/2, 1/4 size")
    add("--warm-up", type=count, default=5, help="epochs until the KL counts in full; 1: at once")
    return p

if __name__ == "__main__":
    flags().parse_args()    # before torch, whose import takes seconds: --help answers at once
import math, torch, torch.nn.functional as F
from torch import nn

def linear(d_in, d_out):    # weights of variance 1 / d_in, three times torch's: it learns faster
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=d_in**-0.5)
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
def conv_encoder(c, h, w, c1, c2, d_out):    # (B, c * h * w) -> (B, d_out)
    flat = c2 * ((h + 3) // 4) * ((w + 3) // 4)
    return nn.Sequential(
        nn.Unflatten(1, (c, h, w)), nn.Conv2d(c, c1, 5, 2, 2), Residual(c1), nn.SiLU(),
        nn.Conv2d(c1, c2, 3, 2, 1), Residual(c2), nn.SiLU(), nn.Flatten(),
        nn.LayerNorm(flat), linear(flat, d_out))
def conv_decoder(c, h, w, c1, c2, d_in):    # (B, d_in) -> (B, c * h * w)
    h4, w4 = (h + 3) // 4, (w + 3) // 4
    return nn.Sequential(
        linear(d_in, c2 * h4 * w4), nn.Unflatten(1, (c2, h4, w4)), Residual(c2), nn.SiLU(),
        nn.Conv2d(c2, 4 * c1, 3, padding=1), nn.PixelShuffle(2), Residual(c1), nn.SiLU(),
        nn.Conv2d(c1, 4 * c, 5, padding=2), nn.PixelShuffle(2),
        nn.ZeroPad2d((0, w - 4 * w4, 0, h - 4 * h4)), nn.Flatten())

class CVAE(nn.Module):
    """Sohn, Lee & Yan 2015, with the learned prior p(z|y). y: given "label" int64 (B,), given
    "quadrants" the images (B, C, H, W) with hidden pixels -1. z_dim=0 removes the latents: the
    deterministic baseline. hidden: units, of one or more layers. channels: of convolutions."""
    def __init__(self, shape=(1, 28, 28), condition="label", z_dim=40, num_classes=10,
                 hidden=(300, 300), channels=None):
        super().__init__()
        if condition not in ("label", "quadrants"):
            raise ValueError(f'condition is "label" or "quadrants", not {condition!r}')
        first, *rest = (hidden,) if isinstance(hidden, int) else hidden
        c, h, w = shape
        self.shape, self.condition, self.z_dim = tuple(shape), condition, z_dim
        def image_net(planes):    # features of images of so many channels
            size = (planes, h, w, *channels) if channels else (planes * h * w,)
            return nn.Sequential((conv_encoder if channels else linear)(*size, 2 * first), nn.GLU())
        if condition == "label":
            self.phi_y = nn.Embedding(num_classes, first)
        else:    # two channels per colour: observed pixels and mask
            self.phi_y = image_net(2 * c)
        if z_dim:
            self.phi_x = image_net(c)
            self.enc = mlp(2 * first, rest, 2 * z_dim)
            self.prior_net = mlp(first, rest if condition == "quadrants" else (), 2 * z_dim)
        if channels:
            wide = mlp(z_dim + first, rest[::-1], 2 * first)
            self.dec = nn.Sequential(wide, nn.GLU(), conv_decoder(c, h, w, *channels, first))
        else:
            self.dec = mlp(z_dim + first, [*rest[::-1], first], c * h * w)
    def features(self, y):
        """h_y (B, hidden[0]): what prior, encoder and decoder know of y."""
        if self.condition == "label":
            return self.phi_y(y)
        seen = (y >= 0).to(y.dtype)
        return self.phi_y(torch.cat([y * seen, seen], 1).flatten(1))
    def prior(self, h_y):
        """mu, logvar (B, z_dim) of p(z|y); h_y = features(y)."""
        if not self.z_dim:
            return next(self.parameters()).new_zeros(2, len(h_y), 0).unbind(0)
        mu, logvar = self.prior_net(h_y).to(self.prior_net[-1].weight.dtype).chunk(2, 1)
        return mu, logvar.clamp(-14, 14)
    def posterior(self, x, h_y):
        """mu, logvar (B, z_dim) of q(z|x, y)."""
        h = torch.cat([self.phi_x(x.flatten(1)), h_y], 1)
        mu, logvar = self.enc(h).to(x.dtype).chunk(2, 1)
        return mu, logvar.clamp(-14, 14)
    def decode(self, z, h_y):
        """Logits (..., B, C * H * W) of p(x|y, z); z (..., B, z_dim)."""
        zy = torch.cat([z, h_y.expand(*z.shape[:-1], -1)], -1)
        return self.dec(zy.flatten(0, -2)).view(*z.shape[:-1], -1)
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
        var_p = logvar_p.exp()    # then KL(q || p), and log p(z|y) - log q(z|x, y) at z
        kl = 0.5 * (logvar_p - logvar_q - 1 + ((mu_q - mu_p)**2 + logvar_q.exp()) / var_p).sum(-1)
        log_ratio = 0.5 * (eps**2 + logvar_q - logvar_p - (z - mu_p)**2 / var_p).sum(-1)
        terms = log_px, kl.expand_as(log_px), log_px + log_ratio
        return terms if k else [term[0] for term in terms]
    @torch.no_grad()
    def sample(self, y, eps=None):
        """Means (B, C, H, W), with observed pixels as given; eps (B, z_dim) is the noise of z."""
        h_y = self.features(y)
        mu, logvar = self.prior(h_y)
        z = mu + (0.5 * logvar).exp() * (torch.randn_like(mu) if eps is None else eps)
        x = self.decode(z, h_y).to(z.dtype).sigmoid().view(-1, *self.shape)
        return x if self.condition == "label" else torch.where(y < 0, x.to(y.dtype), y)

def hide(x, quadrants):
    """x with hidden pixels -1. 1: lower left observed, 2: left half, 3: all but the lower right."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    y = x.clone()
    y[..., h if quadrants == 3 else 0:, w:] = -1
    y[..., :h if quadrants == 1 else 0, :w] = -1
    return y

def draw_pictures(model, x, y, folder, names, n=100):
    """samples.png: one row per label, one column per noise; or what is seen, completions, x."""
    from matplotlib import get_data_path
    from torchvision.utils import draw_bounding_boxes, save_image
    if model.condition == "label":
        columns = math.ceil(n / len(names))
        y = torch.arange(len(names), device=model.phi_y.weight.device).repeat_interleave(columns)
        z = torch.randn(columns, model.z_dim, device=y.device).repeat(len(names), 1)
        images = model.sample(y, z)
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
    given = {name: getattr(args, name) for name in ("condition", "z_dim", "hidden", "channels")}
    model_args = dict(shape=data.shape, num_classes=data.num_classes, **given)
    model = CVAE(**model_args).to(args.device, memory_format=torch.channels_last)
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
            loss = (min(1, (epoch + 1) / args.warm_up) * kl - log_px).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model, args)    # under torchrun
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            run.after_step(loss=loss, rec=-log_px, kl=kl)    # averages weights, keeps the figures
        if run.end_epoch(common.evaluate(run.average, x_valid, y_valid)):    # logs, saves; if best
            draw_pictures(run.average, x_valid[:12], y_valid[:12], run.dir, run.facts["classes"])
    # test and pictures
    model = run.best_model()
    x_test = common.binarise(data.test[0], seed=2)
    y_test = condition(x_test, data.test[1])
    run.finish(common.evaluate(model, x_test, y_test, samples=args.test_samples))
    draw_pictures(model, x_test[:12], y_test[:12], run.dir, run.facts["classes"])

if __name__ == "__main__":
    main()
