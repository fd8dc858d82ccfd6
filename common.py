"""What the scripts share. They import it inside functions: a copied class needs torch alone."""
import argparse, atexit, contextlib, copy, io, json, math, os, socket, statistics, sys, time, zlib
from pathlib import Path
class Lazy:    # importing torch takes seconds, and --help should not
    __getattr__ = lambda self, name: getattr(__import__("torch"), name)
torch = Lazy()
def fail(message):
    """End the program with one line on standard error and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)
def last_words(kind, error, trace):
    """An excepthook: Ctrl-C says how to resume, status 130; files, memory: one line."""
    if kind is KeyboardInterrupt:
        print(f"\nstopped{Run.hint}", flush=True)
        os._exit(130)    # at once
    if issubclass(kind, (OSError, MemoryError)) or "allocate" in str(error):
        fail(f"{str(error) or kind.__name__}; no checkpoint is half written")
    sys.__excepthook__(kind, error, trace)
def at_least(low, kind=int):
    """An argparse type: a number from `low` to 2**63, whole unless kind=float."""
    def number(text):    # argparse's own message for 'x': invalid number value
        if low <= kind(text) < 2**63:
            return kind(text)
        raise argparse.ArgumentTypeError(f"must be a number of at least {low}, not {text}")
    return number
def parser(script, doc, epochs, batch_size, lr, test_samples, datasets=()):
    """The flags of every script; the defaults are the script's own."""
    sys.excepthook = last_words    # from here on, before torch is imported
    bases = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(f"{script}.py", "%(prog)s [flags]; --help lists them", doc,
                                formatter_class=type("Help", bases, {}), allow_abbrev=False)
    add, sets = p.add_argument, ("mnist", "fashion-mnist", "kmnist", "glyphs", "folder", *datasets)
    add("--dataset", choices=sets, help="None: mnist if it can be had, else glyphs")
    add("--data-dir", default="data", help="where data sets are, or are downloaded to")
    add("--image-size", type=at_least(8), default=28, help="side of the images of folder, pixels")
    add("--out-dir", help="a new folder for the results; None: out/SCRIPT-1, -2, ...")
    add("--epochs", type=at_least(0), default=epochs, help="train up to this many in all")
    add("--batch-size", type=at_least(1), default=batch_size, help="examples per step")
    add("--lr", type=at_least(1e-9, float), default=lr, help="Adam's learning rate")
    add("--seed", type=at_least(0), default=0, help="seed of weights, noise and order")
    add("--device", default="auto", help="auto takes an accelerator if there is one, else cpu")
    add("--resume", metavar="PATH", help="continue from a checkpoint or a run's folder")
    add("--sample", type=at_least(1), metavar="N", help="draw N samples of --resume, and stop")
    add("--dry-run", action="store_true", help="one batch of everything, to see it work")
    add("--test-samples", type=at_least(1), default=test_samples, help="importance samples, test")
    return p
def parse(p, argv=None):
    """Parse; take the checkpoint's flags where none are given; choose device and seed."""
    args = p.parse_args(argv)
    run = argparse.Namespace(script=p.prog[:-3], saved=None, rank=0, world=1, note="", about={})
    if args.resume is not None:
        path = Path(os.path.expanduser(args.resume))    # unlike Path's, it takes any ~name
        path = path / "checkpoint.pt" if path.is_dir() else path
        try:
            run.saved = torch.load(path, map_location="cpu", weights_only=True) | {"path": path}
            run.saved["script"] == run.script or fail(f"--resume {path}: not written by {p.prog}")
            p.set_defaults(**run.saved["args"] | dict(out_dir=None, device="auto", dry_run=False))
        except Exception as error:    # unpickling something else raises almost anything
            fail(f"--resume {path}: no checkpoint, {type(error).__name__}: {error}")
        args = p.parse_args(argv)
    elif args.sample:
        p.error("--sample needs --resume PATH")
    if args.dry_run:
        args.epochs, args.test_samples = 1 + len(run.saved["rows"] if run.saved else []), 4
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
            run.rank, run.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            atexit.register(torch.distributed.destroy_process_group)
        torch.zeros(1, device=args.device).item()
    except Exception as error:    # there are many kinds
        fail(f"--device {args.device} can't be used, try auto: {error}")
    torch.backends.cudnn.allow_tf32 = False    # products in float32, whatever the environment says
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_flush_denormal(True)    # tiny numbers would slow a CPU several times
    torch.manual_seed(args.seed)
    return argparse.Namespace(**vars(args), run=run)
def images(args):
    """The set args.dataset, or what is found: grey x (N, 1, H, W) uint8, labels y (N,) int64."""
    from torchvision import datasets, transforms
    name, root = args.dataset or "mnist", Path(os.path.expanduser(args.data_dir))
    if name == "folder":    # own images, in a sub-folder per class
        def load(path):    # Pillow's errors are of many kinds, and seldom name the file
            try:
                image = datasets.folder.default_loader(path).convert("L")
                return transforms.PILToTensor()(transforms.Resize([args.image_size] * 2)(image))
            except Exception as error:
                fail(f"{path}: not an image: {error!r}")
        found = datasets.ImageFolder(root, loader=load, allow_empty=True)
        found.imgs[:] = [one for one in found.imgs if f"{os.sep}." not in one[0][len(str(root)):]]
        found.imgs or fail(f"{root}: no images in sub-folders")
        tens = [zlib.crc32(os.fsencode(os.path.relpath(path, root))) % 10 for path, _ in found.imgs]
        x, y = [torch.stack([torch.as_tensor(v) for v in values]) for values in zip(*found)]
        cuts = [torch.tensor(tens).clamp(max=2) == part for part in (2, 1, 0)]
    elif name != "glyphs":
        kind = getattr(datasets, "FashionMNIST" if name == "fashion-mnist" else name.upper())
        folder = root / kind.__name__ / "raw"
        socket.setdefaulttimeout(4)    # seconds, for each of torchvision's mirrors
        try:
            both = [kind(root, train, download=True) for train in (True, False)]
            x, y = map(torch.cat, zip(*[(half.data[:, None], half.targets) for half in both]))
            cuts = slice(5000, len(both[0])), slice(5000), slice(len(both[0]), None)
        except Exception as error:    # torchvision lets through whatever its parser stumbles over
            with contextlib.suppress(OSError, ValueError):    # torchvision leaves empty folders
                os.removedirs(os.path.relpath(folder))    # but the current one stays
            if args.dataset or folder.exists():
                fail(f"{name}: can't download, or read {folder}/{{train,t10k}}*-ubyte*: {error!r}")
            args.run.note = f"NOT MNIST (not in {args.data_dir}, no download): glyphs from fonts\n"
            name = "glyphs"
    if name == "glyphs":
        (x, y), cuts = glyph_images(24_000), (slice(4000, None), slice(2000), slice(2000, 4000))
    if not all(len(x[cut]) for cut in cuts):
        fail(f"{root}: {len(x)} images of {name} are too few to train, validate and test")
    kept, y = y.unique(return_inverse=True)    # no classes of hidden folders
    classes = [found.classes[c] if name == "folder" else str(c) for c in kept.tolist()]
    args.run.about = {"classes": classes, "examples": len(x)}
    args.dataset, n = name, max(args.batch_size or 32, args.run.world) if args.dry_run else None
    train, valid, test = [(x[c][:n].to(args.device), y[c][:n].to(args.device)) for c in cuts]
    return argparse.Namespace(train=train, valid=valid, test=test, shape=(1, *x.shape[2:]),
                              num_classes=len(classes), classes=classes)
def glyph_fonts():
    """The DejaVu fonts that come with matplotlib, but for its Display fonts, as paths."""
    from matplotlib import get_data_path
    return sorted(Path(get_data_path(), "fonts/ttf").glob("DejaVu*[!y].ttf"))
def glyph_images(n):
    """Digits in matplotlib's fonts, turned and moved: x (n, 1, 28, 28) uint8, y (n,) int64."""
    import numpy as np
    from matplotlib.ft2font import FT2Font
    fonts, random = [FT2Font(str(path)) for path in glyph_fonts()], np.random.default_rng(0)
    x, y = np.zeros((n, 1, 28, 28), np.uint8), random.integers(10, size=n)
    for image, digit in zip(x, y):
        font = fonts[random.integers(len(fonts))]
        font.set_size(random.uniform(18, 24), 72)
        font.set_text(str(digit), random.uniform(-15, 15))
        font.draw_glyphs_to_bitmap(antialiased=True)
        ink = np.asarray(font.get_image())[:28, :28]
        top, left = [random.integers(29 - side) // 2 + (28 - side) // 4 for side in ink.shape]
        image[0, top:top + ink.shape[0], left:left + ink.shape[1]] = ink
    return torch.from_numpy(x), torch.from_numpy(y)
def binarise(x, seed=None):
    """Pixels from Bernoulli(x / 255): new ones at every call, or always the same for a seed."""
    g = None if seed is None else torch.Generator().manual_seed(seed)
    noise = torch.rand(x.shape, generator=g, device="cpu" if g else x.device)
    return (noise.to(x.device) * 255 < x).float()
def epoch_order(args, epoch, n, lengths=None):
    """Seed the noise; return the epoch's order of n examples, (steps, examples), on the CPU."""
    torch.manual_seed(seed := hash((args.seed, epoch)))
    size = max(1, min(args.batch_size, n) // args.run.world) * args.run.world
    index = torch.randperm(n)[:n // size * size]
    if lengths is not None:    # (n,): examples of similar length share a step
        index = index[lengths[index].argsort(stable=True)]
    index = index.view(-1, size)[torch.randperm(n // size)]
    torch.manual_seed(seed + args.run.rank)    # the order is common, the noise is not
    args.run.steps, args.run.size, args.run.began = len(index), size, time.time()
    return index[:, args.run.rank::args.run.world]    # this process's part, under torchrun
def batches(args, epoch, *tensors):
    """An epoch's shuffled batches of tensors (N, ...)."""
    for index in epoch_order(args, epoch, len(tensors[0])).to(args.device):
        yield [t[index] for t in tensors]
def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(N(mu_q, e^logvar_q) || N(mu_p, e^logvar_p)), elementwise, in nats."""
    return 0.5 * (logvar_p - logvar_q - 1 + ((mu_q - mu_p)**2 + logvar_q.exp()) / logvar_p.exp())
def log_mean_exp(log_w, dim=0):
    """The importance-weighted bound (Burda et al. 2016, eq. 8) of log weights along `dim`."""
    return log_w.logsumexp(dim) - math.log(log_w.shape[dim])
def evaluate(model, *tensors, samples=1, rows=4096):
    """Mean neg_elbo, rec, kl, and nll if samples > 1, nats; model(*tensors, k=k): three (k, B)."""
    torch.manual_seed(0)    # the same noise at every call
    k, sums = min(samples, 64, rows), []    # `rows` samples are decoded at once
    for batch in zip(*(t.split(rows // k) for t in tensors)):
        if sys.stdout.isatty():    # a live line
            print(f"  evaluated {len(sums) * (rows // k)} of {len(tensors[0])}   ", end="\r")
        with torch.no_grad():
            parts = [model(*batch, k=min(k, samples - done)) for done in range(0, samples, k)]
        log_px, kl, log_w = [torch.cat(terms) for terms in zip(*parts)]
        sums.append(torch.stack([-log_px.mean(0), kl.mean(0), -log_mean_exp(log_w)]).sum(1))
    rec, kl, nll = (torch.stack(sums).cpu().double().sum(0) / len(tensors[0])).tolist()
    return {"neg_elbo": rec + kl, "rec": rec, "kl": kl} | ({"nll": nll} if samples > 1 else {})
def share_gradients(model, args):
    """Under torchrun, give every process the mean of all processes' gradients."""
    if args.run.world > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]) / args.run.world
        torch.distributed.all_reduce(flat)
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))    # which keeps its layout, as fused Adam needs
def write(path, content):
    """Write bytes to a temporary file, then rename it: half a file never bears its name."""
    path.with_name(path.name + ".tmp").write_bytes(content)
    os.replace(path.with_name(path.name + ".tmp"), path)
def new_folder(args):
    """Make args.out_dir, which must not exist, or the first free out/SCRIPT-N."""
    for n in range(1, 10**9):
        folder = Path(os.path.expanduser(args.out_dir or f"out/{args.run.script}-{n}"))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            print(f"writing to {folder}", flush=True)
            return folder
        if args.out_dir:
            fail(f"{folder} exists; choose another --out-dir, or --resume {folder}")
def trained(args, kind):
    """For --sample: the model of --resume, and a new folder for its pictures."""
    model = kind(**args.run.saved["model_args"]).to(args.device).eval().requires_grad_(False)
    model.load_state_dict(args.run.saved["model"])
    return model, new_folder(args)

class Run:
    """A run's files, and weights averaged with the profile t^12 (Karras et al. 2024, sec. 3.1)."""
    hint = ""    # what Ctrl-C adds
    def __init__(self, args, model, model_args, optimizer):
        self.args, self.model, self.steps, self.shown = args, model, [], 0.0
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.best, self.rows = copy.deepcopy(self.average.state_dict()), []
        self.parts = {"weights": model, "average": self.average, "optimizer": optimizer}
        self.facts = {"script": args.run.script, "model_args": model_args, **args.run.about}
        self.facts["args"] = {k: v for k, v in vars(args).items() if k != "run"}
        if saved := args.run.saved:
            if (saved["model_args"], saved["args"]["dataset"]) != (model_args, args.dataset):
                fail(f"--resume: trained on {saved['args']['dataset']} with {saved['model_args']}")
            changed = [k for k, v in args.run.about.items() if saved.get(k, v) != v]
            if changed and not args.dry_run:
                args.run.note += f"NOT THE CHECKPOINT'S DATA: {', '.join(changed)} changed\n"
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            optimizer.param_groups[0]["lr"] = args.lr
            self.best, self.rows = saved["model"], saved["rows"]
            Run.hint = f"; continue with --resume {saved['path']}"
        self.epoch = len(self.rows)
        self.began = time.time() - sum(row["seconds"] for row in self.rows[-1:])
        if args.run.rank == 0:    # one process writes
            print(args.run.note, ascii(self.facts), sep="", flush=True)
            old = saved["path"] if saved and not (args.out_dir or args.dry_run) else Path()
            open_end = args.epochs > self.epoch or not (old.parent / "results.json").exists()
            self.dir = old.parent if old.name == "checkpoint.pt" and open_end else new_folder(args)
    def after_step(self, **figures):
        """Average the weights; keep the step's mean figures on the device."""
        self.steps.append({k: v.detach().float().mean() for k, v in figures.items()})
        done, steps, self.now = len(self.steps), self.args.run.steps, time.time()
        self.speed = done * self.args.run.size / (self.now - self.args.run.began + 1e-9)
        self.left = (self.now - self.began) * (self.args.epochs / (self.epoch + done / steps) - 1)
        weight = 1 - (1 - 1 / (self.epoch * steps + done))**13    # acts like a falling lr
        for a, b in zip(self.average.state_dict().values(), self.model.state_dict().values()):
            a.lerp_(b, weight) if a.is_floating_point() else a.copy_(b)
        if self.now - self.shown > (1 if sys.stdout.isatty() else 30) and self.args.run.rank == 0:
            self.shown, end = self.now, "\r" if sys.stdout.isatty() else "\n"
            print(f"  epoch {self.epoch + 1}, step {done} of {steps}, loss {figures['loss']:.5g},"
                  f" {self.speed:.0f} examples/s, {self.left:.0f} s left ", end=end, flush=True)
    def end_epoch(self, valid):
        """Log and save; True if the first of the validation's figures is the best so far."""
        train = {k: torch.stack([s[k] for s in self.steps]).mean().item() for k in self.steps[0]}
        if not math.isfinite(train["loss"] + sum(p.sum() for p in self.model.parameters()).item()):
            fail(f"the loss of epoch {self.epoch + 1} is not finite; try a smaller --lr{Run.hint}")
        row = {"epoch": self.epoch + 1, "seconds": time.time() - self.began,
               "examples_per_second": self.speed, **{f"train_{k}": v for k, v in train.items()},
               **{f"valid_{k}": v for k, v in valid.items()}}
        key = f"valid_{next(iter(valid))}"    # NaN is never the best
        row["best"] = row[key] <= min([r[key] for r in self.rows if r["best"]], default=math.inf)
        self.rows, self.steps, self.epoch = [*self.rows, row], [], self.epoch + 1
        if self.args.run.rank:
            return False
        self.best = copy.deepcopy(self.average.state_dict()) if row["best"] else self.best
        state, content = {k: part.state_dict() for k, part in self.parts.items()}, io.BytesIO()
        torch.save({**self.facts, **state, "model": self.best, "rows": self.rows}, content)
        if row["best"] or not (self.dir / "best.pt").exists():
            write(self.dir / "best.pt", content.getvalue())
        lines = [",".join(row)] + [",".join(map(str, r.values())) for r in self.rows]
        write(self.dir / "log.csv", ("\n".join(lines) + "\n").encode())
        write(self.dir / "checkpoint.pt", content.getvalue())    # says that the epoch is done
        Run.hint = f"; continue with --resume {self.dir}"
        print(*(f"{k} {v:.5g} " for k, v in row.items()), f"{self.left:.0f} s left", flush=True)
        from matplotlib.figure import Figure
        axes = Figure((8, 8)).subplots(2, sharex=True)
        for ax, name in zip(axes, ("train_loss", key)):
            ax.plot(range(1, self.epoch + 1), [r[name] for r in self.rows], ".-")
            ax.set(xlabel="epoch", ylabel=name)
        axes[0].figure.savefig(self.dir / "curve.png")
        return row["best"]
    def best_model(self):
        """The averaged model of the best validation, or the one that was given."""
        if self.args.run.rank:
            sys.exit()
        self.average.load_state_dict(self.best)
        return self.average
    def finish(self, test):
        """Write results.json and print its figures."""
        best = ([{}] + [row for row in self.rows if row["best"]])[-1]
        figures = {"test_nll": None, **{f"test_{k}": v for k, v in test.items()}}
        figures.update({k.replace("valid", "val"): v for k, v in best.items() if "valid" in k})
        speeds = [row["examples_per_second"] for row in self.rows]
        result = {**self.facts, **figures, "dataset": self.args.dataset,
                  "params": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                  "epochs": self.epoch, "seconds": sum(row["seconds"] for row in self.rows[-1:]),
                  "examples_per_second": statistics.median(speeds[1:] or speeds or [0.0]),
                  "torch": torch.__version__, "test_samples": self.args.test_samples}
        write(self.dir / "results.json", json.dumps(result, indent=2).encode())
        print(figures, f"pictures and results.json are in {self.dir}", self.args.run.note, sep="\n")
