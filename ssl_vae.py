"""Semi-supervised VAE: M2 (Kingma et al. 2014) and its auxiliary-variable form (Maaloe et al. 2016).

    generative model   y ~ Cat(1/C),   z ~ N(0, I),   x | y, z ~ Bernoulli(sigmoid(f(y, z)))
    inference model    q(y|x) = Cat(softmax g(x)),   q(z|x, y) = N(mu(x, y), diag sigma(x, y)^2)
    labelled           log p(x, y) >= L(x, y) = E_q[log p(x|y, z) + log p(y)] - KL(q(z|x, y) || p(z))  (eq. 6)
    unlabelled         log p(x) >= U(x) = sum_y q(y|x) L(x, y) + H(q(y|x)), summed exactly             (eq. 7)
    objective          mean U + mean L * labelled / unlabelled + alpha * mean log q(y|x) on the labels (eq. 9)
                       + 0.3 alpha * mean log sum_y q(y|x') q(y|x'') over two views x', x'' of unlabelled images
    with --auxiliary   q(a|x), q(y|a, x), q(z|a, y, x), p(a|z, y, x):  + log p(a|z, y, x) - log q(a|x) inside L

    python ssl_vae.py --labels 100
    python ssl_vae.py --labels 100 --no-augment       # as the papers train
    python ssl_vae.py --labels 100 --supervised-only  # the same classifier without unlabelled images
    python ssl_vae.py --epochs 0 --resume out/ssl_vae/best.pt

Measured, MNIST, mean of three seeds, 8 to 14 minutes on one core of a server CPU: a test error of 0.67, 0.76 and
1.18 % with 10,000, 1,000 and 100 labels. More in the README.

Deviations from the papers: q(y|x) is a small convolutional network with batch normalisation. It sees
the image through a random affine map (`--no-augment`: as it is), and the grey values while z and x
are about the binarised image. U(x) is a bound for any q(y|.), hence for every view of x: so the
unlabelled images, too, teach q(y|.) that moving a digit does not change it, and a term of its own asks
for that: the agreement of two views. `--no-augment` leaves it out with the views. best.pt is the epoch of
the smallest validation error, as that is what this model is for; ties go to the later epoch.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def linear(d_in, d_out):
    """A linear layer with weights of variance 1 / d_in; torch's default is a third of it, and learns slower here."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=max(1, d_in) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class SSLVAE(nn.Module):
    """M2, or with auxiliary=True the auxiliary deep generative model.

    shape: (C, H, W). hidden: units of the layers of encoder and decoder. channels: of the three
    convolutions of the classifier.
    """

    def __init__(self, shape=(1, 28, 28), z_dim=50, num_classes=10, auxiliary=False,
                 hidden=(300, 300), channels=(16, 32, 64), a_dim=50):
        super().__init__()
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        self.shape, self.z_dim, self.num_classes, self.auxiliary = tuple(shape), z_dim, num_classes, auxiliary
        d, h, rest = math.prod(shape), hidden[0], hidden[1:]
        c1, c2, c3 = channels
        pool = lambda: nn.MaxPool2d(2, ceil_mode=True)
        self.trunk = nn.Sequential(
            nn.Conv2d(shape[0], c1, 5, padding=2), pool(), nn.BatchNorm2d(c1), nn.ReLU(),
            nn.Conv2d(c1, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(), pool(),
            nn.Conv2d(c2, c3, 3, padding=1), nn.BatchNorm2d(c3), nn.ReLU(), pool(),
            nn.Flatten()).to(memory_format=torch.channels_last)
        features = c3 * math.prod((s + 7) // 8 for s in shape[1:])
        self.head = nn.Linear(features, num_classes)
        # A layer over (x, y, ...) is a sum of one product each: what does not depend on y is computed once.
        self.enc_x, self.enc_y = linear(d, h), nn.Embedding(num_classes, h)
        self.enc = self.layers(h, rest, 2 * z_dim)
        self.dec_z, self.dec_y = linear(z_dim, h), nn.Embedding(num_classes, h)
        self.dec = self.layers(h, rest, d)
        if auxiliary:
            self.head_a = nn.Linear(a_dim, num_classes)
            self.q_a = nn.Sequential(linear(d, h), self.layers(h, rest, 2 * a_dim))
            self.enc_a = linear(a_dim, h)
            self.aux_x, self.aux_y, self.aux_z = linear(d, h), nn.Embedding(num_classes, h), linear(z_dim, h)
            self.p_a = self.layers(h, rest, 2 * a_dim)

    @staticmethod
    def layers(d_in, hidden, d_out):
        """From the sum that enters a first layer's nonlinearity to the output."""
        sizes = [d_in, *hidden, d_out]
        return nn.Sequential(*[m for i, o in zip(sizes, sizes[1:]) for m in (nn.SiLU(), linear(i, o))])

    def auxiliaries(self, x):
        """a ~ q(a|x), (B, a_dim), and log q(a|x), (B,), in nats; None and 0 in plain M2."""
        if not self.auxiliary:
            return None, 0.0
        mu, logvar = self.q_a(x.flatten(1)).chunk(2, -1)
        logvar = logvar.clamp(-8, 8)
        eps = torch.randn_like(mu)
        return mu + (0.5 * logvar).exp() * eps, -0.5 * (eps ** 2 + logvar + math.log(2 * math.pi)).sum(-1)

    def infer(self, x):
        """log q(y|a, x), (B, num_classes), at a ~ q(a|x), with that a and log q(a|x)."""
        a, log_qa = self.auxiliaries(x)
        return self.logits(x, a).log_softmax(-1), a, log_qa

    def logits(self, x, a):
        out = self.head(self.trunk(x))
        return out if a is None else out + self.head_a(a)

    def classify(self, x):
        """Logits (B, num_classes) of q(y|x); x (B, C, H, W). With auxiliaries, at the mean of q(a|x)."""
        a = self.q_a(x.flatten(1)).chunk(2, -1)[0] if self.auxiliary else None
        return self.logits(x, a)

    def joint_bound(self, x, y, a, log_qa, sampled=False):
        """L(x, y): x (B, C, H, W), y (B,) or (num_classes, 1) for every label -> (B,) or (num_classes, B).

        With sampled=True the log importance weight: the KL's integrand at the sampled z in place of the KL.
        """
        x = x.flatten(1)
        h = self.enc_x(x) + self.enc_y(y)
        if self.auxiliary:
            h = h + self.enc_a(a)
        mu, logvar = self.enc(h).chunk(2, -1)
        logvar = logvar.clamp(-14, 14)
        eps = torch.randn(len(x), self.z_dim, device=x.device)  # one for all labels: their difference is what counts
        z = mu + (0.5 * logvar).exp() * eps
        logits = self.dec(self.dec_z(z) + self.dec_y(y))
        log_px = (x * logits + F.logsigmoid(-logits)).sum(-1)                     # log Bernoulli
        kl = 0.5 * (z ** 2 - eps ** 2 - logvar if sampled else mu ** 2 + logvar.exp() - 1 - logvar).sum(-1)
        bound = log_px - kl - math.log(self.num_classes)
        if self.auxiliary:
            mu_a, logvar_a = self.p_a(self.aux_x(x) + self.aux_y(y) + self.aux_z(z)).chunk(2, -1)
            logvar_a = logvar_a.clamp(-8, 8)
            log_pa = -0.5 * ((a - mu_a) ** 2 * (-logvar_a).exp() + logvar_a + math.log(2 * math.pi)).sum(-1)
            bound = bound + log_pa - log_qa
        return bound

    def labelled_bound(self, x, y):
        """A lower bound of log p(x, y) in nats, (B,); x (B, C, H, W) binary, y (B,) int64. Eq. 6."""
        return self.joint_bound(x, y, *self.auxiliaries(x))

    def unlabelled_bound(self, x, inferred=None):
        """A lower bound of log p(x) in nats, (B,), summed exactly over y. Eq. 7.

        inferred: `infer` of anything, such as x moved about, in place of `infer(x)`.
        """
        log_q, a, log_qa = inferred or self.infer(x)
        every = torch.arange(self.num_classes, device=x.device)[:, None]
        return (log_q.T.exp() * (self.joint_bound(x, every, a, log_qa) - log_q.T)).sum(0)

    def log_weights(self, x, k, view=None):
        """(k, B) log importance weights in nats; the mean of exp of them estimates p(x), exactly summed over y."""
        x, view = (t.repeat(k, 1, 1, 1) for t in (x, x if view is None else view))
        every = torch.arange(self.num_classes, device=x.device)[:, None]
        return self.joint_bound(x, every, *self.auxiliaries(view), sampled=True).logsumexp(0).view(k, -1)

    def draw(self, z, y):
        """Means of p(x|y, z) as images (B, C, H, W)."""
        return self.dec(self.dec_z(z) + self.dec_y(y)).sigmoid().view(-1, *self.shape)

    def sample(self, y):
        """Images of the labels y (n,), as means (n, C, H, W)."""
        return self.draw(torch.randn(len(y), self.z_dim, device=y.device), y)

    def style(self, x):
        """The mean of q(z|x, y) at the most probable y, (B, z_dim)."""
        a = self.q_a(x.flatten(1)).chunk(2, -1)[0] if self.auxiliary else None
        h = self.enc_x(x.flatten(1)) + self.enc_y(self.logits(x, a).argmax(-1))
        return self.enc(h if a is None else h + self.enc_a(a)).chunk(2, -1)[0]


def choose_labels(y, n, seed, num_classes=10):
    """Indices of n examples, as many of each class, chosen by the seed; all of them for n = len(y)."""
    y = y.cpu()
    if n == len(y):
        return torch.arange(n)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[y[order] == c][:n // num_classes] for c in range(num_classes)])


def main(argv=None):
    import common  # here, not above: the class needs torch alone and can be copied without it
    from torchvision.utils import save_image

    p = common.parser(__doc__, epochs=12, batch_size=200, lr=1e-3, test_samples=50)
    p.add_argument("--labels", type=common.at_least(1), default=1000, metavar="N", help="how many labels are given")
    p.add_argument("--z-dim", type=common.at_least(1), default=50, help="size of z")
    p.add_argument("--alpha", type=common.at_least(0, float), default=100.0, help="weight of the classifier's own part")
    p.add_argument("--auxiliary", action="store_true", help="the auxiliary variable of Maaloe et al. 2016")
    p.add_argument("--supervised-only", action="store_true", help="learn from the labelled images alone")
    p.add_argument("--no-augment", action="store_true", help="the classifier sees the images as they are")
    args = common.parse(p, argv)

    data = common.images(args)
    x, y = data.train
    n, most = args.labels, data.num_classes * int(torch.bincount(y, minlength=data.num_classes).min())
    if args.dry_run:
        n = min(n, max(most, data.num_classes))
    elif n != len(y) and (n % data.num_classes or n > most):
        p.error(f"--labels {n}: must be a multiple of {data.num_classes} up to {most}, as many of each class, "
                f"or all {len(y)}")
    chosen = choose_labels(y, n, args.seed, data.num_classes).to(x.device)
    n, x_labelled, y_labelled = len(chosen), x[chosen], y[chosen]
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
    rest[chosen] = len(chosen) == len(x)
    weight = n / max(1, int(rest.sum()))

    model_args = dict(shape=data.shape, z_dim=args.z_dim, num_classes=data.num_classes,
                      auxiliary=args.auxiliary)
    model = SSLVAE(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    labelled, unlabelled, infer, classify = (common.compiled(f, args) for f in (
        model.labelled_bound, model.unlabelled_bound, model.infer, model.classify))

    def view(x):  # what the classifier sees in training
        x = common.grey(x)
        return x if args.no_augment else common.warp(x, common.random_affine(len(x), device=x.device))

    @torch.inference_mode()
    def scores(m, x, y, seed, samples=1):
        """Error of the grey images in per cent, and the bounds of the binarised ones in nats."""
        wrong = sum((m.classify(common.grey(a)).argmax(-1) != b).sum() for a, b in zip(x.split(500), y.split(500)))

        def bound(pair, y, k):  # pairs of binary and grey images
            u = m.unlabelled_bound(pair[:, 0], m.infer(pair[:, 1])).expand(k, -1)
            return u, torch.zeros_like(u), m.log_weights(pair[:, 0], k, pair[:, 1]) if samples > 1 else u
        pairs = torch.stack([common.binarise(x, seed), common.grey(x)], 1)
        figures = common.evaluate(bound, pairs, y, samples, rows=512)
        return {"error": 100 * float(wrong) / len(x), **{k: figures[k] for k in ("neg_elbo", "nll") if k in figures}}

    run = common.Run(args, model, model_args, optimizer, (x[rest], y[rest]), lambda m: scores(m, *data.valid, seed=1))
    for x, _ in run:
        i = torch.randint(n, (min(n, args.batch_size),), device=x.device).chunk(args.world)[args.rank]
        x_l, y_l = x_labelled[i], y_labelled[i]
        cross_entropy = F.cross_entropy(classify(view(x_l)), y_l)
        l, u, differ = labelled(common.binarise(x_l), y_l).mean(), 0.0, 0.0
        if not args.supervised_only:
            inferred = infer(view(x))
            u = unlabelled(common.binarise(x), inferred).mean()
            if not args.no_augment:  # -log of the probability that two views' labels, drawn from q, are the same
                differ = -torch.logsumexp(inferred[0] + infer(view(x))[0], -1).mean()
        loss = -u - weight * l + args.alpha * (cross_entropy + 0.3 * differ)
        run.log(loss, labelled=-l, unlabelled=-u, cross_entropy=cross_entropy, differ=differ)
        optimizer.zero_grad()
        loss.backward()
        run.share()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    model = run.best_model()
    run.finish(val=scores(model, *data.valid, seed=1),
               test=scores(model, *data.test, seed=2, samples=args.test_samples))

    with torch.inference_mode():
        torch.manual_seed(args.seed)
        save_image(model.sample(torch.arange(data.num_classes, device=args.device).repeat_interleave(10)),
                   run.dir / "samples.png", nrow=10, padding=1)
        x = common.grey(data.test[0][:10])  # a row each: the image, then its style as every digit
        every = torch.arange(data.num_classes, device=x.device)
        rows = [torch.cat([image[None], model.draw(z.expand(len(every), -1), every)])
                for image, z in zip(x, model.style(x))]
        save_image(torch.cat(rows), run.dir / "analogies.png", nrow=len(every) + 1, padding=1)


if __name__ == "__main__":
    main()
