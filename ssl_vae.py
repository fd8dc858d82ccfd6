# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""Semi-supervised VAE: M2 (Kingma et al. 2014), and its auxiliary form (Maaløe et al. 2016).

    generative model   y ~ Cat(1/C),   z ~ N(0, I),   x | y, z ~ Bernoulli(sigmoid(f(y, z)))
    inference model    q(y|x) = Cat(softmax g(x)),   q(z|x, y) = N(mu(x, y), diag sigma(x, y)^2)
    labelled images    log p(x, y) >= L(x, y) = E_q[log p(x|y, z)] + log p(y)
                                                - KL(q(z|x, y) || p(z))                      (eq. 6)
    unlabelled images  log p(x) >= U(x) = sum_y q(y|x) L(x, y) + H(q(y|x))                       (7)
    objective          mean U + labelled / unlabelled * mean L                                   (8)
                       + alpha * mean log q(y|x)                                                 (9)
                       + 0.3 alpha * mean log sum_y q(y|x') q(y|x''), two views x', x'' of x
    with --auxiliary   q(a|x), q(y|a, x), q(z|a, y, x): L gains log p(a|z, y, x) - log q(a|x)

    python ssl_vae.py --labels 100
    python ssl_vae.py --labels 100 --auxiliary
    python ssl_vae.py --labels 100 --supervised-only    # for comparison
    python ssl_vae.py --resume out/ssl_vae-1 --sample 100

Measured on MNIST, test error: with --labels 100, 1.32 +- 0.62 % (seeds 0 to 4); with --labels 100
--no-augment, 1.67 +- 0.15 % (seeds 0, 1, 2).

Deviations from the papers: L and U have the opposite sign there. q(y|x) is a convolutional network
with batch normalisation. In training it sees grey images under random affine maps, or, as in the
papers, binary images (--no-augment); U is a lower bound whatever q(y|x) sees. The last term of the
objective, which asks for the same label for two views of an image, is new. --alpha 100 is 1,000
times the papers' weight: their 0.1 N in a sum over N images is 0.1 in a mean. Labelled images are
drawn with replacement. The learning rate and SiLU units are other ones; gradients and log variances
are limited; the weights that are tested are averaged over training, up to the epoch with the
smallest validation error.
"""

import copy
import math
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------
# networks


class Dense(nn.Linear):
    """A linear layer with weights of variance 1 / d_in, three times torch's: it learns faster."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)


def silu_layers(hidden, d_out):
    """SiLU and a linear layer in turn: what enters the first SiLU (B, hidden[0]) -> (B, d_out)."""
    layers = []
    for d_in, d_next in pairwise([*hidden, d_out]):
        layers += [nn.SiLU(), Dense(d_in, d_next)]
    return nn.Sequential(*layers)


# ---------------------------------------------------------------------------
# the model


class SSLVAE(nn.Module):
    """Kingma et al. 2014, M2; with auxiliary=True, Maaløe et al. 2016.

    shape: (C, H, W) of the images. z_dim, a_dim: sizes of z and a. num_classes: number of labels.
    hidden: units of the layers. channels: of the classifier's three convolutions.
    """

    def __init__(
        self,
        shape=(1, 28, 28),
        z_dim=50,
        num_classes=10,
        auxiliary=False,
        hidden=(300, 300),
        channels=(16, 32, 64),
        a_dim=50,
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.z_dim = z_dim
        self.num_classes = num_classes
        self.auxiliary = auxiliary
        c, h, w = shape
        c1, c2, c3 = channels
        pixels = c * h * w
        first = hidden[0]

        # the classifier
        self.trunk = nn.Sequential(
            nn.Conv2d(c, c1, 5, padding=2),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.BatchNorm2d(c1),
            nn.ReLU(),
            nn.Conv2d(c1, c2, 3, padding=1),
            nn.BatchNorm2d(c2),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.BatchNorm2d(c3),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Flatten(),
        )
        self.head = nn.Linear(c3 * ((h + 7) // 8) * ((w + 7) // 8), num_classes)

        # a first layer of (x, y) is a sum; its term of x is computed once for all y
        self.enc_x = Dense(pixels, first)
        self.enc_y = nn.Embedding(num_classes, first)
        self.enc = silu_layers(hidden, 2 * z_dim)
        self.dec_z = Dense(z_dim, first)
        self.dec_y = nn.Embedding(num_classes, first)
        self.dec = silu_layers(hidden, pixels)
        if auxiliary:
            self.head_a = nn.Linear(a_dim, num_classes)
            self.q_a = nn.Sequential(Dense(pixels, first), silu_layers(hidden, 2 * a_dim))
            self.enc_a = Dense(a_dim, first)
            self.aux_z = Dense(z_dim, first)
            self.aux_x = Dense(pixels, first)
            self.aux_y = nn.Embedding(num_classes, first)
            self.p_a = silu_layers(hidden, 2 * a_dim)

    def auxiliaries(self, x, at_mean=False):
        """a ~ q(a|x), or its mean, (B, a_dim), and log q(a|x), (B,); None and 0 in M2."""
        if not self.auxiliary:
            return None, 0.0
        mu, logvar = self.q_a(x.flatten(1)).to(x.dtype).chunk(2, 1)
        logvar = logvar.clamp(-8, 8)
        eps = torch.zeros_like(mu) if at_mean else torch.randn_like(mu)
        a = mu + (0.5 * logvar).exp() * eps
        log_qa = -0.5 * (eps**2 + logvar).sum(1)  # without -a_dim / 2 log 2 pi, as log p(a|.)
        return a, log_qa

    def infer(self, x, at_mean=False):
        """log q(y|a, x), (B, num_classes), and the a and log q(a|x) of `auxiliaries`."""
        a, log_qa = self.auxiliaries(x, at_mean)
        logits = self.head(self.trunk(x))
        if self.auxiliary:
            logits = logits + self.head_a(a)
        return logits.to(x.dtype).log_softmax(1), a, log_qa

    def classify(self, x):
        """Logits (B, num_classes) of q(y|x), or of q(y|a, x) at the mean of q(a|x).

        x (B, C, H, W) is in [0, 1]; greys are better than binary pixels. Raises ValueError for
        images of another shape or, on a CPU, out of [0, 1].
        """
        self.check(x)
        log_qy, _, _ = self.infer(x, at_mean=True)
        return log_qy

    def encode(self, x, y, a):
        """mu, logvar (..., B, z_dim) of q(z|x, y), or of q(z|a, y, x)."""
        h = self.enc_x(x.flatten(1)) + self.enc_y(y)
        if self.auxiliary:
            h = h + self.enc_a(a)
        mu, logvar = self.enc(h).to(x.dtype).chunk(2, -1)
        return mu, logvar.clamp(-14, 14)

    def logits(self, z, y):
        """Logits of the pixels of p(x|y, z): z (..., B, z_dim) -> (..., B, C * H * W)."""
        return self.dec(self.dec_z(z) + self.dec_y(y))

    def joint_bound(self, x, a, log_qa, y=None, sampled=False):
        """L(x, y) in nats, (B,), or without y that of every label, (num_classes, B). Eq. 6.

        a, log_qa: of `auxiliaries`. sampled: take log q(z|.) - log p(z) at z in place of the KL.
        """
        if y is None:
            y = torch.arange(self.num_classes, device=x.device)[:, None]
        mu, logvar = self.encode(x, y, a)  # (B, z_dim) or (num_classes, B, z_dim)
        eps = torch.randn(mu.shape[-2:], dtype=mu.dtype, device=x.device)  # the same for every y
        z = mu + (0.5 * logvar).exp() * eps
        logits = self.logits(z, y)  # l, and log sigmoid(l) = l + log sigmoid(-l)
        log_px = (x.flatten(1) * logits + F.logsigmoid(-logits)).sum(-1)
        if sampled:
            kl = 0.5 * (z**2 - eps**2 - logvar).sum(-1)
        else:
            kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)
        bound = log_px - math.log(self.num_classes) - kl
        if self.auxiliary:
            h = self.aux_x(x.flatten(1)) + self.aux_y(y) + self.aux_z(z)
            mu_a, logvar_a = self.p_a(h).to(x.dtype).chunk(2, -1)
            logvar_a = logvar_a.clamp(-8, 8)
            log_pa = -0.5 * ((a - mu_a) ** 2 / logvar_a.exp() + logvar_a).sum(-1)
            bound = bound + log_pa - log_qa
        return bound

    def labelled_bound(self, x, y):
        """L(x, y) <= log p(x, y) in nats, (B,), of binary images x (B, C, H, W), labels y (B,).

        Raises ValueError for x or y of another shape or, on a CPU, pixels out of [0, 1]. Eq. 6.
        """
        self.check(x)
        if y.shape != x.shape[:1] or y.dtype != torch.int64:
            raise ValueError(f"y are labels ({len(x)},) int64, not {y.dtype} {tuple(y.shape)}")
        a, log_qa = self.auxiliaries(x)
        return self.joint_bound(x, a, log_qa, y)

    def unlabelled_bound(self, x, inferred=None):
        """U(x) <= log p(x) in nats, (B,), of binary images x (B, C, H, W). Eq. 7.

        inferred: what `infer` says of another view of the images; of x if it is left out. Raises
        ValueError as `labelled_bound` does.
        """
        self.check(x)
        if inferred is None:
            inferred = self.infer(x)
        log_qy, a, log_qa = inferred
        bounds = self.joint_bound(x, a, log_qa)  # (num_classes, B)
        return (log_qy.T.exp() * (bounds - log_qy.T)).sum(0)

    def log_weights(self, x, k, view=None):
        """k importance weights for p(x), their logarithms in nats, (k, B); exact sums over y.

        view: images that a is inferred from; x if it is left out.
        """
        if view is None:
            view = x
        a, log_qa = self.auxiliaries(view.repeat(k, 1, 1, 1))
        bounds = self.joint_bound(x.repeat(k, 1, 1, 1), a, log_qa, sampled=True)
        return bounds.logsumexp(0).view(k, -1)

    def check(self, x):
        """Raise ValueError for images that would give wrong numbers."""
        if x.shape[1:] != self.shape or not x.is_floating_point():
            raise ValueError(f"x are floats (B, *{self.shape}), not {x.dtype} {tuple(x.shape)}")
        # on a GPU, looking at values would interrupt it; interpolation may round to just above 1
        if x.device.type == "cpu" and not ((x >= 0) & (x < 1.001)).all():
            raise ValueError("the pixels of x are in [0, 1]; divide 0..255 by 255")

    @torch.no_grad()
    def sample(self, y, z=None):
        """Images of labels y (n,), as means (n, C, H, W).

        z (n, z_dim) is their style, drawn from N(0, I) if it is left out.
        """
        if z is None:
            z = torch.randn(len(y), self.z_dim).to(self.dec_z.weight)
        return self.logits(z, y).to(z.dtype).sigmoid().view(-1, *self.shape)


# ---------------------------------------------------------------------------
# labelled images and views


def choose_labels(y, n, seed, num_classes=10):
    """Indices of n examples, equally many of each class, chosen by the seed, or of all len(y)."""
    if n == len(y):
        return torch.arange(n)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    labels = y.cpu()[order]
    parts = []
    for c in range(num_classes):
        parts.append(order[labels == c][: n // num_classes])
    return torch.cat(parts)


def random_affine(n, device="cpu", rotate=15, scale=0.15, shear=0.2, shift=0.1):
    """Random affine maps (n, 2, 3).

    rotate: largest angle in degrees. scale: largest relative change of width and height. shear:
    largest slope of upright lines. shift: largest shift, as a share of half a side.
    """

    def uniform(limit):
        return limit * (2 * torch.rand(n, device=device) - 1)

    angle = uniform(math.radians(rotate))
    sx = 1 + uniform(scale)
    sy = 1 + uniform(scale)
    k = uniform(shear)
    dx = uniform(shift)
    dy = uniform(shift)
    cos = angle.cos()
    sin = angle.sin()
    row_x = [sx * cos, sx * (k * cos - sin), dx]
    row_y = [sy * sin, sy * (k * sin + cos), dy]
    return torch.stack(row_x + row_y, 1).view(n, 2, 3)


def warp(x, theta):
    """Images x (N, C, H, W) moved by affine maps theta (N, 2, 3); outside pixels are 0."""
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


# ---------------------------------------------------------------------------
# pictures


def draw_samples(model, n, names, folder):
    """samples.png: n images or more, one row per label; those of a column share the noise of z."""
    import common

    device = next(model.parameters()).device
    classes = len(names)
    blocks = math.ceil(n / (10 * classes))
    y = torch.arange(classes, device=device).repeat_interleave(10).repeat(blocks)
    noise = torch.randn(blocks, 1, 10, model.z_dim, device=device)
    noise = noise.expand(-1, classes, -1, -1).flatten(0, 2)  # the same for every label
    images = model.sample(y, noise).unflatten(0, (-1, 10))
    title = "drawn by the model: one row per label, one column per noise of z"
    common.save_grid(folder / "samples.png", images, title, names * blocks)


@torch.no_grad()
def draw_pictures(model, x, names, folder):
    """samples.png; analogies.png: grey images x, and each below it as every label, in its style."""
    import common

    draw_samples(model, 100, names, folder)
    guess = model.classify(x).argmax(1)
    a, _ = model.auxiliaries(x, at_mean=True)
    style, _ = model.encode(x, guess, a)
    rows = [x]
    for c in range(len(names)):
        rows.append(model.sample(torch.full_like(guess, c), style))
    title = "images, and each drawn by the model as every label, in its style"
    common.save_grid(folder / "analogies.png", torch.stack(rows), title, ["image", *names])


# ---------------------------------------------------------------------------
# training


def flags():
    """The flags of this script."""
    import common

    p = common.parser("ssl_vae", __doc__, epochs=12, batch_size=200, lr=1e-3, test_samples=20)
    add = p.add_argument
    count = common.at_least(1)
    add(
        "--labels",
        type=count,
        default=1000,
        metavar="N",
        help="number of labelled images, equally many of each class (default: %(default)s)",
    )
    add("--z-dim", type=count, default=50, help="size of z (default: %(default)s)")
    add(
        "--hidden",
        type=count,
        nargs="+",
        default=[300, 300],
        help="units of the layers of encoder and decoder (default: 300 300)",
    )
    add(
        "--alpha",
        type=common.at_least(0, float),
        default=100.0,
        help="weight of the classification loss (default: %(default)s)",
    )
    add("--auxiliary", action="store_true", help="add an auxiliary latent variable")
    add("--supervised-only", action="store_true", help="train on the labelled images alone")
    add(
        "--no-augment",
        action="store_true",
        help="train the classifier on binary images instead of randomly transformed grey ones",
    )
    return p


def main(argv=None):
    import common  # here, so that the model can be copied without it

    # flags; with --sample, pictures of a trained model, and that's all
    p = flags()
    args, checkpoint = common.parse(p, argv)
    if args.sample:
        model, folder = common.load_model(SSLVAE, args, checkpoint)
        draw_samples(model, args.sample, checkpoint["classes"], folder)
        return

    # data
    data = common.load_images(args)
    x, y = data.train
    classes = len(data.classes)
    counts = torch.bincount(y, minlength=classes)
    fewest = int(counts.min())
    n = args.labels
    if args.dry_run:  # one batch has few images of a class, or none
        n = max(classes, min(n, classes * fewest))
    elif n != len(y) and (n % classes > 0 or n > classes * fewest):
        rarest = data.classes[int(counts.argmin())]
        p.error(
            f"--labels {n}: must be a multiple of {classes} up to {classes * fewest} (class "
            f"{rarest} has {fewest} images), or {len(y)}, which is all"
        )
    chosen = choose_labels(y, n, args.seed, classes).to(args.device)
    x_unlabelled = x
    if len(chosen) < len(x):  # else all images serve both ways
        is_unlabelled = torch.ones(len(x), dtype=torch.bool, device=args.device)
        is_unlabelled[chosen] = False
        x_unlabelled = x[is_unlabelled]

    def view(x):
        """What the classifier sees of grey images x in training."""
        if args.no_augment:
            return common.binarise(x)
        return warp(x / 255, random_affine(len(x), x.device))

    def scores(model, images, labels, seed, samples=1):
        """Of grey images the error in per cent; of binary ones neg_elbo and nll in nats."""

        def mistakes(grey, y, k):
            wrong = (model.classify(grey).argmax(1) != y).float().expand(k, -1)
            return -wrong, wrong, wrong  # `evaluate` takes the mean of minus the first

        def bounds(binary, grey, k):
            u = model.unlabelled_bound(binary, model.infer(grey)).expand(k, -1)
            log_w = u
            if samples > 1:
                log_w = model.log_weights(binary, k, grey)
            return u, torch.zeros_like(u), log_w

        binary = common.binarise(images, seed)
        grey = images / 255
        error = common.evaluate(mistakes, grey, labels, at_once=512)
        bound = common.evaluate(bounds, binary, grey, samples=samples, at_once=512)
        figures = {"error": 100 * error["rec"], "neg_elbo": bound["neg_elbo"]}
        if samples > 1:
            figures["nll"] = bound["nll"]
        figures["seconds"] = error["seconds"] + bound["seconds"]
        return figures

    # model and optimiser
    model_args = {
        "shape": data.shape,
        "z_dim": args.z_dim,
        "num_classes": classes,
        "auxiliary": args.auxiliary,
        "hidden": args.hidden,
    }
    memory_format = torch.channels_last
    if args.device == "mps":  # where batch normalisation of channels_last was wrong
        memory_format = torch.contiguous_format
    model = SSLVAE(**model_args).to(args.device, memory_format=memory_format)
    average = common.averaged(model)
    best = copy.deepcopy(average.module)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    # what a checkpoint holds; its "model" is the one with the best validation
    parts = {"weights": model, "average": average, "optimizer": optimizer, "model": best}
    facts = common.facts("ssl_vae", args, data, model_args)
    folder, rows = common.begin(args, checkpoint, facts, parts)

    # training
    ratio = len(chosen) / len(x_unlabelled)
    for epoch in range(len(rows), args.epochs):
        began = time.time()
        steps = []
        for (x_u,) in common.batches(args, epoch, x_unlabelled):
            # a batch of labelled images
            size = min(len(chosen), len(x_u))
            i = chosen[torch.randint(len(chosen), (size,), device=x.device)]
            ce = F.cross_entropy(model.classify(view(x[i])), y[i])
            L = model.labelled_bound(common.binarise(x[i]), y[i]).mean()  # eq. 6

            # the unlabelled images
            if args.supervised_only:
                U = consistency = torch.tensor(0.0)
                neg_elbo = -L
            else:
                inferred = model.infer(view(x_u))
                U = model.unlabelled_bound(common.binarise(x_u), inferred).mean()  # eq. 7
                log_qy, _, _ = inferred
                log_qy_2, _, _ = model.infer(view(x_u))  # of another view
                consistency = -(log_qy + log_qy_2).logsumexp(1).mean()
                neg_elbo = -U

            loss = -U - ratio * L + args.alpha * (ce + 0.3 * consistency)  # eqs. 8, 9
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model)  # under torchrun
            norm = nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            average.update_parameters(model)
            steps.append(
                common.means(
                    loss=loss,
                    neg_elbo=neg_elbo,
                    labelled=-L,
                    cross_entropy=ce,
                    consistency=consistency,
                    grad_norm=norm,
                )
            )

        # validation, and the checkpoint
        valid = scores(average.module, *data.valid, seed=1)
        is_best = common.end_epoch(args, rows, began, steps, valid)
        if is_best:
            best.load_state_dict(average.module.state_dict())
            draw_pictures(best, data.valid[0][:10] / 255, data.classes, folder)
        common.save(folder, facts, rows, parts)

    # test and pictures
    test = scores(best, *data.test, seed=2, samples=args.test_samples)
    draw_pictures(best, data.test[0][:10] / 255, data.classes, folder)
    common.finish(args, folder, facts, rows, best, test)


if __name__ == "__main__":
    import common

    common.start(main)
