"""Variational recurrent neural network (Chung et al. 2015, "A Recurrent Latent Variable Model for Sequential
Data"), and its conditional form.

    prior              z_t | x_{<t}, z_{<t} ~ N(mu_p(h_{t-1}), diag sigma_p(h_{t-1})^2)                   (eq. 5)
    generation         x_t | z_t, x_{<t}, z_{<t} ~ p(x_t | phi_z(z_t), h_{t-1})                           (eq. 6)
    recurrence         h_t = GRU([phi_x(x_t), phi_z(z_t)], h_{t-1})                                       (eq. 7)
    inference          z_t | x_{<=t}, z_{<t} ~ N(mu_q(phi_x(x_t), h_{t-1}), diag sigma_q(...)^2)          (eq. 9)
    bound              log p(x) >= E_q sum_t [log p(x_t|z_{<=t}, x_{<t})
                                              - KL(q(z_t|x_{<=t}, z_{<t}) || p(z_t|x_{<t}, z_{<t}))]     (eq. 11)

Given a label y, each factor of the joint distribution may depend on it:

    p(x, z | y) = prod_t p(x_t | z_{<=t}, x_{<t}, y) p(z_t | x_{<t}, z_{<t}, y)
    q(z | x, y) = prod_t q(z_t | x_{<=t}, z_{<t}, y)
    log p(x|y)  = log E_q[p(x, z|y) / q(z|x, y)] >= E_q[log p(x, z|y) - log q(z|x, y)]      (Jensen)
                = E_q sum_t [log p(x_t|z_{<=t}, x_{<t}, y) - KL(q(z_t|x_{<=t}, z_{<t}, y) || p(z_t|x_{<t}, z_{<t}, y))]

as log p - log q is a sum over t, and given the past the expectation over z_t of its t-th term is minus that
KL. So the label enters prior, inference, generation and recurrence; nothing else changes.

A sequence ends by itself: after every step, e_t ~ Bernoulli(s(h_t)) says whether x_t was the last one.
The bound is then one of log p(x, length): log(1 - s(h_t)) joins it for t < T, and log s(h_T) at the end.

    python vrnn.py                                               # MNIST, row by row
    python vrnn.py --dataset pendigits --conditional --digits 2718
    python vrnn.py --dataset speech --conditional --digits 2718
    python vrnn.py --prior standard                              # VRNN-I: z_t ~ N(0, I)
    python vrnn.py --z-dim 0                                     # the RNN without latents

Where --epochs and --batch-size are left out: rows 7 and 128, pen strokes 30 and 48, speech 60 and 32.

Measured, MNIST rows, seed 0, `python vrnn.py --epochs 10`: test -ELBO 81.77 nats, 42 minutes of one core.

Deviations from the paper: a GRU in place of the LSTM, SiLU units, and layers of 256 for all data; integers are spread
over their recording's step by uniform noise, or a density of them could grow for ever; a frame of speech enters as its
orthonormal cosine transform, in which a diagonal covariance is a spectrum; a running average of the weights is tested.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def bernoulli(x, logits):
    """log Bernoulli(x; sigmoid(logits)) in nats, elementwise."""
    return x * logits + F.logsigmoid(-logits)


class VRNN(nn.Module):
    """Chung et al. 2015.

    x_dim: size of x_t; 3 for "pen", whose rows are (dx, dy, pen-up). z_dim: size of z_t; 0 is an RNN without
    latents. likelihood: "bernoulli"; "gaussian", a mixture of diagonal Gaussians; "pen", a mixture of
    bivariate Gaussians with correlation, times a Bernoulli for pen-up. prior: "learned", or "standard" for
    N(0, I). num_classes: of labels y; 0 is the form without. stop: whether the model says when a sequence
    ends. mixtures: components of the mixture. hidden: units of the GRU. features: units of every other layer.
    """

    def __init__(self, x_dim=28, z_dim=48, likelihood="bernoulli", prior="learned", num_classes=0, stop=False,
                 mixtures=1, hidden=384, features=256):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian", "pen") or likelihood == "pen" and x_dim != 3:
            raise ValueError(f'likelihood is "bernoulli", "gaussian" or, of three columns, "pen", not {likelihood!r}')
        if prior not in ("learned", "standard"):
            raise ValueError(f'prior is "learned" or "standard", not {prior!r}')
        self.x_dim, self.z_dim, self.likelihood, self.stop, self.mixtures = x_dim, z_dim, likelihood, stop, mixtures
        self.sizes = [3 * hidden, features, features, features]   # what h and y enter: GRU, posterior, prior, output
        self.start = nn.Parameter(torch.zeros(hidden))
        self.phi_x = nn.Sequential(nn.Linear(x_dim, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())
        self.gru_x, self.gru_h = nn.Linear(features, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.label = nn.Embedding(num_classes, sum(self.sizes)) if num_classes else None
        self.out_h = nn.Linear(hidden, features)
        if z_dim:
            self.phi_z = nn.Sequential(nn.Linear(z_dim, features), nn.SiLU())
            self.gru_z = nn.Linear(features, 3 * hidden, bias=False)
            self.out_z = nn.Linear(features, features, bias=False)
            self.enc_x, self.enc_h = nn.Linear(features, features), nn.Linear(hidden, features, bias=False)
            self.enc = nn.Sequential(nn.SiLU(), nn.Linear(features, 2 * z_dim))
            self.prior_h, self.prior = (None, None) if prior == "standard" else (
                nn.Linear(hidden, features), nn.Sequential(nn.SiLU(), nn.Linear(features, 2 * z_dim)))
        outputs = {"bernoulli": x_dim, "gaussian": mixtures * (1 + 2 * x_dim), "pen": mixtures * 6 + 1}[likelihood]
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(features, features), nn.SiLU(), nn.Linear(features, outputs))
        self.end = nn.Linear(hidden, 1) if stop else None

    def labels(self, y, n):
        """What y (B,) adds to the inputs of GRU, posterior, prior and output, each (B, .), or zeros (n, .)."""
        if (y is None) != (self.label is None):
            raise ValueError("labels y are needed by a model of num_classes > 0, and taken by no other")
        if self.label is None:
            return [self.start.new_zeros(n, s) for s in self.sizes]
        return self.label(y).split(self.sizes, -1)

    def prior_of(self, h, label):
        """mu, logvar (..., z_dim) of p(z_t|h_{t-1})."""
        if self.prior is None:
            return h.new_zeros(2, *h.shape[:-1], self.z_dim).unbind(0)
        mu, logvar = self.prior(self.prior_h(h) + label).chunk(2, -1)
        return mu, logvar.clamp(-10, 10)

    def output(self, h, f_z, label):
        """The parameters of p(x_t|z_t, h_{t-1})."""
        return self.out(self.out_h(h) + label + (self.out_z(f_z) if self.z_dim else 0))

    def gru(self, gates, h):
        """gates (B, 3 H), what the inputs add to reset and update gates and candidate; h (B, H) -> new h."""
        sizes = [2 * h.shape[-1], h.shape[-1]]
        (a, a_n), (b, b_n) = gates.split(sizes, -1), self.gru_h(h).split(sizes, -1)
        reset, update = torch.sigmoid(a + b).chunk(2, -1)
        return torch.lerp(torch.tanh(torch.addcmul(a_n, reset, b_n)), h, update)

    def step(self, enc_x, gates, h):
        """A time step of inference and recurrence, only what depends on the step before: h, and what was drawn."""
        if not self.z_dim:
            return self.gru(gates, h),
        mu, logvar = self.enc(enc_x + self.enc_h(h)).chunk(2, -1)
        logvar = logvar.clamp(-10, 10)
        eps = torch.randn_like(mu)
        f_z = self.phi_z(torch.addcmul(mu, (0.5 * logvar).exp(), eps))
        return self.gru(torch.addmm(gates, f_z, self.gru_z.weight.T), h), mu, logvar, eps, f_z

    def mixture(self, out):
        """Of the output's parameters: log weights (..., K), means and log variances (..., K, D), and the rest."""
        k, d = self.mixtures, 2 if self.likelihood == "pen" else self.x_dim
        weights, mu, logvar, rest = out.split([k, k * d, k * d, out.shape[-1] - k - 2 * k * d], -1)
        return weights.log_softmax(-1), mu.unflatten(-1, (k, d)), logvar.unflatten(-1, (k, d)).clamp(-12, 12), rest

    def log_px(self, x, out):
        """log p(x_t|z_t, h_{t-1}) in nats: x (..., D), out (..., .) -> (...)."""
        if self.likelihood == "bernoulli":
            return bernoulli(x, out).sum(-1)
        log_weights, mu, logvar, rest = self.mixture(out)
        if self.likelihood == "gaussian":
            log_n = -0.5 * ((x[..., None, :] - mu) ** 2 * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)
            return torch.logsumexp(log_weights + log_n, -1)
        # a bivariate Gaussian with correlation r is N(x_1) N(x_2 | x_1), in standardised coordinates
        r = 0.99 * torch.tanh(rest[..., :-1])
        u, v = ((x[..., None, :2] - mu) * (-0.5 * logvar).exp()).unbind(-1)
        log_n = -0.5 * (u ** 2 + (v - r * u) ** 2 / (1 - r ** 2) + torch.log(1 - r ** 2) + logvar.sum(-1))
        return torch.logsumexp(log_weights + log_n, -1) - math.log(2 * math.pi) + bernoulli(x[..., 2], rest[..., -1])

    def forward(self, x, lengths, y=None, k=None):
        """x (T, B, D), lengths (B,), labels y (B,) -> log_px, kl, log_w in nats, each (B,), or (k, B) for k samples.

        What stands behind a sequence's end plays no part.
        """
        if k is not None:
            x, lengths, y = x.repeat(1, k, 1), lengths.repeat(k), None if y is None else y.repeat(k)
        terms = [t.sum(0) for t in self.terms(x, lengths, y)]
        return tuple(terms if k is None else (t.view(k, -1) for t in terms))

    def terms(self, x, lengths, y=None):
        """As `forward`, of every time step: (T, B)."""
        steps, n = x.shape[:2]
        t = torch.arange(steps, device=x.device)[:, None]
        inside = t < lengths
        x = torch.where(inside[..., None], x, 0.0)
        label_gru, label_enc, label_prior, label_out = self.labels(y, n)
        f_x = self.phi_x(x)
        gates = self.gru_x(f_x) + label_gru
        enc_x = self.enc_x(f_x) + label_enc if self.z_dim else gates
        h, before, latents = self.start.expand(n, -1), [], []
        for gates_t, enc_x_t in zip(gates.unbind(0), enc_x.unbind(0)):   # gates[t]: a gradient T times as large
            before.append(h)
            h, *latent = self.step(enc_x_t, gates_t, h)
            latents.append(latent)
        after = torch.stack([*before[1:], h])
        before, f_z, kl, log_ratio = torch.stack(before), None, torch.zeros_like(inside, dtype=x.dtype), 0.0
        if self.z_dim:
            mu_q, logvar_q, eps, f_z = map(torch.stack, zip(*latents))             # (T, B, .)
            mu_p, logvar_p = self.prior_of(before, label_prior)
            precision, log_ratio = (-logvar_p).exp(), logvar_q - logvar_p
            kl = 0.5 * (((mu_q - mu_p) ** 2 + logvar_q.exp()) * precision - 1 - log_ratio).sum(-1)
            z = mu_q + (0.5 * logvar_q).exp() * eps
            log_ratio = 0.5 * (eps ** 2 + log_ratio - (z - mu_p) ** 2 * precision).sum(-1)   # log p(z) - log q(z)
        log_px = self.log_px(x, self.output(before, f_z, label_out))
        if self.stop:
            log_px = log_px + bernoulli((t == lengths - 1).to(x.dtype), self.end(after).squeeze(-1))
        return [torch.where(inside, v, 0.0) for v in (log_px, kl, log_px + log_ratio)]

    def draw(self, out, temperature):
        """x_t (B, D) from the parameters of p(x_t|z_t, h_{t-1})."""
        if self.likelihood == "bernoulli":
            return torch.bernoulli((out / temperature).sigmoid())
        log_weights, mu, logvar, rest = self.mixture(out)
        # a component by the largest of log weights plus Gumbel noise, (B, 1): torch.multinomial would wait for a GPU
        which = (log_weights / temperature - torch.empty_like(log_weights).exponential_().log()).argmax(-1, keepdim=True)
        mu, logvar = (p.gather(1, which[..., None].expand(-1, -1, p.shape[-1]))[:, 0] for p in (mu, logvar))
        eps = torch.randn_like(mu)
        if self.likelihood == "gaussian":
            return mu + temperature * (0.5 * logvar).exp() * eps
        r = 0.99 * torch.tanh(rest[..., :-1]).gather(1, which)
        eps = torch.cat([eps[:, :1], r * eps[:, :1] + (1 - r ** 2).sqrt() * eps[:, 1:]], -1)
        up = torch.bernoulli((rest[:, -1:] / temperature).sigmoid())
        return torch.cat([mu + temperature * (0.5 * logvar).exp() * eps, up], -1)

    def sample(self, steps, n=None, y=None, temperature=1.0):
        """n sequences, or one for each label of y (B,), of at most `steps` steps: x (T, B, D) and lengths (B,).

        temperature scales the standard deviations of z and x and divides the logits; 1 is the model.
        """
        n = n if y is None else len(y)
        h, xs, ended = self.start.expand(n, -1), [], torch.zeros(n, dtype=torch.bool, device=self.start.device)
        label_gru, _, label_prior, label_out = self.labels(y, n)
        lengths = torch.full((n,), steps, device=h.device)
        for t in range(steps):
            f_z = None
            if self.z_dim:
                mu, logvar = self.prior_of(h, label_prior)
                f_z = self.phi_z(mu + temperature * (0.5 * logvar).exp() * torch.randn_like(mu))
            x = self.draw(self.output(h, f_z, label_out), temperature)
            gates = self.gru_x(self.phi_x(x)) + label_gru
            h = self.gru(gates + self.gru_z(f_z) if self.z_dim else gates, h)
            xs.append(x.masked_fill(ended[:, None], 0.0))
            if self.stop:
                now = torch.bernoulli((self.end(h).squeeze(-1) / temperature).sigmoid()).bool() & ~ended
                lengths, ended = torch.where(now, t + 1, lengths), ended | now
        return torch.stack(xs), lengths


def grid(n, columns, size):
    """A figure for n drawings without frames, `columns` in a row, each `size` inches."""
    from matplotlib.figure import Figure
    rows = -(-n // columns)
    fig = Figure(figsize=(size[0] * columns, size[1] * rows))
    return fig, fig.subplots(rows, columns, squeeze=False, gridspec_kw=dict(left=0, right=1, bottom=0, top=1),
                             subplot_kw=dict(frame_on=False, xticks=[], yticks=[])).flat


def pen_picture(path, x, lengths, columns):
    """Strokes (T, B, 3) as lines, `columns` in a row."""
    fig, axes = grid(x.shape[1], columns, (1, 1))
    for axis, n, moves in zip(axes, lengths, x.cpu().unbind(1)):
        axis.set_aspect("equal")
        points = moves[:n, :2].cumsum(0)
        for stroke in points.tensor_split((moves[:n, 2] > 0.5).nonzero().flatten() + 1):
            axis.plot(*stroke.T, "k-" if len(stroke) > 1 else "k.", linewidth=1, markersize=2)
    fig.savefig(path, dpi=80)


def sound_pictures(folder, x, lengths, columns, rate, scale):
    """Frames (T, B, D) as WAV files in folder/sounds, and their waveforms and spectrograms as pictures."""
    import wave

    (folder / "sounds").mkdir(exist_ok=True)
    (waves, at), (spectra, at_spectrum) = grid(x.shape[1], columns, (2, 1)), grid(x.shape[1], columns, (2, 1))
    for i, (n, frames) in enumerate(zip(lengths, x.cpu().unbind(1))):
        sound = (frames[:n].flatten() * scale).clamp(-32768, 32767)
        at[i].plot(sound, "k", linewidth=0.3)
        power = torch.stft(sound, 128, 32, window=torch.hann_window(128), return_complex=True).abs()
        at_spectrum[i].imshow((1 + power).log(), origin="lower", aspect="auto", extent=(0, len(sound), 0, 1))
        for axis in (at[i], at_spectrum[i]):
            axis.set_xlim(0, int(lengths.max()) * x.shape[2])
        with wave.open(str(folder / "sounds" / f"{i // columns}_{i % columns}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
            file.writeframes(sound.to(torch.int16).numpy().tobytes())
    waves.savefig(folder / "samples.png", dpi=80), spectra.savefig(folder / "spectrograms.png", dpi=80)


def main(argv=None):
    import common  # here, not above: the class needs torch alone and can be copied without it
    from torchvision.utils import save_image

    p = common.parser(__doc__, epochs=None, batch_size=None, lr=4e-3, test_samples=10, datasets=(
        "mnist", "fashion-mnist", "kmnist", "pendigits", "iam-ondb", "speech", "wav", "glyphs"))
    p.add_argument("--z-dim", type=common.at_least(0), default=48, help="size of z_t; 0 is the RNN without latents")
    p.add_argument("--prior", choices=("learned", "standard"), default="learned", help="of z_t; standard is VRNN-I")
    p.add_argument("--mixtures", type=common.at_least(1), metavar="K",
                   help="components, of all but rows; None: 20 for the pen, else 1")
    p.add_argument("--conditional", action="store_true", help="given the label")
    p.add_argument("--digits", help="write, say or draw these, such as 2718, a row each; None: every label")
    p.add_argument("--temperature", type=common.at_least(1e-6, float), default=1.0, help="of samples; 1 is the model's")
    args = common.parse(p, argv)
    if args.digits is not None and not (args.digits.isascii() and args.digits.isdigit()):
        p.error(f"--digits {args.digits!r}: must be digits from 0 to 9, such as 2718")
    if args.digits and not args.conditional:
        p.error("--digits needs a model that was trained with --conditional")

    data = common.sequences(args)
    if args.conditional and not data.num_classes:
        p.error(f"--conditional: --dataset {args.dataset} has no labels")
    likelihood, mixtures, epochs, size = {"rows": ("bernoulli", 1, 7, 128), "pen": ("pen", 20, 30, 48),
                                          "speech": ("gaussian", 1, 60, 32)}[data.kind]
    args.epochs, args.batch_size = epochs if args.epochs is None else args.epochs, args.batch_size or size
    model_args = dict(x_dim=data.train[0].shape[-1], z_dim=args.z_dim, likelihood=likelihood, prior=args.prior,
                      num_classes=data.num_classes if args.conditional else 0, stop=data.kind != "rows",
                      mixtures=args.mixtures or mixtures)
    model = VRNN(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    basis = common.dct(model.x_dim, args.device)

    def see(x, seed=None):
        """What the model sees: binary rows, or integers spread over their step, and of frames of speech the cosines."""
        if data.kind == "rows":
            return common.binarise(x, seed)
        noise = common.uniform(x, seed) - 0.5
        if data.kind == "pen":
            noise[..., 2] = 0
        x = x + data.unit * noise
        return common.exact_product(x, basis) if data.kind == "speech" else x

    def bound(m, x, of, k):
        lengths, y = of.unbind(1)
        return m(x[:, :common.round_up(int(lengths.max()))].transpose(0, 1), lengths, y if args.conditional else None, k)

    def fixed(part, seed):
        """A part, seen once, its sequences sorted by length so that little is padded."""
        x, lengths, y = part
        order, of = lengths.argsort().to(x.device), torch.stack([lengths.to(x.device), y], 1)
        return see(x, seed)[order], of[order]

    x_valid, of_valid = fixed(data.valid, seed=1)
    rows = max(32, 5_000 // x_valid.shape[1])
    validate = lambda m: common.evaluate(partial(bound, m), x_valid, of_valid, rows=rows)
    run = common.Run(args, model, model_args, optimizer, data.train, validate)
    model.step = common.compiled(model.step, args, steady=data.kind == "rows")
    for x, lengths, y in run:
        x = see(x).transpose(0, 1)
        log_px, kl, _ = model(x, lengths.to(x.device), y if args.conditional else None)
        loss = (kl - log_px).mean()
        run.log(loss, rec=-log_px, kl=kl)
        optimizer.zero_grad()
        loss.backward()
        run.share()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    model = run.best_model()
    test = common.evaluate(partial(bound, model), *fixed(data.test, seed=2), args.test_samples, rows)
    run.finish(val=validate(model), test=test, data={"scale": data.scale})

    with torch.inference_mode():
        torch.manual_seed(args.seed)
        digits = [int(d) for d in args.digits] if args.digits else range(data.num_classes or 10)
        y = torch.tensor(digits, device=args.device).repeat_interleave(8)   # a row each, of eight
        x, lengths = model.sample(x_valid.shape[1], len(y), y if args.conditional else None, args.temperature)
        if data.kind == "rows":
            save_image(x.transpose(0, 1)[:, None], run.dir / "samples.png", nrow=8, padding=1)
        elif data.kind == "pen":
            pen_picture(run.dir / "samples.png", x, lengths, columns=8)
        else:
            sound_pictures(run.dir, common.exact_product(x, basis.T), lengths, 8, 8000, data.scale)


if __name__ == "__main__":
    main()
