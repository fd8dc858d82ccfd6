"""DRAW (Gregor et al. 2015, "DRAW: A Recurrent Neural Network For Image Generation").

    error image        x' = x - sigmoid(c_{t-1})                                               (eq. 3)
    read               r_t = [gamma F_y x F_x^T, gamma F_y x' F_x^T], windows from h^dec_{t-1}  (eqs. 4, 27)
    inference model    h^enc_t = LSTM([r_t, h^dec_{t-1}], h^enc_{t-1})
                       q(z_t|x, z_{<t}) = N(mu(h^enc_t), diag sigma(h^enc_t)^2)                    (eqs. 1-5)
    generative model   z_t ~ N(0, I),   h^dec_t = LSTM(z_t, h^dec_{t-1}),   c_t = c_{t-1} + 1/gamma' F'_y^T w_t F'_x
                       x | z ~ Bernoulli(sigmoid(c_T))                                         (eqs. 6-9, 29)
    bound              log p(x) >= E_q[log p(x|z) - sum_t KL(q(z_t|x, z_{<t}) || p(z_t))]      (eqs. 10-12)

    python draw.py
    python draw.py --glimpses 64 --read-size 2 --write-size 5    # the paper's setting
    python draw.py --no-attention                                # reads and writes the whole image
    python draw.py --epochs 0 --resume out/draw/best.pt          # evaluate and sample only

Measured, MNIST, seed 0: `python draw.py` ends at a test -ELBO of 83.52 nats, log p(x) >= -81.12 (50 importance samples),
after 53 minutes on two cores of a server CPU (torch 2.14). More in the README.

Deviations from the paper: 32 glimpses with 5x5 windows to read are the default, as they learn faster: the paper's
setting ends at 91.22 after 11 epochs, which cost more than 20 of these. At first the windows lie in the middle and
their filters share the image out between them: the paper leaves the start open, and at zero the 2x2 window sees
nothing but the corners. A running average of the weights is what is tested and sampled from.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Windows(nn.Module):
    """K square windows of Gaussian filters on an image of (height, width), eqs. 19-26, all of them at once.

    sizes: how many filters a side each window has. S is their sum.
    """

    def __init__(self, height, width, sizes):
        super().__init__()
        self.height, self.width, self.sizes = height, width, tuple(sizes)
        which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(self.sizes))
        of = F.one_hot(which, len(sizes)).float().T                                        # (K, S)
        place = torch.cat([torch.arange(n) - (n - 1) / 2 for n in sizes])                  # i - N/2 - 0.5, from i = 1
        apart = torch.tensor([(max(height, width, 2) - 1) / max(1, n - 1) for n in sizes])    # at delta = 1
        for name, value in (("of", of), ("spread", of * place * apart[which]), ("apart", apart),
                            ("rows", torch.arange(height).float()), ("columns", torch.arange(width).float())):
            self.register_buffer(name, value, persistent=False)

    def start(self):
        """Raw parameters (K * 5,) of windows in the middle, whose filters share the image out between them."""
        stride = max(self.height, self.width) / torch.tensor(self.sizes)
        zero = torch.zeros_like(stride)
        return torch.stack([zero, zero, 2 * (stride / 2).log(), (stride / self.apart).log(), zero], -1).flatten()

    def geometry(self, raw):
        """raw (B, K, 5) -> centres x, y, log variance and stride in pixels, log intensity, each (B, K)."""
        g_x, g_y, log_var, log_delta, log_gamma = raw.unbind(-1)
        x = (self.width - 1) / 2 + (self.width + 1) / 2 * g_x        # pixels are counted from 0
        y = (self.height - 1) / 2 + (self.height + 1) / 2 * g_y
        return x, y, log_var.clamp(-8, 8), log_delta.clamp(-8, 4).exp(), log_gamma.clamp(-8, 8)

    def forward(self, raw):
        """raw (B, K, 5) -> filters F_y (B, S, height), F_x (B, S, width), whose rows sum to 1, and log gamma (B, K)."""
        x, y, log_var, delta, log_gamma = self.geometry(raw)
        away, half = delta @ self.spread, -0.5 * (-log_var).exp() @ self.of
        # exp(-(a - mu)^2 / (2 sigma^2)) / Z as a softmax: finite for a window that has left the image, too
        f_y, f_x = (((half[..., None] * (a - (centre @ self.of + away)[..., None]) ** 2).softmax(-1))
                    for a, centre in ((self.rows, y), (self.columns, x)))
        return f_y, f_x, log_gamma


def lstm(gates, c):
    """gates (B, 4 H) before their nonlinearities, cell c (B, H) -> new h, c."""
    i, f, o, g = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class DRAW(nn.Module):
    """Gregor et al. 2015.

    shape: (C, H, W) of the images. glimpses: time steps T. read_size, write_size: filters a side of the
    windows. attention=False reads and writes whole images. hidden: units of each LSTM.
    """

    def __init__(self, shape=(1, 28, 28), glimpses=32, read_size=5, write_size=5, attention=True,
                 z_dim=100, hidden=256):
        super().__init__()
        self.shape, self.glimpses, self.attention = tuple(shape), glimpses, attention
        self.write_size, self.z_dim = write_size, z_dim
        channels, height, width = shape
        reads, writes = (channels * (n * n if attention else height * width) for n in (read_size, write_size))
        self.encoder = nn.Linear(2 * reads + 2 * hidden, 4 * hidden)
        self.posterior = nn.Linear(hidden, 2 * z_dim)
        self.decoder = nn.Linear(z_dim + hidden, 4 * hidden)
        self.output = nn.Linear(hidden, writes + 10 * attention)   # what to write, and where to write and read
        self.windows = Windows(height, width, (write_size, read_size)) if attention else None
        self.start = nn.Parameter(torch.zeros(4, hidden))       # h_enc, c_enc, h_dec, c_dec
        self.canvas = nn.Parameter(torch.full((height, channels * width), -2.0))
        with torch.no_grad():
            self.encoder.weight[:, :2 * reads].normal_(0, (2 * reads) ** -0.5)  # few: the states must not drown them
            if attention:
                self.output.bias[-10:] = self.windows.start()
            for gates in (self.encoder, self.decoder):
                gates.bias[hidden:2 * hidden] = 1.0             # forget gates start open

    def read(self, x, canvas, filters):
        """What the encoder sees of x and of the error image, both (B, H, C * W); without attention, see `forward`."""
        if not self.attention:
            return -canvas.sigmoid().flatten(1)
        (f_y, f_x, log_gamma), n = filters, self.write_size
        f_y, f_x, gamma = f_y[:, n:], f_x[:, n:].transpose(1, 2), log_gamma[:, 1:].exp()
        rows = torch.cat([f_y @ x, f_y @ (x - canvas.sigmoid())], 1)            # (B, 2 N, C * W)
        return gamma * (rows.view(len(x), -1, self.shape[2]) @ f_x).flatten(1)

    def write(self, canvas, out):
        """The canvas after writing as `out` (B, .) says, and the filters for this step's write and the next read."""
        if not self.attention:
            return canvas + out.view_as(canvas), None
        (c, h, w), n = self.shape, self.write_size
        filters = f_y, f_x, log_gamma = self.windows(out[:, -10:].view(-1, 2, 5))
        patch = (out[:, :-10] * (-log_gamma[:, :1]).exp()).view(-1, n * c, n)   # rows, then channels, then columns
        return torch.baddbmm(canvas, f_y[:, :n].transpose(1, 2), (patch @ f_x[:, :n]).view(-1, n, c * w)), filters

    def decode(self, z, h, c, canvas):
        """A time step of the generative model: z (B, z_dim), state, canvas (B, H, C * W) -> the next, filters, out."""
        h, c = lstm(self.decoder(torch.cat([z, h], -1)), c)
        out = self.output(h)
        return h, c, *self.write(canvas, out), out

    def step(self, x, fixed, weight, h_enc, c_enc, h_dec, c_dec, canvas, filters):
        """A time step of both models; only what depends on the step before."""
        seen = torch.cat([self.read(x, canvas, filters), h_enc, h_dec], -1)
        h_enc, c_enc = lstm(torch.addmm(fixed, seen, weight.T), c_enc)
        mu, logvar = self.posterior(h_enc).chunk(2, -1)
        logvar = logvar.clamp(-14, 14)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return (mu, logvar, z), (h_enc, c_enc, *self.decode(z, h_dec, c_dec, canvas)[:4])

    def begin(self, n):
        """States, canvas and filters before the first step, for n images."""
        states = self.start[:, None].expand(-1, n, -1).unbind(0)
        canvas = self.canvas.expand(n, -1, -1)
        return *states, canvas, self.write(canvas, self.output(states[2]))[1]

    def forward(self, x, k=None):
        """x (B, C, H, W) in [0, 1] -> log_px, kl, log_w in nats, each (B,), or (k, B) for k samples of z."""
        log_px, kl, log_w = self.terms(x if k is None else x.repeat(k, 1, 1, 1))
        terms = log_px, kl.sum(0), log_w
        return terms if k is None else tuple(t.view(k, -1) for t in terms)

    def terms(self, x):
        """x (B, C, H, W) -> log_px (B,), the KL of every time step (T, B), log_w (B,), in nats."""
        state, weight, fixed = self.begin(len(x)), self.encoder.weight, self.encoder.bias
        x, d = x.transpose(1, 2).flatten(2), math.prod(self.shape)
        if not self.attention:   # [x, x - sigmoid(c)]: all products with x, once for all time steps
            fixed, weight = F.linear(x.flatten(1), weight[:, :d] + weight[:, d:2 * d], fixed), weight[:, d:]
        latents = []
        for _ in range(self.glimpses):
            latent, state = self.step(x, fixed, weight, *state)
            latents.append(latent)
        mu, logvar, z = map(torch.stack, zip(*latents))                        # (T, B, z_dim)
        log_px = (x * state[4] + F.logsigmoid(-state[4])).sum((1, 2))          # log Bernoulli(x; sigmoid(c_T))
        kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(-1)
        log_w = log_px + 0.5 * ((z - mu) ** 2 * (-logvar).exp() + logvar - z ** 2).sum((0, 2))
        return log_px, kl, log_w

    def trace(self, z):
        """z (T, n, z_dim) -> canvases as means (T, n, C, H, W), and write windows (T, n, 4).

        Without attention there are none. A window is its centre x, y, its side and its filters' sigma, in pixels.
        """
        _, _, h, c, canvas, _ = self.begin(z.shape[1])
        canvases, boxes = [], []
        for z_t in z:
            h, c, canvas, _, out = self.decode(z_t, h, c, canvas)
            canvases.append(canvas.sigmoid().unflatten(2, (self.shape[0], -1)).transpose(1, 2))
            if self.attention:
                x, y, log_var, delta, _ = self.windows.geometry(out[:, -10:].view(-1, 2, 5))
                side = delta * self.windows.apart * (self.write_size - 1)
                boxes.append(torch.stack([x, y, side, (0.5 * log_var).exp()], -1)[:, 0])
        return torch.stack(canvases), torch.stack(boxes) if boxes else None

    def sample(self, n):
        """The canvases of n images from the prior after every step, as means (T, n, C, H, W)."""
        return self.trace(torch.randn(self.glimpses, n, self.z_dim, device=self.start.device))[0]


def animate(path, canvases, boxes, nrow, zoom=2):
    """A GIF of canvases (T, n, C, H, W), the windows (T, n, 4) of `trace` as boxes with lines as wide as sigma."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    (height, width), frames, device = canvases.shape[-2:], [], canvases.device
    rows, columns = ((torch.arange(n * zoom, device=device) + 0.5) / zoom - 0.5 for n in (height, width))
    for t in [*range(len(canvases)), -1]:
        image = F.interpolate(canvases[t], scale_factor=zoom).expand(-1, 3, -1, -1)
        if boxes is not None and t >= 0:   # the last picture is shown again without its window
            x, y, side, sigma = boxes[t].T[..., None, None]
            away = torch.maximum((rows[:, None] - y).abs(), (columns - x).abs()) - side / 2
            on_line = (away.abs() <= sigma.clamp(0.5, 4) / 2)[:, None]
            image = torch.where(on_line, torch.tensor([1.0, 0.2, 0.1], device=device)[:, None, None], image)
        frames.append(to_pil_image(make_grid(image, nrow=nrow, padding=2 * zoom, pad_value=0.3).cpu()))
    durations = [max(60, 4000 // len(frames))] * len(canvases) + [2000]   # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def main(argv=None):
    import common  # here, not above: the class needs torch alone and can be copied without it
    from torchvision.utils import save_image

    p = common.parser(__doc__, epochs=40, batch_size=128, lr=2e-3, test_samples=50)
    p.add_argument("--glimpses", type=common.at_least(1), default=32, help="time steps")
    p.add_argument("--read-size", type=common.at_least(1), default=5, help="filters a side of the reading window")
    p.add_argument("--write-size", type=common.at_least(1), default=5, help="filters a side of the writing window")
    p.add_argument("--no-attention", action="store_true", help="read and write whole images")
    p.add_argument("--z-dim", type=common.at_least(1), default=100, help="size of z at a time step")
    p.add_argument("--hidden", type=common.at_least(1), default=256, help="units of each LSTM")
    args = common.parse(p, argv)

    data = common.images(args)
    for flag, n in (("--read-size", args.read_size), ("--write-size", args.write_size)):
        if n > min(data.shape[1:]):
            p.error(f"{flag} {n}: images of {data.shape[1]}x{data.shape[2]} pixels take at most {min(data.shape[1:])}")
    model_args = dict(shape=data.shape, glimpses=args.glimpses, read_size=args.read_size, write_size=args.write_size,
                      attention=not args.no_attention, z_dim=args.z_dim, hidden=args.hidden)
    model = DRAW(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)

    x_valid = common.binarise(data.valid[0], seed=1)
    validate = lambda m: common.evaluate(lambda x, y, k: m(x, k), x_valid, data.valid[1], rows=1024)
    run = common.Run(args, model, model_args, optimizer, data.train, validate)
    model.step = common.compiled(model.step, args)
    for x, _ in run:
        log_px, kl, _ = model(common.binarise(x))
        loss = (kl - log_px).mean()
        run.log(loss, rec=-log_px, kl=kl)
        optimizer.zero_grad()
        loss.backward()
        run.share()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    model = run.best_model()
    x_test = common.binarise(data.test[0], seed=2)
    test = common.evaluate(lambda x, y, k: model(x, k), x_test, data.test[1], args.test_samples, rows=1024)
    run.finish(val=validate(model), test=test)

    with torch.inference_mode():
        torch.manual_seed(args.seed)
        canvases, boxes = model.trace(torch.randn(args.glimpses, 40, args.z_dim, device=args.device))
        columns = torch.linspace(0, args.glimpses - 1, min(10, args.glimpses)).round().long()
        save_image(canvases[columns, :10].transpose(0, 1).flatten(0, 1), run.dir / "samples.png",
                   nrow=len(columns), padding=1)
        animate(run.dir / "drawing.gif", canvases, boxes, nrow=8)


if __name__ == "__main__":
    main()
