# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Semi-supervised VAE: M2 (Kingma et al. 2014), and its auxiliary form (Maaloe et al. 2016).

    generative model   y ~ Cat(1/C),   z ~ N(0, I),   x | y, z ~ Bernoulli(sigmoid(f(y, z)))
    inference model    q(y|x) = Cat(softmax g(x)),   q(z|x, y) = N(mu(x, y), diag sigma(x, y)^2)
    log p(x, y) >=     L = E_q[log p(x|y, z)] + log p(y) - KL(q(z|x, y) || p(z))         (eq. 6)
    log p(x) >=        U = sum_y q(y|x) L(x, y) + H(q(y|x))                              (eq. 7)
    objective          mean U + labelled / unlabelled * mean L + alpha * mean log q(y|x) (eq. 9)
                       + 0.3 alpha * mean log sum_y q(y|x') q(y|x''), two views x', x'' of x
    with --auxiliary   q(a|x), q(y|a, x), q(z|a, y, x): L gains log p(a|z, y, x) - log q(a|x)

    python ssl_vae.py --labels 100    # also with --auxiliary, --supervised-only or --no-augment
    python ssl_vae.py --epochs 0 --resume out/ssl_vae-1    # test and draw; or draw: --sample 50
Measured, MNIST, --labels 100: test error 1.32 +- 0.62 % (5 seeds), --no-augment 1.67 +- 0.15 % (3).
Deviations from the papers: L and U have the opposite sign there. q(y|x) is a convolutional network
with batch normalisation; it sees grey images, in training under random affine maps, or, as in the
papers, binary pixels (--no-augment): U is a bound for any q(y|.). The last term, for both views to
get the same label, is ours. --alpha 100 is 1,000 times what Kingma et al. use: 0.1 N on a sum over
N images is 0.1 on a mean. Labelled images are drawn with replacement; learning rate, SiLU, limited
gradients and variances are ours. Averaged weights are tested, of the best validation error.
"""

def flags():
    import common  # here, not above: a copied class needs torch alone
    p = common.parser("ssl_vae", __doc__, epochs=12, batch_size=200, lr=1e-3, test_samples=50)
    add, size = p.add_argument, common.at_least(1)
    add("--labels", type=size, default=1000, metavar="N", help="how many labels are given")
    add("--z-dim", type=size, default=50, help="size of z")
    add("--hidden", type=size, nargs="+", default=[300, 300], metavar="N", help="units of layers")
    add("--channels", type=size, nargs=3, default=[16, 32, 64], help="of the classifier")
    add("--alpha", type=common.at_least(0, float), default=100.0, help="weight of classification")
    add("--auxiliary", action="store_true", help="add the auxiliary variable a")
    add("--supervised-only", action="store_true", help="learn from the labelled images alone")
    add("--no-augment", action="store_true", help="train q(y|x) on binarised images, unwarped")
    return p

if __name__ == "__main__":
    flags().parse_args()    # before torch, whose import takes seconds: --help answers at once
import math
import torch
import torch.nn.functional as F
from torch import nn

class Linear(nn.Linear):
    def reset_parameters(self):    # torch's own variance, a third of this, learns more slowly
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)

def mlp(*sizes):
    """Layers that begin with a nonlinearity: their input is the sum that enters a hidden layer."""
    net = nn.Sequential()
    for d_in, d_out in zip(sizes, sizes[1:]):
        net.extend([nn.SiLU(), Linear(d_in, d_out)])
    return net

class SSLVAE(nn.Module):
    """M2, or the auxiliary model. hidden: units per layer; channels: of the convolutions."""

    def __init__(self, shape=(1, 28, 28), z_dim=50, num_classes=10, auxiliary=False,
                 hidden=(300, 300), channels=(16, 32, 64), a_dim=50):
        super().__init__()
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        self.shape, self.num_classes, self.auxiliary = tuple(shape), num_classes, auxiliary
        pixels, first = math.prod(shape), hidden[0]
        c1, c2, c3 = channels
        pool = nn.MaxPool2d(2, ceil_mode=True)
        self.trunk = nn.Sequential(
            nn.Conv2d(shape[0], c1, 5, padding=2), pool, nn.BatchNorm2d(c1), nn.ReLU(),
            nn.Conv2d(c1, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(), pool,
            nn.Conv2d(c2, c3, 3, padding=1), nn.BatchNorm2d(c3), nn.ReLU(), pool, nn.Flatten())
        self.head = nn.Linear(c3 * math.prod((side + 7) // 8 for side in shape[1:]), num_classes)
        # a first layer over (x, y, ...) is a sum of products; that of x is taken once for all y
        self.enc_x, self.enc_y = Linear(pixels, first), nn.Embedding(num_classes, first)
        self.enc = mlp(*hidden, 2 * z_dim)
        self.dec_z, self.dec_y = Linear(z_dim, first), nn.Embedding(num_classes, first)
        self.dec = mlp(*hidden, pixels)
        if auxiliary:
            self.head_a = nn.Linear(a_dim, num_classes)
            self.q_a = nn.Sequential(Linear(pixels, first), mlp(*hidden, 2 * a_dim))
            self.enc_a, self.aux_z = Linear(a_dim, first), Linear(z_dim, first)
            self.aux_x, self.aux_y = Linear(pixels, first), nn.Embedding(num_classes, first)
            self.p_a = mlp(*hidden, 2 * a_dim)

    def auxiliaries(self, x, sampled=True):
        """a ~ q(a|x), or its mean, (B, a_dim), and log q(a|x) + const., (B,); in M2 None, 0."""
        if not self.auxiliary:
            return None, 0
        mu, logvar = self.q_a(x.flatten(1)).to(x.dtype).chunk(2, 1)
        logvar = logvar.clamp(-8, 8)
        eps = torch.randn_like(mu) if sampled else torch.zeros_like(mu)
        return mu + (0.5 * logvar).exp() * eps, -0.5 * (eps**2 + logvar).sum(1)

    def infer(self, x, sampled=True):
        """log q(y|a, x), (B, num_classes), and the a and log q(a|x) of `auxiliaries`."""
        a, log_qa = self.auxiliaries(x, sampled)
        logits = self.head(self.trunk(x)) + (self.head_a(a) if self.auxiliary else 0)
        return logits.to(x.dtype).log_softmax(1), a, log_qa

    def classify(self, x):
        """Normalised logits (B, num_classes) of q(y|x), or of q(y|a, x) at the mean of q(a|x)."""
        return self.infer(x, sampled=False)[0]

    def encode(self, x, y, a):
        """mu, logvar (..., B, z_dim) of q(z|x, y), or of q(z|a, y, x)."""
        h = self.enc_x(x.flatten(1)) + self.enc_y(y)
        mu, logvar = self.enc(h + self.enc_a(a) if self.auxiliary else h).to(x.dtype).chunk(2, -1)
        return mu, logvar.clamp(-14, 14)

    def joint_bound(self, x, a, log_qa, y=None, sampled=False):
        """L(x, y), (B,), or of every y, (num_classes, B). sampled: with no analytic KL. Eq. 6."""
        y = torch.arange(self.num_classes, device=x.device)[:, None] if y is None else y
        mu, logvar = self.encode(x, y, a)
        eps = torch.randn(mu.shape[-2:], dtype=mu.dtype, device=mu.device)    # the same for every y
        z = mu + (0.5 * logvar).exp() * eps
        logits = self.dec(self.dec_z(z) + self.dec_y(y))
        log_px = (x.flatten(1) * logits + F.logsigmoid(-logits)).sum(-1)    # Bernoulli
        kl = 0.5 * (z**2 - eps**2 - logvar if sampled else mu**2 + logvar.exp() - 1 - logvar)
        bound = log_px - math.log(self.num_classes) - kl.sum(-1)
        if self.auxiliary:    # + log p(a|z, y, x) - log q(a|x), whose constants cancel
            h = self.aux_x(x.flatten(1)) + self.aux_y(y) + self.aux_z(z)
            mu_a, logvar_a = self.p_a(h).to(x.dtype).chunk(2, -1)
            logvar_a = logvar_a.clamp(-8, 8)
            bound = bound - 0.5 * ((a - mu_a)**2 / logvar_a.exp() + logvar_a).sum(-1) - log_qa
        return bound

    def labelled_bound(self, x, y):
        """A lower bound of log p(x, y) in nats, (B,); x binary. Eq. 6."""
        return self.joint_bound(x, *self.auxiliaries(x), y)

    def unlabelled_bound(self, x, inferred=None):
        """A lower bound of log p(x) in nats, (B,). inferred: `infer` of a view of x. Eq. 7."""
        log_q, a, log_qa = inferred or self.infer(x)
        return (log_q.T.exp() * (self.joint_bound(x, a, log_qa) - log_q.T)).sum(0)

    def log_weights(self, x, k, view=None):
        """(k, B) log importance weights in nats, summed over y: the mean of exp of them is p(x)."""
        a, log_qa = self.auxiliaries((x if view is None else view).repeat(k, 1, 1, 1))
        x = x.repeat(k, 1, 1, 1)
        return self.joint_bound(x, a, log_qa, sampled=True).logsumexp(0).view(k, -1)

    @torch.no_grad()
    def sample(self, y, z=None):
        """Images of the labels y (n,) in the style z (n, z_dim), N(0, I) if left out, as means."""
        z = torch.randn(len(y), self.dec_z.in_features).to(self.dec_z.weight) if z is None else z
        return self.dec(self.dec_z(z) + self.dec_y(y)).to(z.dtype).sigmoid().view(-1, *self.shape)

def random_affine(n, device="cpu", rotate=15, scale=0.15, shear=0.2, shift=0.1):
    """(n, 2, 3) maps, uniform within degrees, relative sizes, slope, and shares of half a side."""
    limits = math.radians(rotate), scale, scale, shear, shift, shift    # no copy to the device
    angle, sx, sy, k, dx, dy = [limit * (2 * torch.rand(n, device=device) - 1) for limit in limits]
    cos, sin = angle.cos(), angle.sin()
    sx, sy = 1 + sx, 1 + sy
    rows = [sx * cos, sx * (k * cos - sin), dx, sy * sin, sy * (k * sin + cos), dy]
    return torch.stack(rows, 1).view(n, 2, 3)

def warp(x, theta):
    """Images x (N, C, H, W) moved by affine maps theta (N, 2, 3); outside pixels are 0."""
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)

def choose_labels(y, n, seed, num_classes=10):
    """Indices of n examples, as many of each class, chosen by the seed; all of them for len(y)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = [order[y.cpu()[order] == c][:n // num_classes] for c in range(num_classes)]
    return torch.arange(n) if n == len(y) else torch.cat(parts)

def scores(model, x, y, seed, samples=1):
    """Error on grey images in per cent; neg_elbo and nll of the binarised ones in nats."""
    import common
    def bounds(x, view, k):    # evaluate's log_px, kl, log_w: U stands for log_px - kl
        u = model.unlabelled_bound(x, model.infer(view)).expand(k, -1)
        return u, torch.zeros_like(u), model.log_weights(x, k, view) if samples > 1 else u
    figures = common.evaluate(bounds, common.binarise(x, seed), x / 255, samples=samples, rows=512)
    wrong = torch.cat([model.classify(part / 255).argmax(1) for part in x.split(500)]) != y
    del figures["rec"], figures["kl"]
    return {"error": 100 * wrong.float().mean().item(), **figures}

def draw_pictures(model, x, folder, names, most=10):    # names: of the labels
    """samples.png: one row per label; analogies.png: grey images x, each redrawn as every label."""
    from matplotlib import get_data_path
    from torchvision.utils import draw_bounding_boxes, save_image
    labels = torch.arange(model.num_classes, device=model.head.weight.device)
    pictures = {"samples": [model.sample(labels) for _ in range(most)]}
    if x is not None:
        style = model.encode(x, model.classify(x).argmax(1), model.auxiliaries(x, False)[0])[0]
        redrawn = [model.sample(y.expand(len(x)), style) for y in labels]
        pictures["analogies"] = [x, *redrawn]
    font, corner = get_data_path() + "/fonts/ttf/DejaVuSans.ttf", torch.tensor([[0, 0, 1, 1]])
    for file, columns in pictures.items():
        grid = torch.stack(columns, 1).cpu().expand(-1, -1, 3, -1, -1)
        grid = grid.repeat_interleave(3, 3).repeat_interleave(3, 4)
        for image, name in zip(grid[:, 0] if file == "samples" else grid[0, 1:], names):
            image.copy_(draw_bounding_boxes(image, corner, [name], "red", font=font, font_size=13))
        save_image(grid.flatten(0, 1), folder / f"{file}.png", nrow=len(columns), padding=2)

def main(argv=None):
    import common
    # flags, data and model
    p = flags()
    args = common.parse(p, argv)
    if args.sample:    # needs no data
        model, folder = common.trained(args, SSLVAE)
        columns, names = math.ceil(args.sample / model.num_classes), args.run.saved["classes"]
        return draw_pictures(model, None, folder, names, columns)
    data = common.images(args)
    x, y = data.train
    classes, names = data.num_classes, args.run.about["classes"]
    fewest, scarce = torch.bincount(y, minlength=classes).min(0)
    most = classes * int(fewest)
    if most == 0 and not args.dry_run:
        p.error(f"class {int(scarce)} has no training image")
    n = max(classes, min(args.labels, most)) if args.dry_run else args.labels
    if not args.dry_run and n != len(y) and (n % classes or n > most):
        p.error(f"--labels {n}: must be a multiple of {classes} up to {most}, or all {len(y)}")
    chosen = choose_labels(y, n, args.seed, classes).to(args.device)
    unlabelled = torch.ones(len(x), dtype=torch.bool, device=args.device)
    unlabelled[chosen] = len(chosen) == len(x)    # with all labels, all images serve both ways
    model_args = dict(shape=data.shape, num_classes=classes, auxiliary=args.auxiliary,
                      z_dim=args.z_dim, hidden=tuple(args.hidden), channels=tuple(args.channels))
    mps = args.device == "mps"    # where batch normalisation of channels_last was wrong
    model = SSLVAE(**model_args).to(args.device, memory_format=None if mps else torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    def view(x):    # what the classifier sees in training
        if args.no_augment:
            return common.binarise(x)
        return warp(x / 255, random_affine(len(x), x.device))
    # training
    weight = len(chosen) / int(unlabelled.sum())
    run = common.Run(args, model, model_args, optimizer)
    for epoch in range(run.epoch, args.epochs):
        for x_u, _ in common.batches(args, epoch, x[unlabelled], y[unlabelled]):
            i = chosen[torch.randint(len(chosen), (min(len(chosen), len(x_u)),), device=x.device)]
            ce = F.cross_entropy(model.classify(view(x[i])), y[i])
            l = model.labelled_bound(common.binarise(x[i]), y[i]).mean()
            u, differ = torch.zeros(2, device=args.device)
            if not args.supervised_only:
                inferred = model.infer(view(x_u))
                u = model.unlabelled_bound(common.binarise(x_u), inferred).mean()
                second = model.infer(view(x_u))[0]    # of another view: to be the same label
                differ = -(inferred[0] + second).logsumexp(1).mean()
            loss = -u - weight * l + args.alpha * (ce + 0.3 * differ)
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model, args)    # under torchrun
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            run.after_step(loss=loss, labelled=-l, unlabelled=-u, cross_entropy=ce, differ=differ)
        if run.end_epoch(scores(run.average, *data.valid, seed=1)):
            draw_pictures(run.average, data.valid[0][:10] / 255, run.dir, names)

    # test and pictures
    model = run.best_model()
    run.finish(scores(model, *data.test, seed=2, samples=args.test_samples))
    draw_pictures(model, data.test[0][:10] / 255, run.dir, names)

if __name__ == "__main__":
    main()
