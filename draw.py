# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""DRAW (Gregor et al. 2015, "DRAW: A Recurrent Neural Network For Image Generation").

    generation   z_t ~ N(0, I),   h_dec_t = LSTM(z_t, h_dec_{t-1}),           (eqs. 13, 14)
                 c_t = c_{t-1} + write(h_dec_t),   x|z ~ Bernoulli(sigmoid(c_T))    (15, 16)
    inference    x_hat_t = x - sigmoid(c_{t-1}),   r_t = read(x, x_hat_t, h_dec_{t-1})    (3, 4)
                 h_enc_t = LSTM([r_t, h_dec_{t-1}], h_enc_{t-1})                             (5)
                 q(z_t|x, z_{<t}) = N(mu(h_enc_t), diag sigma(h_enc_t)^2)                 (1, 2)
    bound        log p(x) >= E_q[log p(x|z) - sum_t KL(q(z_t|x, z_{<t}) || p(z_t))]      (9-12)
With a learned prior (as in Chung et al. 2015) p(x, z) = p(x|z) prod_t p(z_t|z_{<t}): in the bound,
p(z_t|z_{<t}) = N(mu_p(h_dec_{t-1}), diag sigma_p(h_dec_{t-1})^2) takes the place of p(z_t).

    python draw.py    # with the learned prior; --prior standard: N(0, I), the paper's
    python draw.py --glimpses 64 --read-size 2 --write-size 5    # the paper's sizes
    python draw.py --epochs 0 --resume out/draw-1    # test and draw; --sample 8: draw only, no data
Measured, seed 0: --test-samples 10, compiled: test -ELBO 83.55; --prior standard, 17 epochs: 86.63.
Deviations from the paper, to learn faster: the learned prior; two epochs each of 4, 8, ..., then 32
glimpses; 5x5 windows to read with; averaged weights; c_0 starts as the mean image, windows as large
as the image; pixels binarised anew by default; limited log variances, strides, gains, gradients.
"""

def flags():
    import common  # here, not above: a copied class needs torch alone
    p = common.parser("draw", __doc__, epochs=40, batch_size=64, lr=2e-3, test_samples=50)
    p.add_argument("--glimpses", type=common.at_least(1), default=32, help="time steps in the end")
    p.add_argument("--read-size", type=common.at_least(1), default=5, help="filters per side")
    p.add_argument("--write-size", type=common.at_least(1), default=5, help="filters per side")
    p.add_argument("--no-attention", dest="attention", action="store_false", help="whole images")
    p.add_argument("--prior", choices=("standard", "learned"), default="learned", help="of z_t")
    p.add_argument("--z-dim", type=common.at_least(1), default=100, help="size of z_t")
    p.add_argument("--hidden", type=common.at_least(1), default=256, help="units of each LSTM")
    p.add_argument("--binarise", choices=("dynamic", "fixed"), default="dynamic", help="pixels")
    p.add_argument("--temperature", type=common.at_least(0, float), default=1.0, help="of z, t > 1")
    return p

if __name__ == "__main__":
    flags().parse_args()    # before torch, whose import takes seconds: --help answers at once
import math
import torch
from torch import nn

def filterbank(params, n, height, width):
    """n x n Gaussian filters on an image, placed by params (B, 5) (section 3.2): F_y (B, n, height)
    and F_x (B, n, width), whose rows sum to 1, and the gain gamma (B, 1)."""
    g_x, g_y, log_var, log_delta, log_gamma = params.unbind(1)                     # eq. 21
    g_x = (width + 1) / 2 * (g_x + 1)                                              # eq. 22
    g_y = (height + 1) / 2 * (g_y + 1)                                             # eq. 23
    delta = (max(height, width) - 1) / max(n - 1, 1) * log_delta.clamp(-8, 4).exp()    # eq. 24
    i = torch.arange(n, device=params.device) - (n - 1) / 2    # i - N/2 - 0.5 with i from 1
    mu_x = g_x[:, None] + i * delta[:, None]                                       # eq. 19
    mu_y = g_y[:, None] + i * delta[:, None]                                       # eq. 20
    a = torch.arange(1, width + 1, device=params.device)    # pixels are counted from 1
    b = torch.arange(1, height + 1, device=params.device)
    precision = (-log_var.clamp(-8, 8)).exp()[:, None, None]
    # exp(-(a - mu)^2 / (2 sigma^2)) / Z is a softmax: finite even where all exponentials vanish
    F_x = (-0.5 * precision * (a - mu_x[:, :, None])**2).softmax(2)                # eq. 25
    F_y = (-0.5 * precision * (b - mu_y[:, :, None])**2).softmax(2)                # eq. 26
    return F_y, F_x, log_gamma.clamp(-8, 8).exp()[:, None]

def tiled_window(n, side):
    """Parameters (eq. 21) of a window in the middle: n filters side / n apart, sigma half of it."""
    log_delta = math.log(side / n * max(n - 1, 1) / max(side - 1, 1))
    return torch.tensor([0.0, 0.0, 2 * math.log(side / n / 2), log_delta, 0.0])

class DRAW(nn.Module):
    """Gregor et al. 2015.

    shape: (C, H, W) of the images. glimpses: time steps T. read_size, write_size: filters per side
    of the windows. attention=False reads and writes whole images. prior: "standard", z_t ~ N(0, I),
    or "learned", else ValueError. z_dim: size of z_t. hidden: units of each LSTM."""

    def __init__(self, shape=(1, 28, 28), glimpses=32, read_size=5, write_size=5, attention=True,
                 prior="standard", z_dim=100, hidden=256):
        super().__init__()
        if prior not in ("standard", "learned"):
            raise ValueError(f'prior is "standard" or "learned", not {prior!r}')
        channels, height, width = shape
        self.shape, self.glimpses, self.attention = tuple(shape), glimpses, attention
        self.read_size, self.write_size, self.z_dim = read_size, write_size, z_dim
        reads = 2 * channels * (read_size**2 if attention else height * width)
        writes = channels * (write_size**2 if attention else height * width)
        self.encoder = nn.LSTMCell(reads + hidden, hidden)
        self.posterior = nn.Linear(hidden, 2 * z_dim)
        self.decoder = nn.LSTMCell(z_dim, hidden)
        self.patch = nn.Linear(hidden, writes)
        self.read_window = nn.Linear(hidden, 5) if attention else None
        self.write_window = nn.Linear(hidden, 5) if attention else None
        self.start = nn.Parameter(torch.zeros(4, 1, hidden))    # h_enc, cell_enc, h_dec, cell_dec
        self.canvas = nn.Parameter(torch.full(self.shape, -2.0))    # c_0, dark
        self.prior = nn.Linear(hidden, 2 * z_dim).requires_grad_(prior == "learned")
        # initial values that speed up the start; the prior is N(0, I) at first, or frozen so
        nn.init.normal_(self.encoder.weight_ih[:, :reads], std=reads**-0.5)    # r matters
        nn.init.ones_(self.encoder.bias_ih[hidden:2 * hidden])    # open forget gates (i, f, g, o)
        nn.init.ones_(self.decoder.bias_ih[hidden:2 * hidden])
        nn.init.zeros_(self.prior.weight)
        nn.init.zeros_(self.prior.bias)
        if attention:
            self.read_window.bias.data = tiled_window(read_size, max(height, width))
            self.write_window.bias.data = tiled_window(write_size, max(height, width))

    def get_extra_state(self):    # saved with the weights, as the first epochs take fewer glimpses
        return torch.tensor(self.glimpses)
    def set_extra_state(self, glimpses):
        self.glimpses = int(glimpses)
    def read(self, x, x_hat, h_dec):
        """The glimpse r (B, .) of image and error image, both (B, C, H, W)."""
        images = torch.cat([x, x_hat], 1)
        if not self.attention:
            return images.flatten(1)                                               # eq. 17
        F_y, F_x, gamma = filterbank(self.read_window(h_dec), self.read_size, *self.shape[1:])
        return gamma * (F_y[:, None] @ images @ F_x[:, None].mT).flatten(1)        # eq. 27

    def write(self, h_dec):
        """What is added to the canvas, (B, C, H, W)."""
        w = self.patch(h_dec)                                                      # eq. 28
        if not self.attention:
            return w.view(-1, *self.shape)                                         # eq. 18
        F_y, F_x, gamma = filterbank(self.write_window(h_dec), self.write_size, *self.shape[1:])
        w = (w / gamma).view(len(w), -1, self.write_size, self.write_size)
        return F_y[:, None].mT @ w @ F_x[:, None]                                  # eq. 29

    def forward(self, x, k=None):
        """x (B, C, H, W) in [0, 1] -> log_px, kl, log_w in nats, (B,), or (k, B) for k samples."""
        if k is not None:
            return [term.view(k, -1) for term in self(x.repeat(k, 1, 1, 1))]
        h_enc, cell_enc, h_dec, cell_dec = self.start.expand(-1, len(x), -1)
        canvas = self.canvas.expand(len(x), -1, -1, -1)
        kl, log_ratio = 0, 0    # eqs. 10, 11; log p(z) - log q(z|x)
        for _ in range(self.glimpses):
            x_hat = x - canvas.sigmoid()                                           # eq. 3
            r = self.read(x, x_hat, h_dec)                                         # eq. 4
            h_enc, cell_enc = self.encoder(torch.cat([r, h_dec], 1), (h_enc, cell_enc))  # eq. 5
            mu, logvar = self.posterior(h_enc).to(x.dtype).chunk(2, 1)             # eqs. 1, 2
            logvar = logvar.clamp(-14, 14)
            mu_p, logvar_p = self.prior(h_dec).to(x.dtype).chunk(2, 1)
            logvar_p = logvar_p.clamp(-14, 14)
            eps = torch.randn_like(mu)
            z = mu + (0.5 * logvar).exp() * eps                                    # eq. 6
            h_dec, cell_dec = self.decoder(z, (h_dec, cell_dec))                         # eq. 7
            canvas = canvas + self.write(h_dec)                                    # eq. 8
            var_p = logvar_p.exp()
            kl = kl + 0.5 * (((mu - mu_p)**2 + logvar.exp()) / var_p - 1 - logvar + logvar_p).sum(1)
            log_q = -0.5 * (eps**2 + logvar)    # as eps = (z - mu) / sigma; no constants
            log_p = -0.5 * ((z - mu_p)**2 / var_p + logvar_p)
            log_ratio = log_ratio + (log_p - log_q).sum(1)
        log_px = (x * canvas + nn.functional.logsigmoid(-canvas)).sum((1, 2, 3))   # minus eq. 9
        return log_px, kl, log_px + log_ratio

    @torch.no_grad()
    def sample(self, n, temperature=1.0, with_windows=False):
        """n images: the canvas after every step, as means (T, n, C, H, W). temperature scales sigma
        of z_t for t > 1. with_windows adds a list of T write windows' parameters (n, 5), if any."""
        _, _, h_dec, cell_dec = self.start.expand(-1, n, -1)
        canvas = self.canvas.expand(n, -1, -1, -1)
        canvases, windows = [], []
        for _ in range(self.glimpses):
            mu, logvar = self.prior(h_dec).chunk(2, 1)
            std = (temperature if canvases else 1.0) * (0.5 * logvar.clamp(-14, 14)).exp()
            h_dec, cell_dec = self.decoder(mu + std * torch.randn_like(mu), (h_dec, cell_dec))
            canvas = canvas + self.write(h_dec)
            canvases.append(canvas.sigmoid())
            if self.attention:
                windows.append(self.write_window(h_dec))
        return (torch.stack(canvases), windows) if with_windows else torch.stack(canvases)

def draw_pictures(canvases, windows, folder, most=10):
    """samples.png, a row per sample and a column per time step; drawing.gif, with write windows."""
    from torchvision import utils
    from torchvision.transforms.functional import to_pil_image
    steps, _, _, height, width = canvases.shape
    images = canvases.cpu().expand(-1, -1, 3, -1, -1)
    images = images.repeat_interleave(3, 3).repeat_interleave(3, 4)    # 3 times as large
    rows = images[torch.linspace(0, steps - 1, min(10, steps)).long(), :most].transpose(0, 1)
    utils.save_image(rows.flatten(0, 1), folder / "samples.png", nrow=rows.shape[1])
    for step, window in zip(images[:-1], windows):    # roughly through the outermost filters
        centre, half = window[:, :2].cpu(), window[:, 3:4].cpu().exp()
        boxes = torch.cat([centre - half, centre + half], 1).clamp(-0.99, 0.99) * 1.5 + 1.5
        boxes = boxes * torch.tensor([width, height, width, height])
        for image, box in zip(step, boxes):
            image.copy_(utils.draw_bounding_boxes(image, box[None], colors="red"))
    frames = [to_pil_image(utils.make_grid(step, 10, pad_value=0.3)) for step in images]
    frames[0].save(folder / "drawing.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[120] * (steps - 1) + [2000])

def main(argv=None):
    import common
    # flags, data and model
    args = common.parse(flags(), argv)
    if args.sample:    # needs no data
        model, folder = common.trained(args, DRAW)
        drawn = model.sample(args.sample, args.temperature, True)
        return draw_pictures(*drawn, folder, args.sample)
    data = common.images(args)
    if args.binarise == "fixed":    # training pixels, too, are drawn once
        data.train = (255 * common.binarise(data.train[0], seed=0)).byte(), data.train[1]
    options = "glimpses", "read_size", "write_size", "attention", "prior", "z_dim", "hidden"
    model_args = dict(shape=data.shape, **{name: getattr(args, name) for name in options})
    model = DRAW(**model_args).to(args.device)
    model.canvas.data = (data.train[0].float().mean(0) / 255).clamp(0.003, 0.997).logit()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)

    # training
    x_valid = common.binarise(data.valid[0], seed=1)
    run = common.Run(args, model, model_args, optimizer)
    for epoch in range(run.epoch, args.epochs):
        model.glimpses = min(args.glimpses, 4 * (1 + epoch // 2))    # fewer at first: faster
        run.average.glimpses = model.glimpses
        for x, _ in common.batches(args, epoch, *data.train):
            log_px, kl, _ = model(common.binarise(x))
            loss = (kl - log_px).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model, args)    # under torchrun
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            run.after_step(loss=loss, rec=-log_px, kl=kl)    # averages weights, keeps the figures
        if run.end_epoch(common.evaluate(run.average, x_valid, rows=1024)):    # logs, saves
            draw_pictures(*run.average.sample(40, args.temperature, True), run.dir)

    # test and pictures
    model = run.best_model()
    x_test = common.binarise(data.test[0], seed=2)
    run.finish(common.evaluate(model, x_test, samples=args.test_samples, rows=1024))
    draw_pictures(*model.sample(40, args.temperature, True), run.dir)

if __name__ == "__main__":
    main()
