# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy", "matplotlib"]
# ///
"""VRNN (Chung et al. 2015, "A Recurrent Latent Variable Model for Sequential Data").

    prior        z_t | x_{<t}, z_{<t} ~ N(mu_p(h_{t-1}), diag sigma_p(h_{t-1})^2)           (eq. 5)
    generation   x_t | z_t, x_{<t}, z_{<t} ~ p(x_t | phi_z(z_t), h_{t-1})                   (eq. 6)
    recurrence   h_t = GRU([phi_x(x_t), phi_z(z_t)], h_{t-1})                               (eq. 7)
    inference    z_t | x_{<=t}, z_{<t} ~ N(mu_q, diag sigma_q^2) of phi_x(x_t), h_{t-1}     (eq. 9)
    bound        log p(x) >= E_q sum_t [log p(x_t | z_{<=t}, x_{<t})
                             - KL(q(z_t | x_{<=t}, z_{<t}) || p(z_t | x_{<t}, z_{<t}))]     (eq. 11)
With --conditional, every factor may depend on the label y; eq. 11 holds with y given throughout:
    p(x, z|y) = prod_t p(x_t | z_{<=t}, x_{<t}, y) p(z_t | x_{<t}, z_{<t}, y)
    q(z|x, y) = prod_t q(z_t | x_{<=t}, z_{<t}, y)
    log p(x|y) = log E_q[p(x, z|y) / q(z|x, y)] >= E_q[log p(x, z|y) - log q(z|x, y)]     (Jensen)
Pen strokes and speech end by themselves: after each step, e_t ~ Bernoulli(s(h_t)) says whether x_t
was the last. The bound, now of log p(x, length), gains log(1 - s(h_t)) for t < T, and log s(h_T).
    python vrnn.py    # MNIST rows, 7 epochs; with --epochs 16, an hour of a core, 81.46 nats
    python vrnn.py --dataset speech --conditional    # 150 epochs, batches of 32, lr 2e-3
    python vrnn.py --dataset pendigits --conditional --digits 27    # 30 epochs, of 48, lr 2e-3
Deviations from the paper: GRU; SiLU; learned h_0; noise on recorded integers; speech shifted and
cosine transformed, strokes distorted; limited variances, correlations, gradients; averaged weights.
"""

def flags():
    import common  # here, not above: a copied class needs torch alone
    sets = ("pendigits", "iam-ondb", "ndjson", "speech", "wav")
    p = common.parser("vrnn", __doc__, None, None, None, test_samples=10, datasets=sets)
    p.add_argument("--z-dim", type=common.at_least(0), default=48, help="size of z_t; 0: the RNN")
    p.add_argument("--hidden", type=common.at_least(1), default=384, help="units of the GRU")
    p.add_argument("--features", type=common.at_least(1), default=256, help="units of other layers")
    p.add_argument("--prior", choices=("learned", "standard"), default="learned", help="of z_t")
    p.add_argument("--mixtures", type=common.at_least(1), help="components; None: pen 20, else 1")
    p.add_argument("--conditional", action="store_true", help="given the label")
    p.add_argument("--classes", "--digits", nargs="+", help="to draw, such as 2718, or by name")
    p.add_argument("--temperature", type=common.at_least(1e-6, float), default=1.0, help="of x_t")
    p.add_argument("--z-temperature", type=common.at_least(0, float), default=1.0, help="of z_t")
    return p

if __name__ == "__main__":
    flags().parse_args()    # before torch, whose import takes seconds: --help answers at once
import functools, glob, hashlib, io, json, math, os, re, shutil, subprocess, types, wave, zipfile
import torch, torch.nn.functional as F, urllib.request, xml.etree.ElementTree as ElementTree
from pathlib import Path
from torch import nn

def mlp(*sizes):    # Linear, SiLU, Linear, SiLU, ...; [:-1] leaves the last SiLU out
    layers = [(nn.Linear(n_in, n_out), nn.SiLU()) for n_in, n_out in zip(sizes, sizes[1:])]
    return nn.Sequential(*sum(layers, ()))

class VRNN(nn.Module):
    """x_dim: size of x_t; 3 for "pen", (dx, dy, pen-up). z_dim: size of z_t; 0: an RNN. likelihood:
    "bernoulli"; "gaussian", a mixture of diagonal Gaussians; "pen", one of bivariate Gaussians, and
    a Bernoulli. mixtures: components. prior: "learned", or "standard", N(0, I). num_classes: 0: no
    labels. stop: say when x ends. hidden, features: units of GRU, other layers. Else ValueError."""
    def __init__(self, x_dim=28, z_dim=48, likelihood="bernoulli", prior="learned", num_classes=0,
                 stop=False, mixtures=1, hidden=384, features=256):
        super().__init__()
        size = {"bernoulli": x_dim, "gaussian": mixtures * (1 + 2 * x_dim), "pen": mixtures * 6 + 1}
        known = likelihood in size and prior in ("learned", "standard")
        if not known or (likelihood == "pen" and x_dim != 3):
            raise ValueError(f"there is no VRNN with {likelihood=}, {prior=} and {x_dim=}")
        self.x_dim, self.z_dim, self.likelihood, self.mixtures = x_dim, z_dim, likelihood, mixtures
        d_y, d_z = 64 if num_classes else 0, features if z_dim else 0    # sizes of features
        weights = 0.1 * torch.randn(num_classes, d_y)    # larger ones raise the KL at the start
        self.label = nn.Embedding.from_pretrained(weights, freeze=False) if d_y else None
        self.phi_x = mlp(x_dim, features, features)
        self.phi_z = mlp(z_dim, features) if z_dim else nn.Identity()
        self.enc = mlp(features + hidden + d_y, features, 2 * z_dim)[:-1] if z_dim else None
        learned = prior == "learned" and z_dim
        self.prior_net = mlp(hidden + d_y, features, 2 * z_dim)[:-1] if learned else None
        self.dec = mlp(d_z + hidden + d_y, features, features, size[likelihood])[:-1]
        self.gru = nn.GRUCell(features + d_z + d_y, hidden)
        self.h_0 = nn.Parameter(torch.zeros(hidden))
        self.end = nn.Linear(hidden, 1) if stop else None

    def embed(self, y, n):    # features (n, 64) of the labels, (n, 0) if there are none
        if (y is None) != (self.label is None):
            raise ValueError("labels y are needed if num_classes > 0, and only then")
        return self.h_0.new_zeros(n, 0) if y is None else self.label(y)

    def gaussian(self, net, *inputs):    # mu, logvar (..., z_dim); N(0, I) if there is no net
        if net is None:
            return self.h_0.new_zeros(2, *inputs[0].shape[:-1], self.z_dim).unbind(0)
        mu, logvar = net(torch.cat(inputs, -1)).to(self.h_0.dtype).chunk(2, -1)
        return mu, logvar.clamp(-10, 10)

    def forward(self, x, lengths, y=None, k=None):
        """x (T, B, D), lengths (B,), y (B,) -> log_px, kl, log_w in nats, (B,), or (k, B) for k
        samples of z. Padding is ignored. ValueError for missing or unwanted labels."""
        if k is not None:
            y = None if y is None else y.repeat(k)
            return [term.view(k, -1) for term in self(x.repeat(1, k, 1), lengths.repeat(k), y)]
        t = torch.arange(len(x), device=x.device)[:, None]
        inside = t < lengths                                                       # (T, B)
        x = torch.where(inside[:, :, None], x, 0.0)
        label, h = self.embed(y, x.shape[1]), self.h_0.expand(x.shape[1], -1)
        steps = []
        for f_x_t in self.phi_x(x).unbind(0):    # not [t], whose gradient would be as large as x
            mu_q, logvar_q = self.gaussian(self.enc, f_x_t, h, label)              # eq. 9
            eps = torch.randn_like(mu_q)
            z = mu_q + (0.5 * logvar_q).exp() * eps
            f_z = self.phi_z(z)
            steps.append((h, mu_q, logvar_q, eps, z, f_z))
            h = self.gru(torch.cat([f_x_t, f_z, label], 1), h)                     # eq. 7
        # all time steps at once, (T, B, .), as no later step needs what follows
        h_before, mu_q, logvar_q, eps, z, f_z = [torch.stack(values) for values in zip(*steps)]
        label = label.expand(len(x), -1, -1)
        mu_p, logvar_p = self.gaussian(self.prior_net, h_before, label)            # eq. 5
        log_px = self.log_density(x, self.dec(torch.cat([f_z, h_before, label], 2)))    # eq. 6
        if self.end is not None:
            s = self.end(torch.cat([h_before[1:], h[None]])).squeeze(2).to(x.dtype)    # logits
            log_px = log_px + F.logsigmoid(torch.where(t == lengths - 1, s, -s))
        var_p = logvar_p.exp()    # then the KL of eq. 11, and log p(z_t|.) - log q(z_t|.) at z_t
        kl = 0.5 * (logvar_p - logvar_q - 1 + ((mu_q - mu_p)**2 + logvar_q.exp()) / var_p).sum(2)
        log_ratio = 0.5 * (eps**2 + logvar_q - logvar_p - (z - mu_p)**2 / var_p).sum(2)
        return [torch.where(inside, v, 0.0).sum(0) for v in (log_px, kl, log_px + log_ratio)]

    def mixture(self, out):    # log weights (..., K), mu, logvar (..., K, D), r (..., K), pen-up
        k, d = self.mixtures, 2 if self.likelihood == "pen" else self.x_dim
        weights, mu, logvar, rest = out.split([k, k * d, k * d, out.shape[-1] - k - 2 * k * d], -1)
        r = 0.99 * rest[..., :-1].tanh()    # empty, as is pen-up, but for the pen
        logvar = logvar.unflatten(-1, (k, d)).clamp(-12, 12)
        return weights.log_softmax(-1), mu.unflatten(-1, (k, d)), logvar, r, rest[..., -1:]

    def log_density(self, x, out):    # log p(x_t | z_t, h_{t-1}) (...); out is what dec returns
        out = out.to(x.dtype)
        if self.likelihood == "bernoulli":
            return (x * out + F.logsigmoid(-out)).sum(-1)
        log_weights, mu, logvar, r, up = self.mixture(out)
        d = mu.shape[-1]
        log_n = log_weights - 0.5 * (logvar + math.log(2 * math.pi)).sum(-1)
        u = (x[..., None, :d] - mu) * (-0.5 * logvar).exp()
        if self.likelihood == "pen":    # N(u_1) N(u_2 | u_1), where r is the correlation
            u = torch.stack([u[..., 0], (u[..., 1] - r * u[..., 0]) / (1 - r**2).sqrt()], -1)
            log_n = log_n - 0.5 * (1 - r**2).log()
        log_mixture = (log_n - 0.5 * (u**2).sum(-1)).logsumexp(-1)
        return log_mixture + (x[..., d:] * up + F.logsigmoid(-up)).sum(-1)

    def draw(self, out, temperature=1.0):    # x_t (B, D) from p(x_t | z_t, h_{t-1})
        if self.likelihood == "bernoulli":
            return torch.bernoulli((out / temperature).sigmoid())
        log_weights, mu, logvar, r, up = self.mixture(out)
        gumbel = -torch.empty_like(log_weights).exponential_().log()    # no wait for a GPU
        which = (log_weights / temperature + gumbel).argmax(-1, keepdim=True)      # (B, 1)
        mu, logvar = [v.take_along_dim(which[:, :, None], 1).squeeze(1) for v in (mu, logvar)]
        u = torch.randn_like(mu)
        if self.likelihood == "pen":
            r = r.gather(1, which)
            u = torch.cat([u[:, :1], r * u[:, :1] + (1 - r**2).sqrt() * u[:, 1:]], 1)
        x = mu + temperature * (0.5 * logvar).exp() * u
        return torch.cat([x, torch.bernoulli((up / temperature).sigmoid())], 1)

    @torch.no_grad()
    def sample(self, steps, n=1, y=None, temperature=1.0, z_temperature=1.0):
        """n sequences, or one per label of y (B,), of at most `steps` steps: x (T, B, D), lengths.
        The temperatures scale standard deviations of x, and of z; the first divides logits."""
        label = self.embed(y, n)
        h = self.h_0.expand(len(label), -1)
        lengths = torch.full((len(label),), steps, device=h.device)
        xs = []
        for t in range(steps):
            mu_p, logvar_p = self.gaussian(self.prior_net, h, label)               # eq. 5
            f_z = self.phi_z(mu_p + z_temperature * (0.5 * logvar_p).exp() * torch.randn_like(mu_p))
            x = self.draw(self.dec(torch.cat([f_z, h, label], 1)), temperature)    # eq. 6
            xs.append(torch.where((t < lengths)[:, None], x, 0.0))
            h = self.gru(torch.cat([self.phi_x(x), f_z, label], 1), h)             # eq. 7
            if self.end is not None:
                s = (self.end(h).squeeze(1) / temperature).sigmoid()
                lengths = torch.where(torch.bernoulli(s).bool(), lengths.clamp(max=t + 1), lengths)
        return torch.stack(xs).to(self.h_0), lengths

class Sequences:
    """Without padding: frames (sum of lengths, D), y and ends on the device, lengths on the CPU."""
    def __init__(self, pairs, device, classes):
        x, y = zip(*pairs)
        self.lengths = torch.tensor([len(sequence) for sequence in x])
        self.frames = torch.cat(x).to(device)
        self.ends = self.lengths.cumsum(0).to(device)
        self.y = torch.tensor([classes.index(c) for c in y], device=device) if classes else None

    def batches(self, order):
        """x (T, B, D), lengths, y for each row of order (steps, B), without waiting for a GPU."""
        lengths = self.lengths[order]
        longest = ((lengths.amax(1) + 7) // 8 * 8).clamp(max=self.lengths.max())    # few sizes
        for index, n, steps in zip(order.to(self.ends), lengths.to(self.ends), longest.tolist()):
            t = torch.arange(steps, device=n.device)[:, None]
            at = torch.where(t < n, self.ends[index] - n + t, 0)    # padding: any frame
            yield self.frames[at], n, None if self.y is None else self.y[index]

def read_data(args):
    """train, valid and test, each a Sequences; kind, "rows", "pen" or "speech"; scale, by which
    values were divided; unit, in which they were recorded; classes, [] if not conditional."""
    import common
    readers = {"pendigits": pendigits, "iam-ondb": iam_ondb, "ndjson": drawings, "wav": wav_folder,
               "glyphs": glyph_strokes, "speech": spoken_digits}    # yield part, sequence, label
    images = None if args.dataset in readers else common.images(args)    # sets args.dataset
    read = readers.get(args.dataset, image_rows)
    kind = {image_rows: "rows", spoken_digits: "speech", wav_folder: "speech"}.get(read, "pen")
    parts = [], [], []
    try:
        for part, x, label in read(images or Path(os.path.expanduser(args.data_dir))):
            parts[part].append((x, label.encode(errors="replace").decode()))    # drawable
    except (OSError, ValueError) as error:
        common.fail(error)
    if not all(parts):
        common.fail(f"{args.data_dir}: {[*map(len, parts)]} sequences to train, validate and test")
    labels = {label for part in parts for _, label in part}
    names = sorted(labels) if args.conditional and "" not in labels else []
    n = max(args.batch_size or 32, args.run.world) if args.dry_run else None
    train, valid, test = [Sequences(p[:n], args.device, names) for p in parts]
    rms, scale, columns = 1.0, 1.0, 2 if kind == "pen" else None    # not pen-up
    if kind != "rows":
        rms = float(f"{train.frames[:, :columns].cpu().double().square().mean().sqrt():.6g}")
        scale = args.run.saved["scale"] if args.run.saved else rms or 1.0    # its model's own
        for part in (train, valid, test):
            part.frames[:, :columns] /= scale
    args.run.about = dict(kind=kind, scale=scale, rms=rms, unit=float(kind != "rows"), rate=8000,
                          classes=names, steps=int(train.lengths.max()))
    return types.SimpleNamespace(train=train, valid=valid, test=test, **args.run.about)

def prepare(x, data, seed=None):    # binary rows; integers with noise: always new, or by a seed
    g = None if seed is None else torch.Generator().manual_seed(seed)
    noise = torch.rand(x.shape, generator=g, device="cpu" if g else x.device).to(x.device)
    if data.kind == "rows":
        return (255 * noise < x).float()
    if data.kind == "speech" and seed is None:    # in training a batch begins later, and loses as
        n = int(torch.randint(1, x.shape[2] + 1, ()))    # many samples, 0 to 199, at the end
        x = torch.cat([F.pad(x, (0, 0, 0, 0, 1, -1))[..., n:], x[..., :n]], 2)
    if data.kind == "pen" and seed is None:    # in training each drawing is stretched and slanted
        change = 0.15 * F.pad(torch.randn(x.shape[1], 2, 2, device=x.device), (0, 1, 0, 1))
        x = x + torch.einsum("tbi,bij->tbj", x, change)
    noise = data.unit / data.scale * (noise - 0.5)
    noise[..., 2:] *= data.kind != "pen"    # pen-up stays 0 or 1
    return (x + noise) @ dct(x.shape[-1], x.device) if data.kind == "speech" else x + noise
@functools.cache    # copying it at every step would wait for the GPU
def dct(n, device):    # the orthonormal cosine transform (n, n) of frames (..., n)
    k = torch.arange(n, dtype=torch.float64)
    base = torch.cos(math.pi / n * (k[:, None] + 0.5) * k) * torch.where(k > 0, 2 / n, 1 / n).sqrt()
    return base.float().to(device)
def image_rows(images):
    for part, (x, y) in enumerate((images.train, images.valid, images.test)):
        yield from ((part, v, images.classes[c]) for v, c in zip(x.cpu().flatten(1, 2), y.cpu()))
def moves(strokes, file, up=1):    # up=-1: y points downwards
    """Lists of points (x, y) -> (T, 3) rows (dx, dy, pen-up); pen-up is 1 where a stroke ends."""
    points = [(float(x), float(y), i == len(s)) for s in strokes for i, (x, y) in enumerate(s, 1)]
    points = torch.tensor(points, dtype=torch.float64).view(-1, 3)
    if not 0 < len(points) <= 2000 or not (points.isfinite() & (points == points.round())).all():
        raise ValueError(f"{file}: has {len(points)} points; must be 1 to 2000, in whole numbers")
    points[:, :2] = points[:, :2].diff(dim=0, prepend=points[:1, :2]) * torch.tensor([1, up])
    return points.float()
def glyph_strokes(root):    # outlines in matplotlib's fonts, distorted: integers, about 100 high
    import common, numpy as np
    from matplotlib.textpath import TextPath
    random = np.random.default_rng(0)
    paths = [[TextPath((0, 0), d, 140, f) for d in "0123456789"] for f in common.glyph_fonts()]
    for i in range(6000):
        digit, matrix = random.integers(10), np.eye(2) + random.uniform(-0.2, 0.2, (2, 2))
        strokes = []
        for outline in paths[random.integers(len(paths))][digit].to_polygons():
            x, y = (outline @ matrix).T
            length = np.r_[0, np.hypot(np.diff(x), np.diff(y)).cumsum()]
            at = np.linspace(0, length[-1], max(3, round(length[-1] / 8)))    # moves 8 long
            strokes.append(np.c_[np.interp(at, length, x), np.interp(at, length, y)].round())
        yield (i >= 5000) + (i >= 5500), moves(strokes, "glyphs"), str(digit)
def pendigits(root):    # Alpaydin & Alimoglu 1998, UNIPEN text
    for name, size in (("pendigits-orig.tra", 7494), ("pendigits-orig.tes", 3498)):
        file = root / "pendigits" / name
        file = file if file.exists() else file.with_name(name + ".Z")
        if not file.exists():
            download("https://archive.ics.uci.edu/static/public/81/pen+based+recognition+of+"
                     "handwritten+digits.zip", file.parent, r"pendigits-orig\.t(ra|es)\.Z",
                     "cd620bc67fb841b05abece060330ad57ffda5398f7dde0bdd595f689ec78d313")
        unpack = ["gzip", "-dc", file] if file.suffix == ".Z" else None    # Python can't do it
        if unpack and not shutil.which("gzip"):
            raise ValueError(f"{file}: unpacking needs gzip; or put {name} there, unpacked")
        text = subprocess.run(unpack, capture_output=True).stdout if unpack else file.read_bytes()
        split = re.split(r'SEGMENT DIGIT.*"(\d)"', text.decode("latin-1"))
        if len(split) != 1 + 2 * size:
            raise ValueError(f"{file}: damaged, {len(split) // 2} digits of {size}")
        for i, (label, body) in enumerate(zip(split[1::2], split[2::2])):
            strokes = re.findall(r"\.PEN_DOWN(.*?)\.PEN_UP", body, re.S)
            strokes = [re.findall(r"^ *(-?\d+) +(-?\d+) *$", s, re.M) for s in strokes]
            yield 2 if size == 3498 else int(i >= 6745), moves(strokes, file), label
def hash_split(name):    # 0, 1 or 2: training, validation or test, 8 : 1 : 1
    return max(0, int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % 10 - 7)
def files_below(root, ending):    # follows links to folders, skips names that begin with a dot
    files = [root / name for name in glob.glob("**", root_dir=root, recursive=True)]
    return sorted(f for f in files if f.name.lower().endswith(ending) and not f.is_dir())
def iam_ondb(root):    # the user's copy, split by its three lists if all are there, else by folder
    files = [file for file in files_below(root, ".xml") if "lineStrokes" in file.parts]
    if not files:
        raise ValueError(f"no lineStrokes/**/*.xml in {root}; IAM-OnDB has to be registered for")
    lists, listed = [root / f"{name}.txt" for name in ("trainset", "testset_v", "testset_f")], {}
    for part, file in enumerate(lists if all(file.exists() for file in lists) else []):
        listed.update(dict.fromkeys(file.read_text("latin-1").split(), part))
    for file in files:
        part = listed.get(file.stem.rsplit("-", 1)[0]) if listed else hash_split(file.parent.name)
        try:
            strokes = [stroke.iter("Point") for stroke in ElementTree.parse(file).iter("Stroke")]
            x = moves([[(p.get("x"), p.get("y")) for p in stroke] for stroke in strokes], file, -1)
        except (ElementTree.ParseError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not a file of strokes: {error}")
        if part is not None:
            yield part, x, ""
def drawings(root):    # a JSON object a line, in the simplified format of Quick, Draw!
    for file in files_below(root, ".ndjson"):
        for i, line in enumerate(file.read_bytes().rstrip().splitlines(), 1):
            try:
                one = json.loads(line)
                x = moves([list(zip(*stroke, strict=True)) for stroke in one["drawing"]], file, -1)
                yield hash_split(str(one.get("key_id") or i)), x, str(one["word"])
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                raise ValueError(f"{file}: line {i} is no drawing: {error!r}")
def spoken_digits(root):    # Free Spoken Digit Dataset: recordings 0-4 test, 5-9 validation
    folder = root / "free-spoken-digit-dataset-1.0.10" / "recordings"
    pattern = r"([0-9])_\w+_([0-9]+)\.wav"
    if not (folder / "9_yweweler_9.wav").exists():    # the last that a download writes
        download("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/"
                 "v1.0.10.zip", folder, ".*/recordings/" + pattern,
                 "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e")
    for file in sorted(folder.iterdir()):
        if name := re.fullmatch(pattern, file.name):
            yield 2 - min(int(name[2]) // 5, 2), frames(file), name[1]
def wav_folder(root):    # if all WAV files are in sub-folders, those are the classes
    for file in files_below(root, ".wav"):
        name = file.relative_to(root)
        yield hash_split(name.as_posix()), frames(file), name.parts[0] if name.parts[1:] else ""
def frames(file, rate=8000, size=200):    # (T, size) samples, channels' mean; zeros fill the end
    try:
        raw = re.sub(rb"(?s)(fmt .{4})\xfe\xff(.{22}\x01\0)", b"\\1\1\0\\2", file.read_bytes())
        with wave.open(io.BytesIO(raw)) as sound:    # EXTENSIBLE made plain, for Python 3.11
            channels, width, old_rate, n = sound.getparams()[:4]
            data = bytearray(sound.readframes(n))
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{file}: not a WAV file: {error!r}; try ffmpeg -i {file} NEW.wav")
    n = len(data) // (width * channels)
    new = max(int(n > 0), round(n * rate / max(1, old_rate)))
    if not 0 < new <= 2000 * size:
        raise ValueError(f"{file}: {new} samples at {rate} Hz; must be 1 to {2000 * size}")
    x = torch.frombuffer(data, dtype=torch.uint8, count=n * channels * width).view(-1, width)
    low = torch.randint(256, (len(x), 1), generator=torch.Generator().manual_seed(0)).byte()
    x = x[:, -2:] if width > 1 else torch.cat([low, x ^ 128], 1)    # 16 bits, or 8 and noise
    x = x.contiguous().view(torch.int16).view(n, -1).float().mean(1)
    if new != n:    # by its spectrum: what the new rate can't hold is left out
        x = torch.fft.irfft(torch.fft.rfft(x)[:new // 2 + 1], new) * (new / n)
    return F.pad(x, (0, -new % size)).view(-1, size)
def download(url, folder, members, sha256):    # from a zip; sha256 is of sorted names and contents
    import common
    try:
        pack = zipfile.ZipFile(io.BytesIO(urllib.request.urlopen(url, timeout=30).read()))
        content = {Path(n).name: pack.read(n) for n in pack.namelist() if re.fullmatch(members, n)}
        both = b"".join(name.encode() + content[name] for name in sorted(content))
        if hashlib.sha256(both).hexdigest() != sha256:
            raise ValueError("its checksum is wrong")
        folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:    # urllib and zipfile raise a dozen kinds
        raise ValueError(f"can't download {url}: {error!r}; put its files into {folder}")
    for name, data in content.items():
        common.write(folder / name, data)

def draw_pictures(x, lengths, names, data, folder, columns=8):
    """samples.png of x (T, B, D); of speech spectrograms.png, bass below, sounds/ROW_COLUMN.wav."""
    from matplotlib.figure import Figure
    from torchvision.utils import save_image
    x = x[:lengths.max()].transpose(0, 1).cpu()
    if data.kind == "speech":
        (folder / "sounds").mkdir(exist_ok=True)
        x = (x @ dct(x.shape[2], x.device).T * data.scale).flatten(1).clamp(-32768, 32767)
        power = torch.stft(x, 256, 64, window=torch.hann_window(256), return_complex=True).abs()
        image = (0.01 + power / (1 + power.amax((1, 2), True))).log().flip(1)[:, None]    # 40 dB
        save_image(image, folder / "spectrograms.png", nrow=columns, normalize=True, pad_value=0.3)
    ax = Figure((columns, len(x) / columns)).add_axes([0, 0, 1, 1], frame_on=False)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(0.5 - len(x) / columns, 0.5), xticks=[], yticks=[])
    for i, n in enumerate(lengths.tolist()):
        row, column = divmod(i, columns)
        ax.text(column, 0.37 - row, names[i], size=7, ha="center", parse_math=False)
        if data.kind == "rows":
            ax.imshow(x[i], "gray", extent=[column - 0.35, column + 0.35, -row - 0.35, 0.35 - row])
            continue
        if data.kind == "pen":
            points, ends = x[i, :n, :2].cumsum(0), x[i, :n, 2].nonzero().flatten() + 1
        else:
            points, ends = torch.stack([torch.arange(200 * n), x[i, :200 * n]], 1), []
            with wave.open(str(folder / "sounds" / f"{row}_{column}.wav"), "wb") as file:
                file.setparams((1, 2, data.rate, 0, "NONE", None))    # mono, 16 bit
                file.writeframes(x[i, :200 * n].to(torch.int16).numpy().tobytes())
        points = points - (points.amax(0) + points.amin(0)) / 2
        size = points.abs().max() if data.kind == "pen" else points.abs().amax(0)
        points = 0.35 * points / size.clamp(min=1e-9) + torch.tensor([column, -row])
        for stroke in points.tensor_split(ends):
            ax.plot(*stroke.T, "k-" if len(stroke) > 1 else "k.", linewidth=0.7, markersize=2)
    ax.figure.savefig(folder / "samples.png", dpi=160)

def main(argv=None):
    import common
    # flags, data and model
    args = common.parse(flags(), argv)
    data = types.SimpleNamespace(**args.run.saved) if args.sample else read_data(args)
    labels = data.classes if args.conditional else []
    asked = sum(([word] if word in labels else [*word] for word in args.classes or labels), [])
    if (args.conditional and not asked) or not set(asked) <= set(labels):
        common.fail(f"--conditional needs labels; --classes needs it, and some of {labels}")
    def pictures(model, folder, n=None):    # a row of 8 per digit; or n in rows of 8
        torch.manual_seed(args.seed)
        y = torch.tensor([labels.index(name) for name in asked] or 10 * [0])
        y = y.repeat(n + 7)[:math.ceil(n / 8) * 8] if n else y.repeat_interleave(8)
        given = None if model.label is None else y.to(args.device)
        x, lengths = model.sample(data.steps, len(y), given, args.temperature, args.z_temperature)
        draw_pictures(x, lengths, [labels[i] if labels else "" for i in y], data, folder)
    if args.sample:    # needs no data
        return pictures(*common.trained(args, VRNN), args.sample)
    likelihood, *defaults = dict(rows=("bernoulli", 1, 7, 128, 4e-3), pen=("pen", 20, 30, 48, 2e-3),
                                 speech=("gaussian", 1, 150, 32, 2e-3))[data.kind]
    for name, value in zip(("mixtures", "epochs", "batch_size", "lr"), defaults):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    sizes = {k: getattr(args, k) for k in ("z_dim", "prior", "mixtures", "hidden", "features")}
    model_args = dict(x_dim=data.train.frames.shape[1], likelihood=likelihood,
                      num_classes=len(labels), stop=data.kind != "rows", **sizes)
    model = VRNN(**model_args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    def evaluate(model, part, samples=1):
        rows = max(32, 5000 // int(part.lengths.max()))    # at once, so that memory is bounded
        return common.evaluate(lambda index, k: model(*next(part.batches(index[None])), k=k),
                               part.lengths.argsort(), samples=samples, rows=rows)
    # training
    data.valid.frames = prepare(data.valid.frames, data, seed=1)
    run = common.Run(args, model, model_args, optimizer)
    for epoch in range(run.epoch, args.epochs):
        order = common.epoch_order(args, epoch, len(data.train.lengths), data.train.lengths)
        for x, lengths, y in data.train.batches(order):
            log_px, kl, _ = model(prepare(x, data), lengths, y)
            loss = (kl - log_px).mean()
            optimizer.zero_grad()
            loss.backward()
            common.share_gradients(model, args)    # under torchrun
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            run.after_step(loss=loss, rec=-log_px, kl=kl)    # averages weights, keeps the figures
        if run.end_epoch(evaluate(run.average, data.valid)):
            pictures(run.average, run.dir)
    # test and pictures
    model = run.best_model()
    data.test.frames = prepare(data.test.frames, data, seed=2)
    run.finish(evaluate(model, data.test, args.test_samples))
    pictures(model, run.dir)

if __name__ == "__main__":
    main()
